"""ONNX Runtime's GPU providers on a fake GPU: the host's tokens and depths, or one line that says why not.

The graphs run on the CPU's kernels; see ``fakes.onnxruntime`` for what is as strict as ONNX Runtime.
"""

import gc
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from built import build_cuda
from fakes.driver import FakeDriver
from fakes.onnxruntime import FakeOnnxruntime, Part

from mythos_edge.exporter.targets.ort_cuda import OrtCudaTarget
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.bundle_writer import update_manifest
from mythos_edge.model.errors import BackendUnavailable, BundleError, CapacityError, MythosEdgeError, UsageError
from mythos_edge.model.families.table import config_of
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.runtime import parity
from mythos_edge.runtime.backends.ort_cpu import OrtCpuBackend
from mythos_edge.runtime.backends.ort_cuda import CUDA_PROVIDER, OrtCudaBackend, gpu_session
from mythos_edge.runtime.backends.ort_session import BoundGraph, import_onnxruntime
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import cli

CUDA = "ort-cuda-fp32"
PROMPT = [90, 90, 91, 15]


def random_prompt(session: Session, count: int) -> list[int]:
    return np.random.default_rng(3).integers(0, config_of(session.bundle.manifest).vocab_size, count).tolist()


@pytest.mark.parametrize("policy", ["exact", "full", "last"])
def test_tokens_are_those_of_the_host(policy: str, targets: Path, installed: Callable[..., FakeOnnxruntime]) -> None:
    installed()
    with Session.open(targets) as host, Session.open(targets, target=CUDA) as session:
        # The caches grow beyond their first columns.
        options: dict[str, Any] = {"max_new_tokens": 9, "policy": policy}
        for count in (11, 70):
            wanted, made = (one.generate(random_prompt(host, count), **options) for one in (host, session))
            assert (made.ids, made.depths) == (wanted.ids, wanted.depths)
            more = [one.generate(random_prompt(host, 60), resume=True, **options).ids for one in (host, session)]
            assert more[0] == more[1]


@pytest.mark.parametrize(("dtype", "weights"), [("fp32", "none"), ("fp16", "none"), ("fp16", "int8")])
def test_validate_compares_with_fp32(
    dtype: str, weights: str, demo_bundle: Path, tmp_path: Path, installed: Callable[..., FakeOnnxruntime]
) -> None:
    """The quality gate reads states from the GPU, and asks what the router makes of them on the CPU."""
    installed()
    path = Path(shutil.copytree(demo_bundle, tmp_path / "demo.bundle"))
    build_cuda(path, dtype=dtype, weights=weights)
    name = OrtCudaTarget(dtype, weights).name
    assert cli.main(["validate", str(path), "--against", "fp32", "--target", name, "--demo-streams", "2"]) == 0


def test_scores_are_those_of_the_reference(
    golden_targets: Path, golden: dict[str, np.ndarray], installed: Callable[..., FakeOnnxruntime]
) -> None:
    """Both attentions, in one chunk and one position at a time."""
    installed()
    allowed = parity.NOISE_FACTOR * golden["upstream_fp32_error"].max()
    with Session.open(golden_targets, target=CUDA) as session:
        for prefill in (None, int(golden["prefill"])):
            score = session.score(golden["ids"], prefill=prefill, max_depth=int(golden["n_loops"]))
            assert np.abs(score.logits - golden["logits"]).max() <= allowed
            assert (score.depth == golden["depth"]).all()


def test_several_sequences_share_runs_as_on_the_host(targets: Path, installed: Callable[..., FakeOnnxruntime]) -> None:
    fake = installed()
    with Session.open(targets) as host, Session.open(targets, target=CUDA) as session:
        prompts = [random_prompt(host, count) for count in (3, 8, 1, 12)]
        wanted, made = (one.generate(prompts, max_new_tokens=6, policy="full") for one in (host, session))
        assert [one.ids for one in made] == [one.ids for one in wanted]
        fake.ran.clear()
        wanted, made = (one.generate(prompts, max_new_tokens=6) for one in (host, session))
        assert [(one.ids, one.depths) for one in made] == [(one.ids, one.depths) for one in wanted]
        steps = [name for name in fake.ran if name.startswith("step.")]
        shared = [name for name in steps if name.endswith(".many.onnx")]
        # Whoever runs alone takes one for each call.
        assert shared
        assert len(steps) < sum(one.block_calls for one in made)


