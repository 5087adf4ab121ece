"""Caches in fp16 and int8, from export to tokens, for every kind of attention: cheaper, and the same whatever the way.

Two schedules compute the same sums in another order. Where that falls on either side of a step of the cache, one value
is kept a step apart. So two schedules are held to a share of what narrow caches cost at all.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from built import build_cpu
from command_line import Ran, refused
from conftest import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from looped_llamas import golden_of

from mythos_edge.exporter.lowering import narrow_caches as module
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.bundle_writer import update_manifest
from mythos_edge.model.errors import BundleError, UsageError
from mythos_edge.runtime.backends.opening import require_cache
from mythos_edge.runtime.session import Session

NAMES = ("mla-small", "gqa-small", "ouro-small", "dory-small")
CACHES = ("fp16", "int8")
# Of what caches cost, on the quadratic mean: one that is not narrowed in its own chunk costs all of it.
SHARE = 0.4


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(name: str, exported: Callable[..., Path]) -> Path:
    return exported(FIXTURES / name)


@pytest.fixture(scope="module", params=CACHES)
def cache(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def session(bundle: Path, cache: str) -> Iterator[Session]:
    with Session.open(bundle, cache=cache) as opened:
        yield opened


@pytest.fixture(scope="module")
def ids(name: str) -> np.ndarray:
    found: np.ndarray = golden_of(name)["ids"]
    return found


@pytest.fixture(scope="module")
def cost(bundle: Path, session: Session, ids: np.ndarray) -> float:
    """Returns how far narrow caches move the logits from those of fp32 caches."""
    with Session.open(bundle) as wide:
        return _mean(session.score(ids, policy="full").logits - wide.score(ids, policy="full").logits)


def _mean(difference: np.ndarray) -> float:
    return float(np.sqrt(np.square(difference.astype(np.float64)).mean()))


def _feed(session: Session, ids: np.ndarray, sizes: list[int], **options: object) -> np.ndarray:
    """The logits of one sequence fed in chunks of ``sizes``, the rest one by one."""
    session.score(ids[:, :1], **options)
    staircase, made, start = session._sequences[0].staircase, [], 0
    staircase.rollback(0)
    for size in [*sizes, *[1] * ids.shape[1]]:
        piece = ids[:, start : start + size]
        if piece.size:
            made.append(staircase.feed(piece, np.arange(piece.shape[1])).logits[0])
        start += size
    return np.concatenate(made)


def test_caches_cost_something_and_not_much(session: Session, cost: float, cache: str, ids: np.ndarray) -> None:
    logits = session.score(ids).logits
    assert 1e-5 < cost < (0.1 if cache == "fp16" else 0.3) * _mean(logits)


def test_a_step_of_the_schedule_is_none_of_the_result(session: Session, cost: float, ids: np.ndarray) -> None:
    wanted = session.score(ids, policy="full")
    for policy in ("full", "exact"):
        for prefill in (0, 1, 7, None):
            found = session.score(ids, policy=policy, prefill=prefill)
            assert _mean(found.logits - wanted.logits) <= SHARE * cost, (policy, prefill)
            np.testing.assert_array_equal(found.depth, wanted.depth)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_exact_is_full_after_any_schedule(
    session: Session, cost: float, ids: np.ndarray, name: str, data: st.DataObject
) -> None:
    halting = {"threshold": data.draw(st.sampled_from([0.3, 0.6, 0.9]))} if session.model.halts else {}
    depth = {"max_depth": data.draw(st.integers(1, session.model.max_depth)), **halting}
    sizes = data.draw(st.lists(st.integers(1, 9), max_size=4))
    row = ids[data.draw(st.integers(0, len(ids) - 1))][None]
    exact = _feed(session, row, sizes, policy="exact", **depth)
    full = session.score(row, policy="full", **depth)
    apart = _mean(exact - full.logits[0])
    # A halting mass so near the threshold that a step of the cache decides is another depth from there on.
    assert apart <= SHARE * cost or (session.score(row, prefill=0, **depth).depth != full.depth).any()


def test_several_sequences_are_each_alone(session: Session, cost: float, ids: np.ndarray) -> None:
    rows = np.concatenate([ids, ids[:, ::-1], np.roll(ids, 3, axis=1)])
    together = session.score(rows, prefill=5)
    for row, logits, depth in zip(rows, together.logits, together.depth, strict=True):
        alone = session.score(row[None], prefill=5)
        assert _mean(logits - alone.logits[0]) <= SHARE * cost
        np.testing.assert_array_equal(depth, alone.depth[0])


def test_rollback_leaves_nothing(session: Session, ids: np.ndarray) -> None:
    row = ids[:1]
    wanted = _feed(session, row, [6, row.shape[1]], policy="full")
    session.score(row[:, :1], policy="full")
    staircase = session._sequences[0].staircase
    staircase.rollback(0)
    staircase.feed(row[:, :6], np.arange(6))
    staircase.feed(row[:, ::-1][:, :5], np.arange(5))
    staircase.rollback(6)
    rest = staircase.feed(row[:, 6:], np.arange(row.shape[1] - 6)).logits[0]
    np.testing.assert_array_equal(rest, wanted[6:])


def test_drafts_change_nothing(session: Session) -> None:
    plain = session.generate([5, 9, 2, 11, 3], max_new_tokens=10, max_depth=2)
    drafted = session.generate([5, 9, 2, 11, 3], max_new_tokens=10, max_depth=2, draft_depth=1, draft_tokens=3)
    assert drafted.drafted > 0
    assert drafted.ids == plain.ids


def test_a_saved_sequence_goes_on_and_is_of_one_form(
    session: Session, bundle: Path, cache: str, tmp_path: Path
) -> None:
    file = tmp_path / "saved.npz"
    session.generate([5, 9, 2], max_new_tokens=4)
    session.save(file)
    wanted = session.generate([], resume=True, max_new_tokens=4)
    with Session.open(bundle, cache=cache) as other:
        other.restore(file)
        assert other.generate([], resume=True, max_new_tokens=4).ids == wanted.ids
    with Session.open(bundle) as wide:
        with pytest.raises(UsageError, match=f"saved with caches in {cache}, this session keeps them in fp32: open it"):
            wide.restore(file)
        wide.generate([5, 9, 2], max_new_tokens=4)
        wide.save(file)
    with pytest.raises(UsageError, match=f"saved with caches in fp32, this session keeps them in {cache}: open it"):
        session.restore(file)


def test_the_plan_is_what_is_allocated(session: Session, cache: str) -> None:
    model, context = session.model, 40
    session.generate([1, 2, 3], max_new_tokens=context - 3)
    slots = session._sequences[0].staircase._slots
    plan = session.plan(context)
    assert sum(slot.nbytes for slot in slots) == plan.cache_bytes
    values = model.cache_width * (2 if cache == "fp16" else 1)
    assert plan.cache_bytes == plan.slots * context * (values + (2 * len(model.parts) if cache == "int8" else 0))
    assert len(model.parts) == (2 if model.attention == "latent" else model.cache_width // model.head_dim)


def test_a_cache_that_is_wide_in_its_own_chunk_is_seen(
    bundle: Path, cache: str, cost: float, ids: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: new rows are narrowed for later chunks, and seen as they were by their own."""

    def faulty(graph: ir.Graph, index: int, *form: Any) -> None:
        rows = graph.outputs[index]
        readers = list(rows.uses())
        leave_narrow(graph, index, *form)
        for node, place in readers:
            node.replace_input_with(place, rows)

    leave_narrow = module._leave_narrow
    monkeypatch.setattr(module, "_leave_narrow", faulty)
    path = Path(shutil.copytree(bundle, tmp_path / "faulty.bundle"))
    build_cpu(path, "fp32")
    with Session.open(path, target="ort-cpu-fp32", cache=cache) as session:
        in_one, one_by_one = session.score(ids, policy="full"), session.score(ids, policy="full", prefill=0)
    assert _mean(in_one.logits - one_by_one.logits) > SHARE * cost


