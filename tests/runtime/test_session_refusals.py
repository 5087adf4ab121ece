"""A session refuses what it cannot do in one line, and is then as it was before."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import build_cpu

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.bundle_writer import update_manifest
from mythos_edge.model.errors import CapacityError, UsageError
from mythos_edge.model.manifest import Preset
from mythos_edge.runtime.backends import memory
from mythos_edge.runtime.session import Session

PROMPT = [5, 17, 300, 2, 9]


@pytest.fixture
def session(mla_bundle: Path) -> Iterator[Session]:
    with Session.open(mla_bundle) as opened:
        yield opened


@pytest.mark.parametrize("value", ["soon", 2.5])
def test_drafts_are_whole_numbers_or_auto(session: Session, value: Any) -> None:
    with pytest.raises(UsageError, match=r"draft_depth is .*, expected a whole number"):
        session.generate(PROMPT, draft_depth=value, max_new_tokens=2)
    assert session.generate(PROMPT, draft_depth=np.int64(2), draft_tokens=3, max_new_tokens=9).drafted > 0


def test_a_session_saved_on_another_target_is_refused(mla_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(mla_bundle, tmp_path / "copy.bundle"))
    build_cpu(path, "int4", block=32)
    build_cpu(path, "fp32")
    with Session.open(path, target="ort-cpu-int4") as rounded:
        rounded.generate(PROMPT, max_new_tokens=2)
        rounded.save(tmp_path / "rounded.npz")
        rounded.restore(tmp_path / "rounded.npz")
    with Session.open(path) as exact:
        with pytest.raises(UsageError, match="saved with another bundle or target"):
            exact.restore(tmp_path / "rounded.npz")
        exact.generate(PROMPT, max_new_tokens=2)
        exact.save(tmp_path / "exact.npz")
    with Session.open(path, target="ort-cpu-fp32") as prepacked:  # the same weights in another place
        prepacked.restore(tmp_path / "exact.npz")


def test_a_preset_is_for_the_target_it_was_found_for(mla_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(mla_bundle, tmp_path / "copy.bundle"))
    build_cpu(path, "fp32")
    preset = Preset("ort-cpu-fp32", 3, 0.9, 0.0, 1.0, 2.0, 1.5)
    update_manifest(open_bundle(path), presets={"quick": preset})
    with Session.open(path, preset="quick") as quick, Session.open(path) as plain:
        wanted = plain.generate(PROMPT, max_new_tokens=6, max_depth=3, threshold=0.9)
        assert quick.generate(PROMPT, max_new_tokens=6).depths == wanted.depths
        assert max(quick.generate(PROMPT, max_new_tokens=6, max_depth=5, threshold=1e9).depths) == 5
    with pytest.raises(UsageError, match="found for target 'ort-cpu-fp32', not 'ort-cpu'"):
        Session.open(path, preset="quick", target="ort-cpu")
    assert build_cpu(path, "fp32").manifest.presets == {}


REFUSALS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([], {}, UsageError, "the prompt is empty"),
    ([331], {}, UsageError, "token id 331 is out of range: this model knows 0 .. 330"),
    ([-1], {}, UsageError, "token id -1 is out of range"),
    ([1] * 257, {}, CapacityError, "the prompt has 257 tokens; this bundle was exported for 256: export with"),
    ("text", {}, UsageError, "no tokenizer: give token ids"),
    ([1], {"max_depth": 0}, UsageError, "max_depth is 0, expected at least 1"),
    ([1], {"min_depth": 7}, UsageError, "min_depth is 7, expected at most max_depth 6"),
    ([1], {"threshold": float("nan")}, UsageError, "threshold is nan"),
    ([1], {"policy": "fast"}, UsageError, "policy is 'fast', expected one of exact, full, last"),
    ([1], {"temperature": -1.0}, UsageError, "temperature is -1.0"),
    ([1], {"max_new_tokens": 0}, UsageError, "max_new_tokens is 0"),
    ([1], {"draft_depth": 6}, UsageError, "draft_depth is 6, expected 1 .. 5: at least min_depth and less than max_de"),
    ([1], {"draft_depth": 0}, UsageError, "draft_depth is 0, expected at least 1"),
    ([1], {"draft_depth": 2, "draft_tokens": 0}, UsageError, "draft_tokens is 0, expected at least 1"),
    ([1], {"draft_tokens": 2}, UsageError, "draft_tokens is 2 without draft_depth"),
    ([1], {"draft_depth": "auto", "policy": "last"}, UsageError, "policy is last, which keeps no exact cache rows"),
    (
        [[1], [2]],
        {"draft_depth": "auto"},
        UsageError,
        "a draft that is auto measures one sequence alone, got 2 prompts",
    ),
    ([1], {"stop_strings": ("a",)}, UsageError, "stop strings need a tokenizer"),
    ([1], {"colour": "red"}, UsageError, "unknown option colour; known: "),
]


@pytest.mark.parametrize(("prompt", "options", "kind", "message"), REFUSALS)
def test_refusals(prompt: Any, options: dict[str, Any], kind: type[Exception], message: str, session: Session) -> None:
    with pytest.raises(kind, match=message.replace("(", r"\(")) as caught:
        session.generate(prompt, **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(kind) as streamed:
        session.stream(prompt, **options)  # by the call itself, not when the first token is asked for
    assert str(streamed.value) == str(caught.value) or prompt == [[1], [2]]


@pytest.mark.parametrize("path", [None, 3, ["a"]])
def test_a_place_that_is_none_is_refused(path: Any, session: Session) -> None:
    session.generate([1], max_new_tokens=1)
    with pytest.raises(UsageError, match=r"path is .*, expected the path of the file to write"):
        session.save(path)
    with pytest.raises(UsageError, match=r"path is .*, expected the path of a file that save wrote"):
        session.restore(path)


def test_resume_refuses_other_depth_parameters_and_overlong_prompts(session: Session) -> None:
    with pytest.raises(UsageError, match="no sequence yet"):
        session.generate([1], resume=True)
    session.generate(PROMPT, max_new_tokens=2)
    with pytest.raises(UsageError, match="start a new sequence"):
        session.generate([1], resume=True, max_depth=2)
    with pytest.raises(CapacityError, match="the prompt has 257 tokens"):
        session.generate([1] * 250, resume=True)
    assert len(session.ids) == 7
    with pytest.raises(UsageError, match=r"rollback to 8 positions, expected 0 .. 7"):
        session.rollback(8)


def test_caches_that_do_not_fit_are_refused_before_anything_is_allocated(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 10_000)
    with pytest.raises(CapacityError, match=r"the caches of 1 x 133 tokens need .* GB"):
        session.generate(PROMPT)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nonsense", b"not a session"])
def test_a_damaged_session_file_is_refused(content: bytes, session: Session, tmp_path: Path) -> None:
    (tmp_path / "saved.npz").write_bytes(content)
    with pytest.raises(UsageError, match="not a saved session, or damaged"):
        session.restore(tmp_path / "saved.npz")
    with pytest.raises(UsageError, match="cannot read the session"):
        session.restore(tmp_path / "missing.npz")


def test_scoring_refuses_what_is_not_ids(session: Session) -> None:
    for ids, message in (
        ([1, 2], r"expected integers \(batch, positions\): ids\[None\] makes a batch"),
        ([[0.5]], r"expected integers \(batch, positions\)$"),
        (np.zeros((1, 0), np.int64), r"ids are empty, of shape \(1, 0\)"),
    ):
        with pytest.raises(UsageError, match=message):
            session.score(ids)
    with pytest.raises(UsageError, match=r"prefill is 3, expected 0 .. 2"):
        session.score([[1, 2]], prefill=3)


def test_a_refused_resume_changes_nothing(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    made = session.generate(PROMPT, max_new_tokens=3)
    before = session.ids
    with monkeypatch.context() as patch:
        patch.setattr(memory, "free_memory_bytes", lambda: 0)
        with pytest.raises(CapacityError):
            session.generate([1, 2], resume=True, max_new_tokens=200)
    with pytest.raises(UsageError, match="stop strings need a tokenizer"):
        session.generate([1, 2], resume=True, stop_strings="x")
    with pytest.raises(UsageError, match="policy is full, but the sequence was begun with exact"):
        session.generate([1, 2], resume=True, policy="full")
    assert session.ids == before == PROMPT + made.ids


def test_a_saved_session_that_lost_an_array_is_refused(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "saved.npz"
    session.generate(PROMPT, max_new_tokens=2)
    session.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    for name in ("loop_0_0.data", "h.columns", "counts"):
        np.savez(path, **{other: array for other, array in arrays.items() if other != name})
        with pytest.raises(UsageError, match="not a saved session, or damaged"):
            session.restore(path)


def test_a_session_saved_with_another_storage_dtype_is_refused(session: Session, tmp_path: Path) -> None:
    import dataclasses

    session.generate(PROMPT, max_new_tokens=2)
    session.save(tmp_path / "saved.npz")
    manifest = dataclasses.replace(session.bundle.manifest, dtype="bf16")
    session.bundle = dataclasses.replace(session.bundle, manifest=manifest)
    with pytest.raises(UsageError, match="was saved with another bundle"):
        session.restore(tmp_path / "saved.npz")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": 5}, "path is 5, expected the path of a bundle's folder"),
        ({"target": ["x"]}, r"target is \['x'\], expected a name"),
        ({"preset": 3}, "preset is 3, expected a name"),
        ({"hashes": "yes"}, "hashes is 'yes', expected True or False"),
        ({"trust": 1}, "trust is 1, expected True or False"),
    ],
)
def test_what_is_opened_is_named_as_it_must_be(given: dict[str, Any], message: str, mla_bundle: Path) -> None:
    with pytest.raises(UsageError, match=message):
        Session.open(**{"path": mla_bundle, **given})


def test_seeds_are_whole_numbers_one_for_each_prompt(mla_bundle: Path) -> None:
    with Session.open(mla_bundle) as session:
        for seeds in (7, 7.5, [None], [True], {7: 8}, "7", [-1]):
            with pytest.raises(UsageError, match="seed"):
                session.generate([1, 2], max_new_tokens=1, temperature=1.0, seeds=seeds)
        with pytest.raises(UsageError, match="seeds are 2 for 1 prompts"):
            session.generate([1, 2], max_new_tokens=1, seeds=[1, 2])


def test_a_plan_is_of_what_can_run(mla_bundle: Path) -> None:
    with Session.open(mla_bundle) as session:
        assert session.plan(session.max_context).cache_bytes == session.plan().cache_bytes
        for given in ({"context": 10**15}, {"max_depth": 10**9}, {"context": 0}):
            with pytest.raises(UsageError, match=f"{next(iter(given))} is"):
                session.plan(**given)