def test_drafts_are_those_of_the_host(targets: Path, installed: Callable[..., FakeOnnxruntime]) -> None:
    installed()
    options: dict[str, Any] = {"max_new_tokens": 12, "draft_depth": 1, "draft_tokens": 3}
    with Session.open(targets) as host, Session.open(targets, target=CUDA) as session:
        wanted, made = (one.generate(random_prompt(host, 9), **options) for one in (host, session))
        assert (made.ids, made.depths) == (wanted.ids, wanted.depths)
        assert made.drafted > 0


def test_a_saved_sequence_goes_on_here_and_on_the_host(
    targets: Path, installed: Callable[..., FakeOnnxruntime], tmp_path: Path
) -> None:
    installed()
    with Session.open(targets, target=CUDA) as session:
        whole = session.generate(random_prompt(session, 5), max_new_tokens=8).ids
        first = session.generate(random_prompt(session, 5), max_new_tokens=4).ids
        session.save(tmp_path / "saved.npz")
    for one in (CUDA, None):
        with Session.open(targets, target=one) as session:
            session.restore(tmp_path / "saved.npz")
            assert first + session.generate([], resume=True, max_new_tokens=4).ids == whole


def test_nothing_is_waited_for_between_the_steps_of_a_token(
    bundle: Path, installed: Callable[..., FakeOnnxruntime], driver: FakeDriver
) -> None:
    installed()
    with Session.open(bundle, target=CUDA) as session:
        session.generate(PROMPT, max_new_tokens=6, policy="full", stop_ids=())
        driver.calls.clear()
        made = session.generate([], resume=True, max_new_tokens=5, policy="full", stop_ids=())
        # Logits and depth of each token, and no more.
        assert driver.calls.count("synchronize") == 2 * len(made.ids)
        assert driver.calls.count("copy_to_host") == 2 * len(made.ids)
        assert driver.calls.count("wait") == 0
        assert "copy from memory that is not pinned" not in driver.calls
        session.generate(PROMPT, max_new_tokens=6, stop_ids=())
        driver.calls.clear()
        made = session.generate([], resume=True, max_new_tokens=5, stop_ids=())
        assert 0 < driver.calls.count("wait") <= made.block_calls + len(made.ids)


def test_columns_cost_what_is_asked_for(
    bundle: Path, installed: Callable[..., FakeOnnxruntime], driver: FakeDriver
) -> None:
    installed()
    with Session.open(bundle, target=CUDA) as session:
        assert session.plan(20).cache_bytes == session.plan(20).bytes_per_token * 20
        session.generate(PROMPT, max_new_tokens=6, stop_ids=())
        driver.total_bytes = driver.device_memory.live_bytes + 10_000
        with pytest.raises(CapacityError, match=r"the caches of 1 x 204 tokens need .* are free"):
            session.generate(PROMPT * 50, max_new_tokens=4)
        driver.total_bytes = 1 << 30


def test_another_thread_may_go_on(bundle: Path, installed: Callable[..., FakeOnnxruntime]) -> None:
    installed()
    with Session.open(bundle, target=CUDA) as session, ThreadPoolExecutor(1) as thread:
        here = session.generate(PROMPT, max_new_tokens=4)
        assert thread.submit(session.generate, PROMPT, max_new_tokens=4).result().ids == here.ids


def test_what_sessions_are_told(targets: Path, installed: Callable[..., FakeOnnxruntime], driver: FakeDriver) -> None:
    fake = installed()
    with Session.open(targets, target=CUDA) as session:
        assert type(session.backend) is OrtCudaBackend
        shared = {
            "device_id": "0",
            "has_user_compute_stream": "1",
            "user_compute_stream": str(session.backend.memory.stream),
        }
    cuda = {CUDA_PROVIDER: shared | {"use_tf32": "0"}}
    assert fake.asked == [(cuda, "1")] * 3


