"""A session on TensorRT engines, with a fake driver and engines that ONNX Runtime runs: the same tokens and depths."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_driver import FakeDriver
from fake_tensorrt import VERSION, FakeTensorRT, plan_of

from mythos_edge.exporter.trt_lowering import EngineOptions, lower_for_tensorrt
from mythos_edge.model.bundle import STAGES, EngineSpec, Profile, TargetSpec, open_bundle, record_of, update_manifest
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import BackendUnavailable, BundleError, CapacityError, MythosEdgeError, UsageError
from mythos_edge.model.layout import load_network
from mythos_edge.plugins import kernel_store, trt_bindings, trt_plugins
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.runtime import parity
from mythos_edge.runtime.backend import OrtBackend
from mythos_edge.runtime.session import Session
from mythos_edge.runtime.trt_backend import TrtBackend

FIXTURES = Path(__file__).parent.parent / "fixtures"
MAX_ROWS = 6
MAX_CONTEXT = 48
KERNELS = "ef" * 32
# float16 keeps 11 bits, and a few dozen operations lie between a token and its logits.
FP16_ERROR = 0.01


@pytest.fixture(scope="session")
def engine_bundle(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``engine_bundle(checkpoint, dtype)``: a bundle with the target ``rtx-sm89-<dtype>`` whose engines are fakes."""
    made: dict[tuple[Path, str], Path] = {}

    def build(checkpoint: Path, dtype: str) -> Path:
        if (checkpoint, dtype) not in made:
            path = tmp_path_factory.mktemp("engines") / "with.bundle"
            shutil.copytree(exported(checkpoint), path)
            _add_target(path, dtype)
            made[checkpoint, dtype] = path
        return made[checkpoint, dtype]

    return build


def _add_target(path: Path, dtype: str) -> None:
    bundle, name = open_bundle(path), f"rtx-sm89-{dtype}"
    graphs = path.with_suffix(".graphs")
    graphs.mkdir()
    lowered = lower_for_tensorrt(bundle, graphs, EngineOptions(dtype, "step", "none", MAX_CONTEXT, MAX_ROWS))
    records = {}
    for stage, graph in lowered.graphs.items():
        plan = path / f"{stage}.{name}.engine"
        plan.write_bytes(plan_of(graph, MAX_ROWS, MAX_CONTEXT))
        records[plan.name] = record_of(plan)
    spec = TargetSpec(
        graphs={stage: f"{stage}.{name}.engine" for stage in STAGES},
        compute_dtype=dtype,
        weights="none",
        block=0,
        method="none",
        kept=(),
        prepacked=False,
        fixed_bytes=lowered.fixed_bytes,
        step_bytes=lowered.step_bytes,
        bundle=bundle.manifest.identity,
        note="",
        engine=EngineSpec(
            flavour="rtx",
            version=VERSION,
            compute_capabilities=(89,),
            layout="step",
            max_context=MAX_CONTEXT,
            max_rows=MAX_ROWS,
            profiles=(Profile(1, 1), Profile(MAX_ROWS, MAX_ROWS)),
            plugin_layers=lowered.plugins,
            kernels=KERNELS,
        ),
    )
    files = {**bundle.manifest.files, **records}
    update_manifest(bundle, targets={**bundle.manifest.targets, name: spec}, files=files)


def _running_columns(
    driver: FakeDriver, grid: Any, halt_mass: int, threshold: int, count: int, columns: int, *_: Any
) -> None:
    mass, limit = driver.array(halt_mass, np.float32, (columns,)), driver.array(threshold, np.float32, ())
    below = np.flatnonzero(mass < limit)
    driver.array(count, np.int32, ())[...] = below[-1] + 1 if len(below) else 0


def _output_so_far(dtype: type) -> Callable[..., None]:
    def kernel(
        driver: FakeDriver,
        grid: tuple[int, ...],
        out: int,
        halt_mass: int,
        threshold: int,
        so_far: int,
        dim: int,
        *_: Any,
    ) -> None:
        rows = grid[0]
        mass, limit = driver.array(halt_mass, np.float32, (rows,)), driver.array(threshold, np.float32, ())
        share = np.where((mass > 0) & (mass < limit), mass, np.float32(1))[:, None]
        made = driver.array(out, dtype, (rows, dim)).astype(np.float32) / share
        driver.array(so_far, dtype, (rows, dim))[...] = made

    return kernel


_KERNELS = {
    "running_columns": _running_columns,
    "output_so_far_fp32": _output_so_far(np.float32),
    "output_so_far_fp16": _output_so_far(np.float16),
}


