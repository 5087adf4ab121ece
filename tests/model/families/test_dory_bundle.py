"""A Dory bundle: its depths, its graphs of standard ops, rounded weights, products for GPUs, the command line."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from built import build_cpu, build_cuda
from command_line import Ran, refused
from dory_models import GOLDEN

from mythos_edge.exporter.portable import inline_bundle
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import UsageError
from mythos_edge.model.layout import load_network
from mythos_edge.model.network import LoopedNetwork
from mythos_edge.model.stages import MAX_TOGETHER
from mythos_edge.runtime.backends.ort_cpu import OrtCpuBackend
from mythos_edge.runtime.backends.ort_session import ort_session
from mythos_edge.runtime.session import Session

WANTED = dict(np.load(GOLDEN / "golden.npz"))
IDS = WANTED["ids"]
ALLOWED = 3 * float(WANTED["fp32_error"])
POSITIONS = IDS.shape[1]
PROMPTS = [[3], [5, 17, 200, 2, 9], list(range(1, 24))]


@pytest.fixture(scope="module")
def bundle(exported: Callable[..., Path]) -> Path:
    return exported(GOLDEN)


@pytest.fixture(scope="module")
def double() -> LoopedNetwork:
    with open_checkpoint(GOLDEN) as opened:
        return load_network(opened, dtype=torch.float64)


@pytest.fixture
def session(bundle: Path) -> Iterator[Session]:
    with Session.open(bundle) as opened:
        yield opened


def assert_golden(logits: np.ndarray, depth: np.ndarray, what: str = "") -> None:
    assert np.abs(logits - WANTED["logits"]).max() <= ALLOWED, what
    assert (depth == 2).all(), what


def _whole(path: Path, depth: int) -> tuple[np.ndarray, np.ndarray]:
    feeds = {"input_ids": IDS, "max_depth": np.array(depth), "threshold": np.array(1, np.float32)}
    logits, depths = ort_session(path).run(None, feeds)
    return logits, depths


def test_the_graph_with_the_loop_goes_deeper(bundle: Path, double: LoopedNetwork) -> None:
    logits, depth = _whole(bundle / "model.onnx", 4)
    assert np.abs(logits - double(torch.from_numpy(IDS), max_depth=4).logits.numpy()).max() <= ALLOWED
    assert (depth == 4).all()


def test_graphs_of_standard_ops_are_golden(bundle: Path, tmp_path: Path) -> None:
    """Both kinds of attention are in one graph, which has one function for them."""
    shutil.copytree(bundle, tmp_path / "b")
    inline_bundle(tmp_path / "b")
    assert_golden(*_whole(tmp_path / "b" / "model.portable.onnx", 2))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_depth_is_the_requests_to_choose(session: Session, double: LoopedNetwork, depth: int) -> None:
    wanted = double(torch.from_numpy(IDS), max_depth=depth).logits.numpy()
    for policy in ("exact", "full"):
        score = session.score(IDS, prefill=7, policy=policy, max_depth=depth)
        assert np.abs(score.logits - wanted).max() <= ALLOWED
        assert (score.depth == depth).all()
    assert score.block_calls == len(IDS) * depth * (POSITIONS - 7 + 1)


def test_only_depths_beyond_the_trained_ones_warn(session: Session) -> None:
    """The config's two loop steps are a default."""
    with pytest.warns(UserWarning, match="max_depth 5 is beyond the 4 loop steps this model was trained with"):
        session.score(IDS, max_depth=5)


def test_depth_of_a_live_sequence_does_not_change(session: Session) -> None:
    session.generate(PROMPTS[1], max_new_tokens=3, max_depth=1)
    with pytest.raises(UsageError, match="max_depth"):
        session.generate([7], resume=True, max_new_tokens=3, max_depth=2)