def test_the_kind_decides_the_backend(
    bundle: Path, installed: Callable[..., FakeOnnxruntime], capsys: pytest.CaptureFixture[str]
) -> None:
    installed()
    with Session.open(bundle) as cpu:
        assert type(cpu.backend) is OrtCpuBackend
    opened = open_bundle(bundle)
    targets = opened.manifest.targets
    update_manifest(opened, targets={**targets, "ort-cpu": replace(targets[CUDA])})
    with Session.open(bundle) as gpu:
        assert type(gpu.backend) is OrtCudaBackend
    update_manifest(opened, targets={**targets, CUDA: replace(targets[CUDA], kind="tpu")})
    with pytest.raises(BundleError, match=f"'{CUDA}' is of kind 'tpu', expected one of ort-cpu, ort-cuda, tensorrt"):
        Session.open(bundle, target=CUDA)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"available": ("CPUExecutionProvider",)},
            r"is the build for CPUs .*: run `pip uninstall --yes onnxruntime && pip",
        ),
        ({"__version__": "1.27.2"}, r"onnxruntime-gpu is 1.27.2, expected 1.31 or newer.*run `pip install --upg"),
        ({"without": (CUDA_PROVIDER,)}, r"could not load its CUDAExec.*: .*No such file.*run `pip install"),
        (
            {
                "parts": (
                    Part(CUDA_PROVIDER, ["Gemm"]),
                    Part("CPUExecutionProvider", ["on_shapes/Squeeze", "QMoE", "Gather", "x/Concat"]),
                )
            },
            r"(step|prelude).*onnxruntime-gpu 1.31.1 has no CUDA kernel for Concat, Gather, QMoE, and",
        ),
        (
            {"parts": (Part("CPUExecutionProvider", ["on_shapes/Squeeze"]),)},
            "CUDAExecutionProvider takes no node of it",
        ),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    targets: Path, installed: Callable[..., FakeOnnxruntime], options: dict[str, Any], message: str
) -> None:
    installed(**options)
    with pytest.raises(BackendUnavailable, match=message) as caught:
        Session.open(targets, target=CUDA)
    assert "\n" not in str(caught.value)


