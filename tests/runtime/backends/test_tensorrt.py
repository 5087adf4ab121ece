"""A session on TensorRT engines, with a fake driver and engines that ONNX Runtime runs: the same tokens and depths."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes.driver import FakeDriver
from fakes.tensorrt import VERSION, FakeTensorRT

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import BackendUnavailable, BundleError, CapacityError, MythosEdgeError, UsageError
from mythos_edge.model.families.table import config_of
from mythos_edge.model.layout import load_network
from mythos_edge.model.stages import STAGES
from mythos_edge.plugins import kernel_store
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.runtime import parity
from mythos_edge.runtime.backends.tensorrt import TrtBackend
from mythos_edge.runtime.halting import Depth
from mythos_edge.runtime.session import Session
from mythos_edge.runtime.staircase import Staircase
from mythos_edge.scripts import cli

FIXTURES = Path(__file__).parents[2] / "fixtures"
MAX_CONTEXT = 48
# float16 keeps 11 bits, and a few dozen operations lie between a token and its logits.
FP16_ERROR = 0.01


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
    return np.random.default_rng(3).integers(0, config_of(session.bundle.manifest).vocab_size, count).tolist()


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
        assert "copy from memory that is not pinned" not in driver.calls
        session.generate(_prompt(session, 4), max_new_tokens=6)
        driver.calls.clear()
        made = session.generate([], resume=True, max_new_tokens=5)
        assert 0 < driver.calls.count("wait") <= made.block_calls + len(made.ids)


def test_the_flag_is_read_one_step_late(engines: Path, trt: FakeTensorRT, driver: FakeDriver) -> None:
    with _opened(engines, driver) as backend:
        memory = backend.memory
        running, halted = (memory.from_host(np.full((1, 3), mass, np.float32)) for mass in (0.1, 0.9))
        late, prompt = (memory.watch(0.5, may_lag=lags) for lags in (True, False))
        said = [late(mass, begins=mass is running) for mass in (running, halted, halted)]
        assert said == [3, 3, 0]
        assert [prompt(mass, begins=mass is running) for mass in (running, halted)] == [3, 0]
        # A new chunk does not read what was said of the last.
        assert late(running, begins=True) == 3
        assert late(halted, begins=False) == 3


@pytest.mark.parametrize("capturable", [True, False, None])
def test_runs_of_few_rows_become_graphs_where_tensorrt_allows_it(
    capturable: bool | None, engines: Path, trt: FakeTensorRT, driver: FakeDriver
) -> None:
    trt.capturable = capturable
    with Session.open(engines) as host, _session(engines, "fp32", driver) as session:
        made = session.generate(_prompt(session, 5), max_new_tokens=8)
        assert made.ids == host.generate(_prompt(host, 5), max_new_tokens=8).ids
        assert ("launch_graph" in driver.calls) == session.backend.uses_graphs == (capturable is not False)


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


def test_another_thread_may_go_on(engines: Path, trt: FakeTensorRT, driver: FakeDriver) -> None:
    with _session(engines, "fp32", driver) as session, ThreadPoolExecutor(1) as thread:
        here = session.generate(_prompt(session, 3), max_new_tokens=4)
        assert thread.submit(session.generate, _prompt(session, 3), max_new_tokens=4).result().ids == here.ids


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


def _run_once(path: Path, driver: FakeDriver) -> None:
    with _session(path, "fp32", driver) as session:
        session.generate([1, 2], max_new_tokens=1)


def test_what_was_compiled_is_kept_in_the_bundle(
    own_engines: Path, trt: FakeTensorRT, driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    _run_once(own_engines, driver)
    kept = sorted(path.name for path in (own_engines / "cache").iterdir())
    assert kept == [f"rtx-sm89-fp32.{stage}.sm89.{VERSION}.bin" for stage in sorted(STAGES)]
    _run_once(own_engines, driver)
    # Code that came with the bundle is not read: another user has no mark for it.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    _run_once(own_engines, driver)
    read = [engine.runtime_cache.read for engine in trt.engines]
    assert read == [None] * 3 + [b"compiled"] * 3 + [None] * 3


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
        open_bundle(own_engines).target("rtx-sm89-fp32")
    assert open_bundle(own_engines, trust_engines=True).target("rtx-sm89-fp32")


def test_a_damaged_engine_is_one_line(own_engines: Path, trt: FakeTensorRT, driver: FakeDriver) -> None:
    file = own_engines / "coda.rtx-sm89-fp32.engine"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(BundleError, match=r"coda\..*engine: TensorRT cannot load it: the plan is no plan"):
        _opened(own_engines, driver, trust=True)


def test_a_context_the_engines_were_not_built_for_is_refused(
    engines: Path, trt: FakeTensorRT, driver: FakeDriver
) -> None:
    with _session(engines, "fp32", driver) as session:
        with pytest.raises(CapacityError, match=f"the prompt has {MAX_CONTEXT + 1} tokens"):
            session.generate(_prompt(session, MAX_CONTEXT + 1))
        made = session.generate(_prompt(session, MAX_CONTEXT - 3), max_new_tokens=20)
        assert made.finish_reason == "context"


def test_a_gpu_without_room_is_one_line(engines: Path, trt: FakeTensorRT, driver: FakeDriver) -> None:
    with _session(engines, "fp32", driver) as session:
        first = session.generate([1], max_new_tokens=1)
        driver.total_bytes = driver.device_memory.live_bytes + 10_000
        with pytest.raises(CapacityError, match=r"the caches of 1 x 54 tokens need .* are free"):
            session.generate(_prompt(session, 30), max_new_tokens=10)
        driver.total_bytes = 1 << 30
        assert session.generate([1], max_new_tokens=1).ids == first.ids


def test_a_gpu_that_runs_out_of_room_in_between_leaves_the_sequence_as_it_was(
    engines: Path, trt: FakeTensorRT, driver: FakeDriver
) -> None:
    with _session(engines, "fp32", driver) as session:
        # What a shallow sequence has, and room for a few slots more, but not for all.
        session.generate(_prompt(session, 4), max_new_tokens=1, max_depth=1)
        stairs = Staircase(session.backend, session.model, Depth("full").resolve(session.model), MAX_CONTEXT)
        driver.total_bytes = driver.device_memory.live_bytes + 80_000
        with pytest.raises(CapacityError, match=r"MB of GPU memory are needed, .* MB are free: shorten the context"):
            stairs.feed(np.array([_prompt(session, 4)]), np.array([3]))
        assert stairs.columns == 0
        driver.total_bytes = 1 << 30
        fed = stairs.feed(np.array([_prompt(session, 4)]), np.array([3]))
        whole = session.generate(_prompt(session, 4), max_new_tokens=1, policy="full")
        assert int(fed.logits[0, 0].argmax()) == whole.ids[0]


def test_without_a_driver_it_says_so(engines: Path, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise BackendUnavailable("no NVIDIA driver", "nvidia-smi")

    monkeypatch.setattr(Driver, "load", none)
    with pytest.raises(BackendUnavailable, match="no NVIDIA driver"):
        Session.open(engines, target="rtx-sm89-fp32")


def test_the_verbs_take_it(
    engines: Path, trt: FakeTensorRT, golden: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "ids.npy", golden["ids"])
    target = ["--target", "rtx-sm89-fp32"]
    assert cli.main(["generate", str(engines), "--ids", "1,2,3", "--max-new-tokens", "4", "--json", *target]) == 0
    made = json.loads(capsys.readouterr().out)["ids"]
    assert cli.main(["generate", str(engines), "--ids", "1,2,3", "--max-new-tokens", "4", "--json"]) == 0
    assert made == json.loads(capsys.readouterr().out)["ids"]
    against = ["--against", "fp32", "--ids", str(tmp_path / "ids.npy"), "--json"]
    assert cli.main(["validate", str(engines), *target, *against]) == 0
    quality = json.loads(capsys.readouterr().out)["quality"]
    assert quality["kl_mean"] < 1e-6
    assert quality["depth_agreement"] == 1
