"""One session for one call at a time: threads, callbacks, interrupts, and what is left after its end."""

import gc
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mythos_edge.model.errors import MythosEdgeError, UsageError
from mythos_edge.runtime.session import Session

PROMPT = [5, 17, 300, 2, 9]
DRAFT = {"draft_depth": 2, "draft_tokens": 4}
CLOSED = "^this session is closed: open it again$"
JOIN_S = 60


@pytest.fixture
def session(mla_bundle: Path) -> Iterator[Session]:
    with Session.open(mla_bundle) as opened:
        yield opened


def calls_of(session: Session, folder: Path) -> dict[str, Callable[[], Any]]:
    """Every public call, by name."""
    return {
        "generate": lambda: session.generate(PROMPT, max_new_tokens=2),
        "generate several": lambda: session.generate([PROMPT, [1]], max_new_tokens=2),
        "stream": lambda: list(session.stream(PROMPT, max_new_tokens=2)),
        "score": lambda: session.score([PROMPT]),
        "plan": lambda: session.plan(10),
        "ids": lambda: session.ids,
        "rollback": lambda: session.rollback(0),
        "flush": session.flush,
        "save": lambda: session.save(folder / "saved.npz"),
        "restore": lambda: session.restore(folder / "kept.npz"),
        "enter": session.__enter__,
    }


def in_thread(call: Callable[[], Any]) -> BaseException | None:
    """The error that the call raises in another thread."""
    raised: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            raised.append(None)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(JOIN_S)
    assert not thread.is_alive()
    return raised[0]


def test_every_call_is_refused_while_another_thread_runs_one(session: Session, tmp_path: Path) -> None:
    session.generate(PROMPT, max_new_tokens=2)
    session.save(tmp_path / "kept.npz")
    half_read = session.stream(PROMPT, max_new_tokens=9)
    next(half_read)
    others = calls_of(session, tmp_path) | {"next": lambda: next(half_read), "close": session.close}
    raised: dict[str, BaseException | None] = {}

    def progress(fraction: float) -> None:
        for name, call in others.items():
            raised.setdefault(name, in_thread(call))

    expected = session.generate(PROMPT, max_new_tokens=4)
    score = session.score([PROMPT], progress=progress)
    assert raised.keys() == others.keys()
    for name, error in raised.items():
        assert type(error) is UsageError, name
        mend = "close it when that call has ended" if name == "close" else "open one Session a thread, or use generate"
        assert str(error).startswith(f"this session is in use by another thread: {mend}"), name
    assert not (tmp_path / "saved.npz").exists()
    np.testing.assert_array_equal(score.logits, session.score([PROMPT]).logits)
    assert session.generate(PROMPT, max_new_tokens=4).ids == expected.ids


def test_a_callback_that_uses_its_own_session_is_told_so(session: Session) -> None:
    def progress(fraction: float) -> None:
        session.generate(PROMPT)

    with pytest.raises(UsageError, match="in use by the score that is under way: "):
        session.score([PROMPT], progress=progress)
    session.score([PROMPT])


def test_threads_on_one_session_get_what_is_right_or_are_told(session: Session) -> None:
    """Hammered from four threads at once: memory of one call is never touched by another."""
    request: dict[str, Any] = {"max_new_tokens": 6}
    alone = session.generate(PROMPT, **request).ids
    other = session.generate([7, 8], **request).ids
    logits = session.score([PROMPT]).logits
    done: list[str] = []
    wrong: list[object] = []
    start = threading.Barrier(4)

    def generate() -> None:
        assert session.generate(PROMPT, **request).ids == alone

    def together() -> None:
        assert [one.ids for one in session.generate([PROMPT, [7, 8]], **request)] == [alone, other]

    def stream() -> None:
        found = [token.id for token in session.stream([7, 8], **request, **DRAFT)]
        assert found == other

    def score() -> None:
        np.testing.assert_array_equal(session.score([PROMPT]).logits, logits)

    def hammer(call: Callable[[], None]) -> None:
        start.wait(JOIN_S)
        for _ in range(60):
            try:
                call()
                done.append(call.__name__)
            except UsageError as error:
                ended = "this stream has ended: "
                if not str(error).startswith((ended, "this session is in use by another thread: ")):
                    wrong.append(error)
                done.append("refused")
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=hammer, args=(call,)) for call in (generate, together, stream, score)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
    assert not wrong
    assert len(done) == 240
    assert "refused" in done
    assert set(done) - {"refused"}
    assert session.generate(PROMPT, **request).ids == alone


