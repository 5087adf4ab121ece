"""Ouro and Nanbeige on fake GPUs: loop steps of several slots and a gate, with the reference's numbers and depths."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import build_cuda
from conftest import FIXTURES
from fakes.driver import FakeDriver
from fakes.onnxruntime import FakeOnnxruntime
from fakes.tensorrt import FakeTensorRT
from looped_llamas import golden_of

from mythos_edge.model.bundle import open_bundle
from mythos_edge.runtime import parity
from mythos_edge.runtime.backends.tensorrt import TrtBackend
from mythos_edge.runtime.loop_engine import LoopEngine
from mythos_edge.runtime.session import Session

NAMES = ("ouro-small", "nanbeige-small")
PROMPT = [11, 3, 200, 41, 8, 17, 33, 2, 9]


def assert_of_the_reference(name: str, scored: Callable[..., Any]) -> None:
    """Whether ``scored(ids, **depth)`` has the logits and depths of the golden folder, at a threshold of 0.5, too."""
    golden, allowed = golden_of(name), parity.NOISE_FACTOR * golden_of(name)["fp32_error"]
    score = scored(golden["ids"])
    assert np.abs(score.logits - golden["logits"]).max() <= allowed
    assert (score.depth == golden["n_loops"]).all()
    if "thresholds" in golden:
        index = golden["thresholds"].tolist().index(0.5)
        score = scored(golden["ids"], threshold=0.5)
        assert np.abs(score.logits - golden["logits_at"][index]).max() <= allowed
        assert (score.depth == golden["depth"][index]).all()


def assert_as_on_the_host(host: Session, session: Session) -> None:
    """Tokens of one prompt, of a batch, and of drafts, and those of a threshold where there is a gate."""
    depth: dict[str, Any] = {"threshold": 0.5} if host.model.halts else {}
    prompts = [PROMPT, PROMPT[:2], PROMPT[3:8]]
    for options in ({}, depth, {**depth, "draft_depth": 1, "draft_tokens": 3}):
        wanted, made = (one.generate(prompts, max_new_tokens=6, **options) for one in (host, session))
        assert [(one.ids, one.depths) for one in made] == [(one.ids, one.depths) for one in wanted]


@pytest.mark.parametrize("name", NAMES)
def test_engines(
    name: str, engine_bundle: Callable[..., Path], trt: FakeTensorRT, driver: FakeDriver, tmp_path: Path
) -> None:
    path = engine_bundle(FIXTURES / name, "fp32")
    bundle = open_bundle(path)
    with Session.open(path) as host, Session(bundle, TrtBackend(bundle, "rtx-sm89-fp32", driver=driver)) as session:
        for prefill in (None, 7):
            assert_of_the_reference(name, lambda ids, prefill=prefill, **of: session.score(ids, prefill=prefill, **of))
        assert_as_on_the_host(host, session)
    assert driver.live_bytes == 0


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_with_the_loop_inside(
    name: str, engine_bundle: Callable[..., Path], trt: FakeTensorRT, driver: FakeDriver
) -> None:
    path = engine_bundle(FIXTURES / name, "fp32", layout="loop")
    ids = golden_of(name)["ids"][:, :6]
    with Session.open(path) as session, LoopEngine(open_bundle(path), "rtx-sm89-fp32-loop", driver=driver) as engine:
        for options in ({}, {"max_depth": 2}, *([{"threshold": 0.5}] if session.model.halts else [])):
            wanted, made = session.score(ids, **options), engine.score(ids, **options)
            np.testing.assert_allclose(made.logits, wanted.logits, atol=2e-4)
            assert (made.depth == wanted.depth).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_cuda_provider(
    name: str, exported: Callable[..., Path], installed: Callable[..., FakeOnnxruntime], tmp_path: Path
) -> None:
    installed()
    path = Path(shutil.copytree(exported(FIXTURES / name), tmp_path / "with.bundle"))
    build_cuda(path, dtype="fp32")
    with Session.open(path) as host, Session.open(path, target="ort-cuda-fp32") as session:
        for prefill in (None, 7):
            assert_of_the_reference(name, lambda ids, prefill=prefill, **of: session.score(ids, prefill=prefill, **of))
        assert_as_on_the_host(host, session)