def _kernel(name: str, compute_capability: int) -> SimpleNamespace:
    """A compiled kernel in which the fake driver finds one of those above."""
    assert compute_capability == 89
    return SimpleNamespace(
        name=name,
        entry=name,
        cubin=name.encode(),
        threads=128,
        shared_bytes=0,
        hidden_pointers=2,
        sha256=f"sha256 of {name}",
    )


@pytest.fixture(params=[False, True], ids=["at once", "delayed"])
def driver(request: pytest.FixtureRequest) -> FakeDriver:
    made = FakeDriver(delayed=request.param)
    made.kernels = _KERNELS
    return made


@pytest.fixture
def trt(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT(driver)
    monkeypatch.setattr(trt_bindings, "load", lambda flavour: fake)
    monkeypatch.setattr(trt_bindings, "logger", lambda trt: None)
    monkeypatch.setattr(trt_bindings, "messages", lambda trt: fake.messages)
    monkeypatch.setattr(trt_plugins, "register", lambda trt: None)
    monkeypatch.setattr(kernel_store, "kernel", _kernel)
    monkeypatch.setattr(kernel_store, "manifest_sha256", lambda: KERNELS)
    return fake


def _session(path: Path, dtype: str, driver: FakeDriver, **options: Any) -> Session:
    bundle = open_bundle(path)
    return Session(bundle, TrtBackend(bundle, f"rtx-sm89-{dtype}", driver=driver, **options))


def _opened(path: Path, driver: FakeDriver, **options: Any) -> TrtBackend:
    return TrtBackend(open_bundle(path), "rtx-sm89-fp32", driver=driver, **options)


@pytest.fixture
def engines(engine_bundle: Callable[..., Path]) -> Path:
    return engine_bundle(FIXTURES / "mla-small", "fp32")


@pytest.fixture
def own_engines(engines: Path, tmp_path: Path) -> Path:
    """A copy to be changed at will."""
    path = tmp_path / "own.bundle"
    shutil.copytree(engines, path, ignore=shutil.ignore_patterns("cache"))
    return path


def _prompt(session: Session, count: int) -> list[int]:
    return np.random.default_rng(3).integers(0, session.config.vocab_size, count).tolist()


def _in_float16(checkpoint: Path, golden: dict[str, np.ndarray]) -> np.ndarray:
    """The logits of the eager network in float16: weights of 1e-9 that some positions live on are lost to both."""
    with open_checkpoint(checkpoint) as opened, torch.no_grad():
        network = load_network(opened, dtype=torch.float16)
        logits = network(torch.from_numpy(golden["ids"]), max_depth=int(golden["n_loops"])).logits
    return logits.float().numpy()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_scores_are_those_of_the_reference(
    dtype: str,
    golden_name: str,
    golden: dict[str, np.ndarray],
    engine_bundle: Callable[..., Path],
    trt: FakeTensorRT,
    driver: FakeDriver,
) -> None:
    """Latent attention by its plugin (in float32) and in place (in float16), grouped-query attention likewise."""
    path = engine_bundle(FIXTURES / golden_name, dtype)
    # More than the engines take at once, and one at a time.
    with _session(path, dtype, driver) as session:
        for prefill in (None, int(golden["prefill"])):
            score = session.score(golden["ids"], prefill=prefill, max_depth=int(golden["n_loops"]))
            if dtype == "fp32":
                allowed = parity.NOISE_FACTOR * golden["upstream_fp32_error"].max()
                assert np.abs(score.logits - golden["logits"]).max() <= allowed
                assert (score.depth == golden["depth"]).all()
            else:
                wanted = _in_float16(FIXTURES / golden_name, golden)
                error = np.linalg.norm(score.logits - wanted, axis=-1) / np.linalg.norm(golden["logits"], axis=-1)
                assert np.median(error) < FP16_ERROR
    assert driver.live_bytes == 0


@pytest.mark.parametrize("policy", ["exact", "full", "last"])
def test_tokens_are_those_of_the_host(policy: str, engines: Path, trt: FakeTensorRT, driver: FakeDriver) -> None:
    with Session.open(engines) as host, _session(engines, "fp32", driver) as session:
        options: dict[str, Any] = {"max_new_tokens": 14, "policy": policy}
        wanted, made = (one.generate(_prompt(host, 11), **options) for one in (host, session))
        assert (made.ids, made.depths) == (wanted.ids, wanted.depths)
        # Reading the flag one step late costs a step at most for each token, and the prompt's.
        late = policy == "exact"
        assert 0 <= made.block_calls - wanted.block_calls <= late * (len(made.ids) + 1)
        assert "launch_graph" in driver.calls
        assert session.backend.uses_graphs


def test_drafts_and_batches_are_those_of_the_host(engines: Path, trt: FakeTensorRT, driver: FakeDriver) -> None:
    with Session.open(engines) as host, _session(engines, "fp32", driver) as session:
        drafts: dict[str, Any] = {"max_new_tokens": 12, "draft_depth": 1, "draft_tokens": 3}
        wanted, made = (one.generate(_prompt(host, 9), **drafts) for one in (host, session))
        assert (made.ids, made.depths) == (wanted.ids, wanted.depths)
        assert made.drafted > 0
        prompts = [_prompt(host, 3), _prompt(host, 8)]
        wanted_all, made_all = (one.generate(prompts, max_new_tokens=5) for one in (host, session))
        assert [one.ids for one in made_all] == [one.ids for one in wanted_all]


def test_a_saved_sequence_goes_on(engines: Path, trt: FakeTensorRT, driver: FakeDriver, tmp_path: Path) -> None:
    with _session(engines, "fp32", driver) as session:
        whole = session.generate(_prompt(session, 5), max_new_tokens=8).ids
        first = session.generate(_prompt(session, 5), max_new_tokens=4).ids
        session.save(tmp_path / "saved.npz")
    with _session(engines, "fp32", driver) as session:
        session.restore(tmp_path / "saved.npz")
        assert first + session.generate([], resume=True, max_new_tokens=4).ids == whole


def test_nothing_is_waited_for_between_the_steps_of_a_token(
    engines: Path, trt: FakeTensorRT, driver: FakeDriver
) -> None:
    with _session(engines, "fp32", driver) as session:
        session.generate(_prompt(session, 4), max_new_tokens=6, policy="full")
        driver.calls.clear()
        made = session.generate([], resume=True, max_new_tokens=5, policy="full")
        # Logits and depth of each token, and no more.
        assert driver.calls.count("synchronize") == 2 * len(made.ids)
        assert driver.calls.count("wait") == 0
        assert driver.calls.count("copy_to_host") == 2 * len(made.ids)
        session.generate(_prompt(session, 4), max_new_tokens=6)
        driver.calls.clear()
        made = session.generate([], resume=True, max_new_tokens=5)
        assert 0 < driver.calls.count("wait") <= made.block_calls + len(made.ids)


@pytest.mark.parametrize("capturable", [True, False, None])
def test_runs_of_few_rows_become_graphs_where_tensorrt_allows_it(
    capturable: bool | None, engines: Path, trt: FakeTensorRT, driver: FakeDriver
) -> None:
    trt.capturable = capturable
    with Session.open(engines) as host, _session(engines, "fp32", driver) as session:
        made = session.generate(_prompt(session, 5), max_new_tokens=8)
        assert made.ids == host.generate(_prompt(host, 5), max_new_tokens=8).ids
        assert ("launch_graph" in driver.calls) == (capturable is not False)


def test_a_capture_that_fails_is_run_piece_by_piece(
    engines: Path, trt: FakeTensorRT, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(stream: int) -> int:
        del driver._captures[stream]
        raise MythosEdgeError("cuStreamEndCapture failed: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")

    monkeypatch.setattr(driver, "end_capture", fail)
    with Session.open(engines) as host, _session(engines, "fp32", driver) as session:
        made = session.generate(_prompt(session, 5), max_new_tokens=8)
        assert made.ids == host.generate(_prompt(host, 5), max_new_tokens=8).ids
        assert not session.backend.uses_graphs


def test_a_failing_engine_is_one_line_and_ends_the_sequence(
    engines: Path, trt: FakeTensorRT, driver: FakeDriver
) -> None:
    with _session(engines, "fp32", driver) as session:
        session.generate(_prompt(session, 5), max_new_tokens=2)
        trt.fails_at = trt.runs + 2
        with pytest.raises(MythosEdgeError, match=r"step\..*\.engine: TensorRT failed: kernel launch failed"):
            session.generate([1, 2, 3], resume=True, max_new_tokens=2)
        with pytest.raises(UsageError, match="was interrupted inside a loop step"):
            session.generate([1], resume=True, max_new_tokens=2)
        assert session.generate(_prompt(session, 5), max_new_tokens=2).ids


def test_code_for_the_host_is_never_allowed(engines: Path, trt: FakeTensorRT, driver: FakeDriver) -> None:
    _opened(engines, driver).close()
    assert trt.host_code_allowed is False


def test_what_was_compiled_is_kept_in_the_bundle(own_engines: Path, trt: FakeTensorRT, driver: FakeDriver) -> None:
    _opened(own_engines, driver).close()
    kept = sorted(path.name for path in (own_engines / "cache").iterdir())
    assert kept == [f"rtx-sm89-fp32.{stage}.sm89.{VERSION}.bin" for stage in sorted(STAGES)]
    _opened(own_engines, driver).close()
    assert [engine.runtime_cache.read for engine in trt.engines] == [None] * 3 + [b"compiled"] * 3


def test_an_engine_of_another_machine_is_refused(engines: Path, trt: FakeTensorRT) -> None:
    with pytest.raises(BundleError, match=r"was built for sm89, this GPU \(Fake GPU 0\) is sm86: build it again"):
        _opened(engines, FakeDriver([86]))
    with pytest.raises(BackendUnavailable, match="device is 1, expected less than 1"):
        _opened(engines, FakeDriver(), device=1)
    assert not trt.engines


def test_an_engine_of_another_tensorrt_is_refused(engines: Path, trt: FakeTensorRT, driver: FakeDriver) -> None:
    trt.__version__ = "9.9.9"
    with pytest.raises(BundleError, match=f"was built by TensorRT {VERSION}, here is 9.9.9: build it again"):
        _opened(engines, driver)
    assert not trt.engines


def test_an_engine_with_other_kernels_is_refused(
    engines: Path, trt: FakeTensorRT, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_store, "manifest_sha256", lambda: "ab" * 32)
    with pytest.raises(BundleError, match="carries kernels of another mythos-edge: build it again"):
        _opened(engines, driver)
    assert not trt.engines


def test_an_engine_that_the_manifest_does_not_list_is_refused_unless_trusted(
    own_engines: Path, trt: FakeTensorRT, driver: FakeDriver
) -> None:
    file = own_engines / "step.rtx-sm89-fp32.engine"
    job = json.loads(file.read_bytes())
    file.write_bytes(json.dumps(job | {"max_rows": job["max_rows"] + 1}).encode())
    with pytest.raises(BundleError, match=r"is not the engine the manifest lists .* or pass --trust"):
        _opened(own_engines, driver)
    assert len(trt.engines) == 1  # the prelude's
    _opened(own_engines, driver, trust=True).close()
    assert trt.engines[-2].max_rows == job["max_rows"] + 1
    # One of another size is found before that.
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(BundleError, match="bytes, the manifest says"):
        open_bundle(own_engines)
    assert open_bundle(own_engines, trust_engines=True)


def test_a_damaged_engine_is_one_line(own_engines: Path, trt: FakeTensorRT, driver: FakeDriver) -> None:
    file = own_engines / "coda.rtx-sm89-fp32.engine"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(BundleError, match=r"coda\..*engine: TensorRT can not load it: the plan is no plan"):
        _opened(own_engines, driver, trust=True)


def test_a_context_the_engines_were_not_built_for_is_refused(
    engines: Path, trt: FakeTensorRT, driver: FakeDriver
) -> None:
    with _session(engines, "fp32", driver) as session:
        with pytest.raises(CapacityError, match=f"the prompt has {MAX_CONTEXT + 1} tokens"):
            session.generate(_prompt(session, MAX_CONTEXT + 1))
        made = session.generate(_prompt(session, MAX_CONTEXT - 3), max_new_tokens=20)
        assert made.finish_reason == "context"


def test_a_gpu_without_room_is_one_line(engines: Path, trt: FakeTensorRT) -> None:
    driver = FakeDriver(total_bytes=120_000)
    driver.kernels = _KERNELS
    trt.driver = driver
    with (
        pytest.raises(CapacityError, match=r"GPU memory are needed|the caches of"),
        _session(engines, "fp32", driver) as session,
    ):
        session.generate(_prompt(session, 30), max_new_tokens=10)


def test_a_target_for_tensorrt_is_not_taken_for_one_of_onnxruntime(engines: Path) -> None:
    with pytest.raises(UsageError, match="target 'rtx-sm89-fp32' is TensorRT's"):
        OrtBackend(open_bundle(engines), "rtx-sm89-fp32")


def test_without_a_driver_it_says_so(engines: Path, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise BackendUnavailable("no NVIDIA driver", "nvidia-smi")

    monkeypatch.setattr(Driver, "load", none)
    with pytest.raises(BackendUnavailable, match="no NVIDIA driver"):
        Session.open(engines, target="rtx-sm89-fp32")
