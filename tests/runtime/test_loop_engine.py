"""Scoring with the loop inside the engine, on a fake GPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fakes.driver import FakeDriver
from fakes.tensorrt import FakeTensorRT

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.errors import BundleError, CapacityError, UsageError
from mythos_edge.runtime.loop_engine import LoopEngine
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import cli

FIXTURES = Path(__file__).parent.parent / "fixtures"
TARGET = "rtx-sm89-fp32-loop"
# What differs between one float32 run and another on a network of random weights.
TOLERANCE = 2e-3


@pytest.fixture
def loops(engine_bundle: Callable[..., Path]) -> Path:
    return engine_bundle(FIXTURES / "mla-small", "fp32", layout="loop")


@pytest.mark.parametrize("on_host", [True, False])
def test_scores_are_those_of_a_session(on_host: bool, loops: Path, trt: FakeTensorRT, driver: FakeDriver) -> None:
    """The limit of the loop may be read on the host or on the device."""
    trt.host_tensors = {"max_depth"} if on_host else set()
    ids = np.random.default_rng(0).integers(0, 300, (2, 5))
    with Session.open(loops) as session, LoopEngine(open_bundle(loops), TARGET, driver=driver) as engine:
        for options in ({}, {"max_depth": 2}, {"threshold": 0.4}):
            wanted, made = session.score(ids, **options), engine.score(ids, **options)
            np.testing.assert_allclose(made.logits, wanted.logits, atol=TOLERANCE)
            np.testing.assert_array_equal(made.depth, wanted.depth)
    assert driver.live_bytes == 0


def test_what_the_loop_does_not_know_is_refused(loops: Path, trt: FakeTensorRT, driver: FakeDriver) -> None:
    with LoopEngine(open_bundle(loops), TARGET, driver=driver) as engine:
        with pytest.raises(UsageError, match="runs as policy exact with min_depth 1: build --layout step"):
            engine.score([[1, 2]], policy="full")
        with pytest.raises(CapacityError, match="the sequence has 7 tokens; this engine was built for 6: build with"):
            engine.score([[1] * 7])
    with pytest.raises(BundleError, match="keeps no cache: score with it, or build --layout step"):
        Session.open(loops, target=TARGET)
    with pytest.raises(UsageError, match="target 'ort-cpu' has no loop inside"):
        LoopEngine.open(loops, "ort-cpu")


def test_the_verb_score_takes_it(loops: Path, trt: FakeTensorRT, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([[1, 2, 3]]))
    command = ["score", str(loops), "--ids", str(tmp_path / "ids.npy"), "-o", str(tmp_path / "made.npz")]
    assert cli.main([*command, "--target", TARGET]) == 0
    with np.load(tmp_path / "made.npz") as made:
        assert made["logits"].shape[:2] == (1, 3)
    assert cli.main([*command, "--target", TARGET, "--prefill", "2"]) == 1


def test_one_call_at_a_time_and_none_after_close(loops: Path, trt: FakeTensorRT, driver: FakeDriver) -> None:
    engine = LoopEngine(open_bundle(loops), TARGET, driver=driver)
    with pytest.raises(UsageError, match="unknown option colour; known: max_depth, min_depth, policy, threshold"):
        engine.score([[1, 2]], colour=1)  # type: ignore[call-arg]
    with engine._turns.lock:
        for call in (lambda: engine.score([[1, 2]]), engine.__enter__, engine.close):
            with pytest.raises(UsageError, match="this engine is in use by "):
                call()
    engine.score([[1, 2]])
    engine.close()
    engine.close()
    for call in (lambda: engine.score([[1, 2]]), engine.__enter__):
        with pytest.raises(UsageError, match="this engine is closed: open it again"):
            call()
    assert driver.live_bytes == 0
