"""TensorRT targets in a bundle: names, refusals, whole or not at all. Graphs are stand-ins without plugins."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from fakes.driver import FakeDriver
from onnx import TensorProto, helper

from mythos_edge.exporter import engine_process
from mythos_edge.exporter.lowering.tensorrt import EngineOptions, LoweredForTensorRT
from mythos_edge.exporter.targets import build as build_module
from mythos_edge.exporter.targets import engine_files
from mythos_edge.exporter.targets.build import Built
from mythos_edge.exporter.targets.gpus import Gpus
from mythos_edge.exporter.targets.table import target_from
from mythos_edge.exporter.targets.tensorrt import TensorRTTarget
from mythos_edge.model import bundle_writer
from mythos_edge.model.bundle import Bundle, open_bundle, verify_hashes
from mythos_edge.model.errors import BackendUnavailable, BuildError, BundleError, ExportError
from mythos_edge.model.target_options import EngineSpec, Profile, options_of
from mythos_edge.plugins import trt_bindings
from mythos_edge.plugins.cuda_driver import Driver

pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "demo.bundle"))


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where logs of failed builds go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def lower(
    bundle: Bundle, folder: Path, options: EngineOptions, progress: Callable[[str, float], None]
) -> LoweredForTensorRT:
    """Three graphs that double their input."""
    graphs = {stage: _doubling(folder / f"{stage}.onnx", "Add") for stage in ("prelude", "step", "coda")}
    return LoweredForTensorRT(graphs, dict.fromkeys(graphs, 0), fixed_bytes=10, step_bytes=20)


def lower_badly(
    bundle: Bundle, folder: Path, options: EngineOptions, progress: Callable[[str, float], None]
) -> LoweredForTensorRT:
    """The same, with a coda that TensorRT cannot parse."""
    lowered = lower(bundle, folder, options, progress)
    _doubling(lowered.graphs["coda"], "Nonsense")
    return lowered


def _doubling(path: Path, operator: str) -> Path:
    rows = [1, "chunk", 8]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "x"], ["y"])],
        path.stem,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, rows)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, rows)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), str(path))
    return path


def _silent(phase: str, fraction: float) -> None:
    del phase, fraction


def build(
    path: Path, wish: str = "rtx-sm89", progress: Callable[[str, float], None] = _silent, **options: Any
) -> Built:
    return build_module.build(path, target_from(wish, options), progress)


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_files, "lower_for_tensorrt", lower)


def test_engines_are_added_and_the_rest_stays(bundle: Path, logs: Path) -> None:
    before = files_of(bundle)
    built = build(bundle, "rtx-sm89+sm86", dtype="bf16", max_context=100, max_rows=16)
    name = "rtx-sm86+sm89-bf16"
    assert built.name == name
    assert built.bundle == open_bundle(bundle)
    verify_hashes(built.bundle)
    target = built.bundle.manifest.targets[name]
    assert target.graphs == {stage: f"{stage}.{name}.engine" for stage in ("prelude", "step", "coda")}
    assert (target.compute_dtype, target.fixed_bytes, target.step_bytes) == ("bf16", 10, 20)
    assert set(target.weights.values()) == {"bf16"}
    engine = options_of(target, EngineSpec)
    assert (engine.flavour, engine.compute_capabilities, engine.device) == ("rtx", (86, 89), "")
    assert engine.layout == "step"
    assert (engine.max_context, engine.max_rows, engine.profiles) == (100, 16, (Profile(1, 1), Profile(16, 16)))
    assert engine.plugin_layers == dict.fromkeys(target.graphs, 0)
    assert engine.version == built.reports["step"]["version"]
    after = files_of(bundle)
    assert set(after) == set(built.bundle.manifest.files) | {"manifest.json"}
    assert set(after) - set(before) == {*target.graphs.values(), f"build.{name}.log"}
    assert all(after[file] == content for file, content in before.items() if file != "manifest.json")
    assert b"== coda.onnx" in after[f"build.{name}.log"]
    assert not list(logs.iterdir())
    modes = {(bundle / file).stat().st_mode for file in (*target.graphs.values(), f"build.{name}.log", "manifest.json")}
    assert len(modes) == 1
    assert build(bundle, "rtx-sm86+sm89", dtype="bf16", max_rows=1).bundle.manifest.targets[name] != target


@pytest.mark.parametrize("file", ["coda.rtx-sm89-fp16.engine", "build.rtx-sm89-fp16.log"])
def test_a_damaged_engine_is_built_again(bundle: Path, file: str) -> None:
    name = build(bundle).name
    os.truncate(bundle / file, 10)
    with pytest.raises(BundleError, match=rf"{file}: has 10 bytes, .*: build the target again"):
        open_bundle(bundle).target(name)
    verify_hashes(build(bundle).bundle)


def test_a_build_that_fails_leaves_the_bundle_as_it_was_and_its_log(
    bundle: Path, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(bundle)
    monkeypatch.setattr(engine_files, "lower_for_tensorrt", lower_badly)
    with pytest.raises(BuildError, match=r"coda\.onnx: TensorRT cannot parse") as caught:
        build(bundle)
    assert files_of(bundle) == before
    assert not list(bundle.glob(".*"))
    assert caught.value.log is not None
    assert caught.value.log.parent == logs
    assert "Nonsense" in caught.value.log.read_text()


@pytest.mark.parametrize("phase", ["prelude: parsing", "coda: building"])
def test_an_interrupted_build_leaves_the_bundle_as_it_was(bundle: Path, logs: Path, phase: str) -> None:
    def interrupt(told: str, fraction: float) -> None:
        if told == phase:
            raise KeyboardInterrupt

    before = files_of(bundle)
    with pytest.raises(KeyboardInterrupt):
        build(bundle, progress=interrupt)
    assert files_of(bundle) == before
    assert not list(bundle.glob(".*"))
    assert not list(logs.iterdir())


def test_a_build_over_another_that_is_interrupted_leaves_a_sound_bundle(
    bundle: Path, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build(bundle).bundle
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.startswith("prelude.rtx") and self.suffix == ".engine":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(bundle, max_rows=4)
    monkeypatch.undo()
    left = open_bundle(bundle)
    verify_hashes(left)
    assert left == before
    assert set(files_of(bundle)) == {*before.manifest.files, "manifest.json"}


@pytest.mark.parametrize(
    ("wish", "options", "message"),
    [
        (
            "rtx",
            {},
            "target is 'rtx', expected ort-cpu, ort-cuda, rtx-sm89 (or several GPUs, as in rtx-sm86+sm89), ",
        ),
        ("rtx-sm89+", {}, "target is 'rtx-sm89+'"),
        ("trt-sm87", {}, "target is 'trt-sm87'"),
        (
            "rtx-sm87",
            {},
            "sm87 is not among those TensorRT for RTX builds for (75 80 86 89 120 121): for Jetson Orin use "
            "trt-this-gpu there",
        ),
        ("rtx-sm89+sm90", {}, "sm90 is not among those TensorRT for RTX builds for (75 80 86 89 120 121): for Hopper"),
        ("rtx-sm88", {}, "sm88 is not among those TensorRT for RTX builds for (75 80 86 89 120 121)"),
        ("rtx-sm75", {"dtype": "bf16"}, "sm75 has no bf16, which begins with sm80"),
        ("rtx-sm75", {"dtype": "fp32"}, "sm75 has no fp32, which begins with sm80"),
        ("rtx-sm80+sm89", {"weights": "int4"}, "sm80 has no int4, which begins with sm86"),
        ("rtx-sm86+sm89", {"weights": "fp8"}, "sm86 has no fp8, which begins with sm89"),
        ("rtx-sm89", {"dtype": "fp64"}, "dtype is 'fp64', expected one of fp16, bf16, fp32"),
        ("rtx-sm89", {"layout": "many"}, "layout is 'many', expected one of step, loop"),
        ("rtx-sm89", {"weights": "fp32"}, "weights is 'fp32', expected one of none, int8, int4, fp8"),
        (
            "rtx-sm89",
            {"max_context": 257},
            "max_context is 257, expected 1 to 256, for which the bundle was exported: export with --max-context 257",
        ),
        ("rtx-sm89", {"max_context": 0}, "max_context is 0, expected 1 to 256"),
        ("rtx-sm89", {"max_rows": 0}, "max_rows is 0, expected 1 to max_context, which is 256"),
        ("rtx-sm89", {"max_rows": 9, "max_context": 8}, "max_rows is 9, expected 1 to max_context, which is 8"),
        ("rtx-sm89", {"max_rows": 8, "layout": "loop"}, "max_rows is for the step layout"),
    ],
)
def test_bad_wishes_are_refused_in_one_line(demo_bundle: Path, wish: str, options: Any, message: str) -> None:
    before = files_of(demo_bundle)
    with pytest.raises(BuildError) as caught:
        build(demo_bundle, wish, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_of(demo_bundle) == before


def test_too_little_memory_or_disk_is_refused_before_anything_is_built(
    bundle: Path, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(bundle)
    with monkeypatch.context() as patch:
        patch.setattr(engine_process, "free_memory_bytes", lambda: 100_000_000)
        with pytest.raises(BuildError, match=r"building prelude needs about 0\.4 GB of memory, 0\.1 GB are free"):
            build(bundle)
    usage = bundle_writer.shutil.disk_usage(bundle)
    monkeypatch.setattr(bundle_writer.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(ExportError, match=r"the bundle needs .* MB, 1 MB are free"):
        build(bundle)
    assert files_of(bundle) == before
    assert not list(logs.iterdir())


def test_names_say_what_is_computed(demo_bundle: Path) -> None:
    bundle, gpus = open_bundle(demo_bundle), Gpus("rtx", (86, 120))
    for target, name in (
        (TensorRTTarget(gpus), "rtx-sm86+sm120-fp16"),
        (TensorRTTarget(gpus, "bf16", "int4"), "rtx-sm86+sm120-bf16-int4"),
        (TensorRTTarget(gpus, layout="loop"), "rtx-sm86+sm120-fp16-loop"),
        (TensorRTTarget(Gpus("trt", (90,)), weights="int8"), "trt-sm90-fp16-int8"),
    ):
        assert target.name == name
        assert TensorRTTarget.from_name(name) == target
    assert TensorRTTarget(gpus, layout="loop", max_context=40).sizes(bundle) == (40, 40)
    assert TensorRTTarget(gpus).sizes(bundle)[1] == 64
    assert TensorRTTarget(gpus, max_context=20).sizes(bundle) == (20, 20)


def test_engines_for_the_gpu_of_this_machine_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDriver()
    monkeypatch.setattr(Driver, "load", lambda: fake)
    target = TensorRTTarget.from_wish("trt-this-gpu")
    assert target is not None
    assert target.gpus == Gpus("trt", (fake.compute_capability(0),), "Fake GPU 0")
    assert target.name == f"trt-sm{fake.compute_capability(0)}-fp16"


def test_the_device_is_recorded(bundle: Path, logs: Path) -> None:
    built = build_module.build(bundle, TensorRTTarget(Gpus("rtx", (89,), "Fake GPU 0")))
    assert options_of(built.bundle.manifest.targets[built.name], EngineSpec).device == "Fake GPU 0"


def test_a_machine_without_a_gpu_or_full_tensorrt_says_what_to_do(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> Any:
        raise BackendUnavailable("there is no NVIDIA driver", "nvidia-smi")

    monkeypatch.setattr(Driver, "load", absent)
    with pytest.raises(BackendUnavailable, match="no NVIDIA driver"):
        build(demo_bundle, "trt-this-gpu")
    monkeypatch.setattr(Driver, "load", FakeDriver)
    monkeypatch.setitem(trt_bindings.FLAVOURS, "trt", ("absent_tensorrt", "pip install absent"))
    with pytest.raises(BackendUnavailable, match="run `pip install absent`"):
        build(demo_bundle, "trt-this-gpu")