def test_a_gpu_without_kernels_and_no_gpu_are_one_line(
    bundle: Path, installed: Callable[..., FakeOnnxruntime], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = installed()
    opened = open_bundle(bundle)
    with pytest.raises(
        BackendUnavailable, match=r"this GPU \(Fake GPU 0\) is sm61, and there are kernels for sm75, sm"
    ):
        OrtCudaBackend(opened, CUDA, driver=FakeDriver([61]))
    with pytest.raises(BackendUnavailable, match="device is 1, expected less than 1"):
        OrtCudaBackend(opened, CUDA, device=1)

    def none() -> None:
        raise BackendUnavailable("no NVIDIA driver", "nvidia-smi")

    monkeypatch.setattr(Driver, "load", none)
    with pytest.raises(BackendUnavailable, match="no NVIDIA driver"):
        Session.open(bundle, target=CUDA)
    assert not fake.sessions


def test_a_failing_run_is_one_line_and_everything_is_given_back(
    bundle: Path, installed: Callable[..., FakeOnnxruntime]
) -> None:
    fake = installed()
    with Session.open(bundle, target=CUDA) as session:
        session.generate(PROMPT, max_new_tokens=2)
        fake.fails_at = "step"
        with pytest.raises(
            MythosEdgeError, match=r"step\.ort-cuda-fp32\.onnx: ONNX Runtime failed: an illegal address"
        ):
            session.generate(PROMPT, max_new_tokens=2)


def test_the_first_error_is_told_when_the_driver_then_refuses_everything(
    bundle: Path, installed: Callable[..., FakeOnnxruntime], driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(stream: int) -> None:
        raise MythosEdgeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    fake = installed()
    with Session.open(bundle, target=CUDA) as session:
        session.generate(PROMPT, max_new_tokens=2)
        fake.fails_at = "step"
        with monkeypatch.context() as patch:
            patch.setattr(driver, "synchronize", broken)
            with pytest.raises(MythosEdgeError, match=r"step\.ort-cuda-fp32\.onnx: ONNX Runtime failed: an illegal"):
                session.generate(PROMPT, max_new_tokens=2)


def test_memory_that_is_kept_is_there_for_onnxruntime(
    bundle: Path, installed: Callable[..., FakeOnnxruntime], driver: FakeDriver
) -> None:
    fake = installed()
    with Session.open(bundle, target=CUDA) as session:
        wanted = session.generate(PROMPT * 10, max_new_tokens=3, stop_ids=()).ids
        more = session.generate([], resume=True, max_new_tokens=60, stop_ids=()).ids
        session.generate(PROMPT, max_new_tokens=1, stop_ids=())
        # No more than what larger caches have left behind.
        fake.scratch_bytes = 100_000
        driver.total_bytes = driver.device_memory.live_bytes + fake.scratch_bytes // 2
        assert session.generate(PROMPT * 10, max_new_tokens=3, stop_ids=()).ids == wanted
        assert session.generate([], resume=True, max_new_tokens=60, stop_ids=()).ids == more
        driver.total_bytes = 1 << 30


def test_an_interrupted_call_leaves_nothing_stale(
    bundle: Path, installed: Callable[..., FakeOnnxruntime], driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C right after what the host decides was sent to the device."""
    installed()
    copy, left = driver.copy_to_device, 0

    def interrupting(*arguments: int) -> None:
        nonlocal left
        copy(*arguments)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(driver, "copy_to_device", interrupting)
    with Session.open(bundle, target=CUDA) as session:
        # One token, so that the next request sends arrays of the shapes that are there already.
        wanted = session.generate(PROMPT, max_new_tokens=1).ids
        for number in range(1, 5):
            left = number
            with pytest.raises(KeyboardInterrupt):
                session.generate(PROMPT[::-1], max_new_tokens=1)
            assert session.generate(PROMPT, max_new_tokens=1).ids == wanted


def test_an_interrupted_binding_is_bound_again() -> None:
    bound: dict[str, int] = {}
    interrupts = False

    def bind(name: str, *place: Any) -> None:
        bound[name] = place[-1]
        if interrupts:
            raise KeyboardInterrupt

    binding = SimpleNamespace(bind_input=bind, bind_output=bind)
    session = SimpleNamespace(io_binding=lambda: binding, run_with_iobinding=lambda binding, options: None)
    graph = BoundGraph(Path("step.onnx"), session)
    first, other, made = (np.zeros(1) for _ in range(3))
    graph.run({"x": first}, {"y": made})
    for feeds, outputs in (({"x": other}, {}), ({"x": first}, {"y": other})):
        interrupts = True
        with pytest.raises(KeyboardInterrupt):
            graph.run(feeds, outputs)
        interrupts = False
        graph.run({"x": first}, {"y": made})
        assert bound == {"x": first.ctypes.data, "y": made.ctypes.data}


def test_closing_gives_everything_back_once(
    bundle: Path, installed: Callable[..., FakeOnnxruntime], driver: FakeDriver
) -> None:
    fake = installed()
    session = Session.open(bundle, target=CUDA)
    session.generate(PROMPT, max_new_tokens=4)
    session.close()
    session.close()
    gc.collect()
    assert [one() for one in fake.sessions] == [None] * 3
    assert driver.live_bytes == 0
    assert not driver._streams
    assert not driver.modules


def test_after_an_error_of_cuda_the_first_is_told_and_the_rest_given_back(
    bundle: Path, installed: Callable[..., FakeOnnxruntime], driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in a kernel comes back from every call that waits."""
    installed()

    def broken(stream: int) -> None:
        raise MythosEdgeError("cuStreamSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS")

    session = Session.open(bundle, target=CUDA)
    session.generate(PROMPT, max_new_tokens=2)
    monkeypatch.setattr(driver, "synchronize", broken)
    with pytest.raises(UsageError, match="the first"), session:
        raise UsageError("the first")
    gc.collect()
    assert (driver.live_bytes, driver._streams, driver.modules) == (0, {}, {})
    assert not any(driver._retained.values())


def test_the_build_for_cpus_is_refused(bundle: Path) -> None:
    """With the onnxruntime that is really installed here."""
    if CUDA_PROVIDER in import_onnxruntime().get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    with pytest.raises(BackendUnavailable, match="onnxruntime-gpu"):
        gpu_session(bundle / "step.ort-cuda-fp32.onnx", {})


@pytest.mark.gpu
def test_parity_on_the_gpu(bundle: Path) -> None:
    if CUDA_PROVIDER not in import_onnxruntime().get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    with Session.open(bundle, target=CUDA) as gpu, Session.open(bundle) as cpu:
        wanted, found = (one.score([[90, 90, 91, 15, 3]], policy="full").logits for one in (cpu, gpu))
        assert abs(found - wanted).max() < 1e-3 * abs(wanted).max()
        options: dict[str, Any] = {"max_new_tokens": 9, "stop_ids": ()}
        wanted_ids, found_ids = (one.generate([PROMPT, PROMPT[:2]], **options) for one in (cpu, gpu))
        assert [one.ids for one in found_ids] == [one.ids for one in wanted_ids]
