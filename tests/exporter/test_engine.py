"""One ONNX file to one plan, built for real on the CPU; and one line for whatever goes wrong in the other process."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mythos_edge.exporter import engine, engine_process
from mythos_edge.exporter.engine import EngineJob
from mythos_edge.exporter.engine_process import build_engine, weight_bytes
from mythos_edge.model.errors import BuildError
from mythos_edge.plugins import trt_bindings

pytest.importorskip("tensorrt_rtx")
D = 32
PROFILES: Any = tuple({"chunk": (1, rows, rows), "context": (1, 24, 24)} for rows in (1, 8))


def _graph(folder: Path, nodes: list[Any], *, output: int = TensorProto.FLOAT16, functions: Any = ()) -> Path:
    """``x (1, chunk, D)``, ``past (1, context, D)`` -> ``y``, with a weight ``w (D, D)`` in a file beside."""
    weight = np.random.default_rng(0).standard_normal((D, D)).astype(np.float16)
    (folder / "w.bin").write_bytes(weight.tobytes())
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT16, dims=[D, D], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", str(weight.nbytes))):
        outside.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, "chunk", D]),
            helper.make_tensor_value_info("past", TensorProto.FLOAT16, [1, "context", D]),
        ],
        [helper.make_tensor_value_info("y", output, [1, "chunk", "context"])],
        initializer=[outside],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("mythos", 1)]
    path = folder / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions)), str(path))
    return path


def _scores() -> list[Any]:
    return [
        helper.make_node("MatMul", ["x", "w"], ["q"]),
        helper.make_node("Transpose", ["past"], ["columns"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "columns"], ["y"]),
    ]


def _job(graph: Path, capabilities: tuple[int, ...] = (89,), plugins: int = 0, **changes: Any) -> EngineJob:
    values: dict[str, Any] = {"profiles": PROFILES, "values": {}, "max_rows": 8, "layout": "step"}
    values |= {"plugin_layers": plugins, **changes}
    plan = str(graph.parent / "small.engine")
    return EngineJob(str(graph), plan, "rtx", capabilities, **values)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "build.log"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def refused(job: EngineJob, log: Path, progress: Callable[[str, float], None] = lambda *_: None) -> str:
    """The one line with which a build fails, having left nothing in its folder."""
    before = set(Path(job.graph).parent.iterdir())
    with pytest.raises(BuildError) as caught:
        build_engine(job, log, progress)
    assert set(Path(job.graph).parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    assert caught.value.log in (log, None)
    return str(caught.value)


@pytest.mark.parametrize("capabilities", [(86, 89, 120), (89,)])
def test_a_plan_is_written_and_the_phases_are_told(work: Path, log: Path, capabilities: tuple[int, ...]) -> None:
    told = []
    report = build_engine(_job(_graph(work, _scores()), capabilities), log, lambda *news: told.append(news))
    assert sorted(file.name for file in work.iterdir()) == ["small.engine", "small.onnx", "w.bin"]
    assert report.plan_bytes == (work / "small.engine").stat().st_size > D * D * 2
    assert report.plugin_layers == 0
    assert report.layers >= 3
    assert 50e6 < report.peak_bytes < engine_process.memory_needed(0)
    phases = list(dict.fromkeys(phase for phase, _ in told))
    assert phases == ["small: starting", "small: parsing", "small: building", "small: serializing"]
    shares = [share for phase, share in told if phase == "small: building"]
    assert shares == sorted(shares)
    assert shares[-1] > 0.5
    assert "[VERBOSE]" in log.read_text()


@pytest.mark.parametrize(("layout", "wanted"), [("step", True), ("loop", False)])
def test_engines_whose_runs_are_captured_take_memory_from_who_runs_them(work: Path, layout: str, wanted: bool) -> None:
    trt = trt_bindings.load("rtx")
    job = _job(_graph(work, _scores()), layout=layout)
    config = engine._Build(job, trt, lambda told: None)._config({})
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION) == wanted


def test_a_node_that_cannot_be_parsed_is_named(work: Path, log: Path) -> None:
    nodes = [*_scores()[:2], helper.make_node("Nonsense", ["q", "columns"], ["y"], name="the_odd_one")]
    message = refused(_job(_graph(work, nodes)), log)
    assert message.startswith("small.onnx: TensorRT cannot parse node 'the_odd_one' (Nonsense): ")
    assert message.endswith(f"its log: {log}")


def test_borders_of_another_type_are_refused(work: Path, log: Path) -> None:
    message = refused(_job(_graph(work, _scores(), output=TensorProto.FLOAT)), log)
    assert "TensorRT took 'y' as HALF, the graph declares it as FLOAT" in message
    assert "'y' is of ONNX type 11" in refused(_job(_graph(work, _scores(), output=TensorProto.DOUBLE)), log)


def test_a_build_that_gives_nothing_says_what_tensorrt_said(work: Path, log: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "past"], ["sum"]), helper.make_node("MatMul", ["sum", "w"], ["y"])]
    apart: Any = ({"chunk": (2, 2, 4), "context": (8, 8, 16)},)
    message = refused(_job(_graph(work, nodes), profiles=apart), log)
    assert "TensorRT built nothing: " in message
    assert "it said no reason" not in message


def test_a_step_that_reads_an_input_on_the_host_is_refused(work: Path, log: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Expand", ["x", "sizes"], ["y"])],
        "small",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, D]),
            helper.make_tensor_value_info("sizes", TensorProto.INT64, [2]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["chunk", D])],
    )
    path = work / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), str(path))
    assert "the value of 'sizes' decides shapes, so TensorRT would read it on the host" in refused(_job(path), log)
    # What is refused later on is not that.
    assert "no range is known for it" in refused(_job(path, layout="loop"), log)


def test_an_axis_without_a_range_is_refused(work: Path, log: Path) -> None:
    message = refused(_job(_graph(work, _scores()), profiles=({"chunk": (1, 1, 1)},)), log)
    assert "axis 'context' of 'past' has no range, expected one of chunk" in message


def _body(text: str) -> Any:
    return onnx.parser.parse_function(f'<domain: "mythos", opset_import: ["" : 23]> {text}')


def _with_plugin_node(folder: Path) -> Path:
    """A graph with a node of our domain that no plugin serves, and a body that TensorRT uses in its place."""
    nodes = _scores()
    nodes[0] = helper.make_node("MatMul", ["x", "w"], ["plain"])
    nodes.insert(1, helper.make_node("Foreign", ["plain"], ["q"], domain="mythos", plugin_namespace="mythos"))
    return _graph(folder, nodes, functions=[_body("Foreign (a) => (b) { b = Relu (a) }")])


def test_a_plugin_that_is_missing_fails_the_build_with_the_counts(work: Path, log: Path) -> None:
    message = refused(_job(_with_plugin_node(work), plugins=1), log)
    assert "TensorRT made 0 plugin layers of 1 plugin nodes" in message


def test_an_abort_of_native_code_is_one_line(work: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without what the bindings ask for, TensorRT for RTX aborts at the first node that may be a plugin.
    monkeypatch.setattr(trt_bindings, "library_path_for_plugins", lambda trt: {})
    nodes = _scores()
    nodes[0] = helper.make_node(
        "SparseMoE", ["x", "w", "w", "w", "w"], ["q"], domain="mythos", top_k=1, plugin_namespace="mythos"
    )
    message = refused(_job(_graph(work, nodes), plugins=1), log)
    assert message.startswith("small.onnx: TensorRT's builder was killed by SIGABRT")
    assert str(log) in message


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that a test started."""
    processes = []

    class Watched(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            processes.append(self)

    monkeypatch.setattr(engine_process.subprocess, "Popen", Watched)
    return processes


def test_a_builder_that_runs_out_of_memory_is_one_line(
    work: Path, log: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    def kill(phase: str, fraction: float) -> None:
        if phase == "small: building":
            started[0].kill()

    message = refused(_job(_graph(work, _scores())), log, kill)
    assert "killed by SIGKILL, as the system does when memory runs out" in message


def test_an_interrupt_ends_the_builder_and_leaves_nothing(
    work: Path, log: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    def interrupt(phase: str, fraction: float) -> None:
        if phase == "small: building":
            raise KeyboardInterrupt

    graph = _graph(work, _scores())
    with pytest.raises(KeyboardInterrupt):
        build_engine(_job(graph), log, interrupt)
    assert started[0].poll() is not None
    assert sorted(file.name for file in work.iterdir()) == ["small.onnx", "w.bin"]


def test_too_little_memory_is_refused_before_a_process_starts(
    work: Path, log: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = _graph(work, _scores())
    assert weight_bytes(graph) == D * D * 2 + graph.stat().st_size
    monkeypatch.setattr(engine_process, "free_memory_bytes", lambda: 100_000_000)
    message = refused(_job(graph), log)
    assert message.startswith("building small needs about 0.4 GB of memory, 0.1 GB are free: ")
    assert not started
    monkeypatch.setattr(engine_process, "free_memory_bytes", lambda: None)
    assert build_engine(_job(graph), log).plan_bytes


def test_a_place_that_cannot_be_written_is_one_line(work: Path, log: Path) -> None:
    graph = _graph(work, _scores())
    job = _job(graph)
    elsewhere = EngineJob(**{**vars(job), "plan": str(work / "absent" / "small.engine")})
    assert "No such file or directory" in refused(elsewhere, log)


def test_an_error_of_the_disk_without_a_file_names_none(work: Path) -> None:
    program = (
        "import errno\n"
        "from mythos_edge.exporter import engine\n"
        "def run(self, report): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "engine.EngineJob.run = run\n"
        "raise SystemExit(engine.main())\n"
    )
    job = json.dumps(vars(_job(work / "small.onnx")))
    made = subprocess.run([sys.executable, "-c", program, job], capture_output=True, text=True, check=False)
    assert (made.returncode, json.loads(made.stdout)) == (1, {"error": "No space left on device"})