def test_a_threshold_is_refused(session: Session) -> None:
    with pytest.raises(UsageError, match=r"threshold is 0\.5, but no position of this model halts by itself"):
        session.score(IDS, threshold=0.5)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_prompts_of_any_length_are_served_together_and_drafted(session: Session, depth: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "max_depth": depth}
    alone = [session.generate(prompt, **options) for prompt in PROMPTS]
    for prompt, made in zip(PROMPTS, alone, strict=True):
        ids = [*prompt, *made.ids]
        chosen = session.score([ids], policy="full", max_depth=depth).logits[0].argmax(-1)
        assert made.ids == chosen[len(prompt) - 1 : -1].tolist()
    together = session.generate(PROMPTS, **options)
    assert [one.ids for one in together] == [one.ids for one in alone]
    for draft in range(1, depth):
        drafted = session.generate(PROMPTS, **options, draft_depth=draft, draft_tokens=3)
        assert [one.ids for one in drafted] == [one.ids for one in alone]
        assert sum(one.drafted for one in drafted) > 0


def test_a_sequence_goes_on_after_a_rollback_and_on_disk(session: Session, tmp_path: Path) -> None:
    whole = session.generate(PROMPTS[2], max_new_tokens=12).ids
    session.generate(PROMPTS[2], max_new_tokens=5)
    session.save(tmp_path / "saved.npz")
    session.rollback(4)
    session.restore(tmp_path / "saved.npz")
    assert session.generate([], resume=True, max_new_tokens=7).ids == whole[5:]
    session.rollback(len(PROMPTS[2]) - 1)
    assert session.generate(PROMPTS[2][-1:], resume=True, max_new_tokens=12).ids == whole


@pytest.mark.parametrize("key", ["step", "step.many"])
def test_caches_have_lengths_of_their_own(bundle: Path, key: str) -> None:
    """A slot with a window has fewer columns; what ONNX Runtime takes for equally long it puts in the same memory."""
    opened = open_bundle(bundle)
    graph = ir.load(opened.file(opened.target("ort-cpu").graphs[key])).graph
    pasts = [value for value in graph.inputs if str(value.name).startswith("past")]
    lengths = {str(value.name): str(value.shape[1]) for value in pasts if value.shape is not None}
    slots = {name.partition(".")[0]: length for name, length in lengths.items()}
    assert len(set(slots.values())) == len(slots) == (4 if key == "step" else 4 * MAX_TOGETHER)
    # Keys and values of a slot are equally long.
    assert all(length == slots[name.partition(".")[0]] for name, length in lengths.items())


def test_rounded_weights(bundle: Path) -> None:
    built = build_cpu(bundle, "int8", block=32)
    weights = built.target("ort-cpu-int8").weights
    assert weights == dict.fromkeys(["embedding", "head", "prelude", "attention", "mlp", "coda"], "int8")
    with Session.open(bundle) as exact, Session.open(bundle, target="ort-cpu-int8") as rounded:
        wanted, found = (one.score(IDS, policy="full").logits for one in (exact, rounded))
    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.1


@pytest.mark.parametrize("weights", ["none", "int8"])
def test_products_of_the_cuda_target(bundle: Path, weights: str) -> None:
    build_cuda(bundle, weights=weights)
    name = "ort-cuda-fp16" if weights == "none" else f"ort-cuda-fp16-{weights}"
    opened = open_bundle(bundle)
    # The CPU's kernels of the same ops stand in for those of a GPU.
    with Session.open(bundle) as exact, Session(opened, OrtCpuBackend(opened, name)) as lowered:
        wanted, found = (one.score(IDS, prefill=7).logits for one in (exact, lowered))
    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.1


def test_the_command_line(bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    assert run("inspect", bundle, "--json").json["family"] == "dory"
    assert run("inspect", GOLDEN, "--json").json["family"] == "dory"
    ran = run("inspect", bundle)
    assert "prelude 1, loop 4 x 2, coda 1" in ran.out
    assert "5 of 6 layers see 8 positions" in ran.out
    assert run("validate", bundle, "--against", GOLDEN).code == 0
    np.save(tmp_path / "ids.npy", IDS)
    assert run("score", bundle, "--ids", tmp_path / "ids.npy", "-o", tmp_path / "out.npz").code == 0
    made = np.load(tmp_path / "out.npz")
    assert_golden(made["logits"], made["depth"])
    refused(
        run("score", bundle, "--ids", tmp_path / "ids.npy", "-o", tmp_path / "no.npz", "--threshold", "0.5"),
        "no position of this model halts by itself",
    )
    assert not (tmp_path / "no.npz").exists()