# --- forms that a target cannot keep ------------------------------------------------------------------------------


def test_forms_that_are_none(mla_bundle: Path, run: Callable[..., Ran]) -> None:
    with pytest.raises(UsageError, match="cache is 'int4', expected one of fp32, fp16, int8"):
        Session.open(mla_bundle, cache="int4")
    with pytest.raises(UsageError, match="cache is 8"):
        Session.open(mla_bundle, cache=8)
    with Session.open(mla_bundle, cache="fp32") as session:
        assert session.backend.memory.cache == "fp32"


def test_a_bundle_without_such_graphs_says_how_to_mend(
    mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    path = Path(shutil.copytree(mla_bundle, tmp_path / "older.bundle"))
    bundle = open_bundle(path)
    record = bundle.manifest.targets["ort-cpu"]
    plain = {key: file for key, file in record.graphs.items() if ".int8" not in key and ".fp16" not in key}
    update_manifest(bundle, targets={"ort-cpu": dataclasses.replace(record, graphs=plain)})
    with pytest.raises(BundleError, match=r"'ort-cpu' has no graphs for caches in int8, .*: export the bundle again"):
        Session.open(path, cache="int8")
    ran = run("generate", path, "--ids", "1,2", "--cache", "int8")
    refused(ran, "export the bundle again")
    assert run("generate", path, "--ids", "1,2", "--max-new-tokens", 2).code == 0


@pytest.mark.parametrize(("kind", "file", "own"), [("ort-cuda", "x.onnx", "fp32"), ("tensorrt", "x.engine", "fp16")])
def test_kinds_with_one_form(mla_bundle: Path, kind: str, file: str, own: str) -> None:
    bundle = open_bundle(mla_bundle)
    ours = bundle.target("ort-cpu")
    record = dataclasses.replace(ours, kind=kind, compute_dtype="fp16", graphs={"step": file}, options={})
    assert record.caches == (own,)
    require_cache(bundle, "gpu", record, own)
    with pytest.raises(UsageError, match=f"'gpu' keeps its caches in {own} alone, got cache int8: leave --cache out"):
        require_cache(bundle, "gpu", record, "int8")


# --- verbs --------------------------------------------------------------------------------------------------------


def test_the_verbs_take_a_cache(demo_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    np.save(tmp_path / "ids.npy", np.arange(24).reshape(2, 12))
    for cache in ("fp32", *CACHES):
        argv = ("score", demo_bundle, "--ids", tmp_path / "ids.npy", "-o", tmp_path / f"{cache}.npz", "--cache", cache)
        assert run(*argv).code == 0
    fp32, *others = (np.load(tmp_path / f"{cache}.npz")["logits"] for cache in ("fp32", *CACHES))
    assert [0 < np.abs(other - fp32).max() < 0.5 for other in others] == [True, True]
    assert len(run("generate", demo_bundle, "--ids", "1,2,3", "--cache", "int8", "--json").json["ids"]) > 0
    figures = run("bench", demo_bundle, "-p", 8, "-n", 4, "-r", 1, "--cache", "int8", "--json").json
    plain = run("bench", demo_bundle, "-p", 8, "-n", 4, "-r", 1, "--json").json
    sizes = [made["targets"]["ort-cpu"]["cache_mb"] for made in (figures, plain)]
    assert figures["cache"] == "int8"
    assert sizes[0] < 0.4 * sizes[1]


def test_validate_tells_what_a_cache_costs(demo_bundle: Path, run: Callable[..., Ran]) -> None:
    ran = run("validate", demo_bundle, "--against", "fp32", "--cache", "int8", "--demo-streams", 8, "--json")
    assert (ran.code, ran.json["cache"], ran.json["target"], ran.json["passed"]) == (0, "int8", "ort-cpu", True)
    quality = ran.json["quality"]
    assert 0 < quality["kl_mean"] < 1e-3
    assert all(0 < step["h_error_mean"] < 0.02 for step in quality["loop_steps"])
    assert set(ran.json["exact_sums"]) == {"ort-cpu", "ort-cpu, caches in int8"}
    assert "caches in fp16" in run("validate", demo_bundle, "--against", "fp32", "--cache", "fp16").out
    refused(run("validate", demo_bundle, "--against", "fp32", "--cache", "fp32"), "give --cache fp16 or int8")
    refused(run("validate", demo_bundle, "--cache", "int8"), "add --against fp32")


def test_inspect_tells_the_bytes_of_every_form(demo_bundle: Path, run: Callable[..., Ran]) -> None:
    forms = run("inspect", demo_bundle, "--json").json["cache"]["forms"]
    model = open_bundle(demo_bundle).manifest.model
    slots = model.prelude_slots + model.max_depth * model.step_slots + model.coda_slots
    rows = {form: one["bytes_per_token"] / slots for form, one in forms.items()}
    width = model.cache_width
    assert rows == {"fp32": 4 * width, "fp16": 2 * width, "int8": width + 2 * len(model.parts)}
    assert " in int8)" in run("inspect", demo_bundle).out
