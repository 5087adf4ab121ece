"""Streams that are half read: what other calls may do meanwhile, what ends them, and what goes on after them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mythos_edge.model.errors import UsageError
from mythos_edge.runtime.session import Session

PROMPT = [5, 17, 300, 2, 9]
COUNT = 24
MODES: list[dict[str, Any]] = [{}, {"draft_depth": 2, "draft_tokens": 4}, {"draft_depth": "auto"}]


@pytest.fixture
def session(mla_bundle: Path) -> Iterator[Session]:
    with Session.open(mla_bundle) as opened:
        yield opened


@pytest.fixture(params=MODES, ids=["plain", "drafts", "auto"])
def mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def changes(session: Session, saved: Path) -> dict[str, Callable[[], object]]:
    """The calls that leave another sequence than the stream's, and what they are called."""
    return {
        "rollback": lambda: session.rollback(len(session.ids) - 1),
        "restore": lambda: session.restore(saved),
        "generate": lambda: session.generate([7], max_new_tokens=2),
        "generate, resumed": lambda: session.generate([7], resume=True, max_new_tokens=2),
        "generate several": lambda: session.generate([[7], [8]], max_new_tokens=2),
        "stream": lambda: session.stream([7]),
        "stream, resumed": lambda: session.stream([], resume=True),
        "score": lambda: session.score([PROMPT]),
    }


@pytest.mark.parametrize("read", [0, 1, 3, 6])
def test_a_changed_sequence_ends_the_stream(session: Session, mode: dict[str, Any], read: int, tmp_path: Path) -> None:
    session.generate([3, 4], max_new_tokens=2)
    session.save(tmp_path / "saved.npz")
    for name in changes(session, tmp_path / "saved.npz"):
        stream = session.stream(PROMPT, max_new_tokens=COUNT, **mode)
        for _ in range(read):
            next(stream)
        changes(session, tmp_path / "saved.npz")[name]()
        call = name.split()[0].rstrip(",")
        for _ in range(2):
            with pytest.raises(UsageError) as caught:
                next(stream)
            message = f"this stream has ended: {call} changed its sequence: start a new one"
            assert str(caught.value) == message, name


def test_calls_that_change_nothing_leave_the_stream_right(
    session: Session, mode: dict[str, Any], tmp_path: Path
) -> None:
    for options in ({}, {"threshold": 1e9}, {"policy": "full"}):
        wanted = session.generate(PROMPT, max_new_tokens=COUNT, **options)
        for call in (session.flush, lambda: session.save(tmp_path / "saved.npz"), lambda: session.ids, session.plan):
            stream = session.stream(PROMPT, max_new_tokens=COUNT, **options, **mode)
            found = []
            for token in stream:
                found.append((token.id, token.depth))
                assert session.ids == PROMPT + [number for number, _ in found]
                call()
            assert found == list(zip(wanted.ids, wanted.depths, strict=True))
            assert session.last_generation.finish_reason == "length"


def test_refused_calls_leave_the_stream_right(session: Session, mode: dict[str, Any], tmp_path: Path) -> None:
    wanted = session.generate(PROMPT, max_new_tokens=COUNT).ids
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    refused: list[Callable[[], object]] = [
        lambda: session.generate([331]),
        lambda: session.generate([1], resume=True, policy="full"),
        lambda: session.stream([]),
        lambda: session.score([PROMPT], prefill=9),
        lambda: session.rollback(999),
        lambda: session.restore(tmp_path / "bad.npz"),
    ]
    stream = session.stream(PROMPT, max_new_tokens=COUNT, **mode)
    found = [next(stream).id, next(stream).id]
    for call in refused:
        with pytest.raises(UsageError):
            call()
        found.append(next(stream).id)
    assert found + [token.id for token in stream] == wanted


def test_what_a_half_read_stream_gave_is_what_is_resumed(session: Session, mode: dict[str, Any]) -> None:
    """Tokens that a draft has ready and nobody has seen are not part of the sequence."""
    wanted = session.generate(PROMPT, max_new_tokens=COUNT).ids
    for read in (0, 1, 2, 5, 11):
        stream = session.stream(PROMPT, max_new_tokens=COUNT, **mode)
        seen = [next(stream).id for _ in range(read)]
        assert session.ids == PROMPT + seen
        assert session.last_generation.ids == seen
        rest = session.generate([], resume=True, max_new_tokens=COUNT - read, **mode).ids
        assert seen + rest == wanted


def test_what_a_half_read_stream_gave_is_what_is_saved(
    session: Session, mode: dict[str, Any], mla_bundle: Path, tmp_path: Path
) -> None:
    wanted = session.generate(PROMPT, max_new_tokens=COUNT).ids
    stream = session.stream(PROMPT, max_new_tokens=COUNT, **mode)
    seen = [next(stream).id for _ in range(6)]
    session.save(tmp_path / "saved.npz")
    with Session.open(mla_bundle) as other:
        other.restore(tmp_path / "saved.npz")
        assert other.ids == PROMPT + seen
        assert seen + other.generate([], resume=True, max_new_tokens=COUNT - 6, **mode).ids == wanted


def test_sampling_with_drafts_is_the_same_streamed(session: Session) -> None:
    options: dict[str, Any] = {"max_new_tokens": COUNT, "temperature": 1.0, "seed": 4, **MODES[1]}
    whole = session.generate(PROMPT, **options)
    assert [token.id for token in session.stream(PROMPT, **options)] == whole.ids
    assert session.last_generation.accepted == whole.accepted


def test_a_stream_can_be_closed_and_ends_once(session: Session, mode: dict[str, Any]) -> None:
    stream = session.stream(PROMPT, max_new_tokens=COUNT, **mode)
    assert iter(stream) is stream
    seen = [next(stream).id, next(stream).id]
    stream.close()
    assert list(stream) == []
    assert session.ids == PROMPT + seen
    whole = session.stream(PROMPT, max_new_tokens=3, **mode)
    assert len(list(whole)) == 3
    session.rollback(2)
    with pytest.raises(StopIteration):
        next(whole)


def test_a_stream_is_refused_when_it_is_asked_for(session: Session) -> None:
    with pytest.raises(UsageError, match="a stream has one prompt, got a list of 2: use generate"):
        session.stream([[1], [2]])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="temperature is -1, expected 0 or more"):
        session.stream(PROMPT, temperature=-1)


def test_another_working_folder_does_no_harm(
    session: Session, mla_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs for several sequences are opened when they are first needed."""
    wanted = [one.ids for one in session.generate([PROMPT, [7]], max_new_tokens=4)]
    shutil.copytree(mla_bundle, tmp_path / "model.bundle")
    monkeypatch.chdir(tmp_path)
    with Session.open("model.bundle") as relative:
        monkeypatch.chdir("/")
        assert [one.ids for one in relative.generate([PROMPT, [7]], max_new_tokens=4)] == wanted
        assert relative.bundle.path == tmp_path / "model.bundle"