def test_threads_on_one_stream_get_each_token_once(session: Session) -> None:
    wanted = session.generate(PROMPT, max_new_tokens=20).ids
    stream = session.stream(PROMPT, max_new_tokens=20, **DRAFT)
    found: list[int] = []
    told: set[str] = set()

    def read() -> None:
        while True:
            try:
                found.append(next(stream).id)
            except UsageError as error:
                told.add(str(error))
                time.sleep(1e-4)
            except StopIteration:
                return

    with ThreadPoolExecutor(3) as pool:
        for reader in [pool.submit(read) for _ in range(3)]:
            reader.result(JOIN_S)
    assert sorted(found) == sorted(wanted)
    assert all("in use by another thread" in message for message in told)


def test_a_session_a_thread_is_what_one_alone_is(mla_bundle: Path, session: Session) -> None:
    wanted = session.generate(PROMPT, max_new_tokens=12).ids

    def run(_: int) -> list[list[int]]:
        with Session.open(mla_bundle, threads=1) as own:
            return [own.generate(PROMPT, max_new_tokens=12).ids for _ in range(4)]

    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(run, range(3)):
            assert found == [wanted] * 4


def test_after_close_every_call_is_one_line(mla_bundle: Path, tmp_path: Path) -> None:
    session = Session.open(mla_bundle)
    finished = session.stream(PROMPT, max_new_tokens=1)
    assert len(list(finished)) == 1
    session.save(tmp_path / "kept.npz")
    half_read = session.stream(PROMPT, max_new_tokens=9)
    next(half_read)
    session.close()
    session.close()
    for name, call in (calls_of(session, tmp_path) | {"next": lambda: next(half_read)}).items():
        with pytest.raises(UsageError, match=CLOSED):
            call()
        assert name
    assert list(finished) == []
    assert [path.name for path in tmp_path.iterdir()] == ["kept.npz"]
    with pytest.raises(UsageError, match=CLOSED), session:
        pass


def test_an_error_or_interrupt_gives_the_turn_back(session: Session) -> None:
    def progress(fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.score([PROMPT], progress=progress)
    with pytest.raises(UsageError):
        session.generate([], max_new_tokens=1)
    assert len(session.generate(PROMPT, max_new_tokens=2).ids) == 2


def test_an_interrupt_at_any_time_gives_the_turn_back(session: Session) -> None:
    wanted = session.generate(PROMPT, max_new_tokens=10).ids
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupted = 0
    try:
        for number in range(60):
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0003 * number)
            try:
                for _ in itertools.count():
                    for _ in session.stream(PROMPT, max_new_tokens=10):
                        pass
            except KeyboardInterrupt:
                interrupted += 1
            assert not session._turns.lock.locked()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted == 60
    assert session.generate(PROMPT, max_new_tokens=10).ids == wanted


def test_streams_that_nobody_reads_on_do_no_harm(session: Session) -> None:
    wanted = session.generate(PROMPT, max_new_tokens=6).ids
    for _ in range(5):
        next(session.stream([1, 2], max_new_tokens=20, **DRAFT))
    stream = session.stream(PROMPT, max_new_tokens=6)
    found = [next(stream).id]
    gc.collect()
    assert found + [token.id for token in stream] == wanted


def test_an_error_of_the_graphs_ends_a_stream(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = session.stream(PROMPT, max_new_tokens=6)
    first = next(stream).id
    with monkeypatch.context() as patch:
        patch.setattr(session.backend, "run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(stream)
    with pytest.raises(MythosEdgeError, match="this stream has ended: an error or an interrupt stopped it: start a ne"):
        next(stream)
    rest = session.generate([], resume=True, max_new_tokens=5).ids
    assert [first, *rest] == session.generate(PROMPT, max_new_tokens=6).ids
