"""The engine: every answer is that of the same request alone, whoever comes and goes meanwhile."""

import queue
import random as chance
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mythos_edge.model.errors import CapacityError, MythosEdgeError, UsageError
from mythos_edge.runtime.decoding import Generation, Token
from mythos_edge.runtime.options import Options
from mythos_edge.runtime.serving.engine import Engine, QueueFull, Request, Ticket, TimedOut
from mythos_edge.runtime.session import Session
from mythos_edge.runtime.staircase import Staircase
from mythos_edge.runtime.together import Together

VOCAB = 60


class Client:
    """A listener that keeps what it hears."""

    def __init__(self, engine: Engine, ids: list[int], **options: Any) -> None:
        self.heard: queue.Queue[Any] = queue.Queue()
        more = {name: options.pop(name) for name in ("deadline", "logit_bias") if name in options}
        self.ticket: Ticket = engine.submit(Request(ids, Options(**options), **more), self.heard.put)

    def result(self) -> Generation:
        tokens: list[Token] = []
        while isinstance(event := self.heard.get(timeout=60), Token):
            tokens.append(event)
        if isinstance(event, Exception):
            raise event
        assert isinstance(event, Generation)
        assert [token.id for token in tokens] == event.ids
        assert [token.depth for token in tokens] == event.depths
        return event


@pytest.fixture(scope="module")
def alone(text_bundle: Path) -> Iterator[Callable[..., Generation]]:
    with Session.open(text_bundle) as session:
        yield lambda ids, **options: session.generate(ids, **options)


@pytest.fixture
def engine_of(text_bundle: Path) -> Iterator[Callable[..., Engine]]:
    opened: list[tuple[Engine, Session]] = []

    def make(**options: Any) -> Engine:
        session = Session.open(text_bundle)
        opened.append((Engine(session, **options), session))
        return opened[-1][0]

    yield make
    for engine, session in opened:
        engine.close()
        session.close()


def _requests(random: np.random.Generator, count: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Requests with beginnings in common, of all kinds."""
    beginnings = [random.integers(0, VOCAB, 30).tolist() for _ in range(3)]
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 5, "top_p": 0.9},
        {"threshold": 0.4},
        {"policy": "full"},
        {"draft_depth": 1, "draft_tokens": 3},
        {"max_depth": 2, "chunk": 7},
    ]
    made = []
    for _ in range(count):
        ids = [*beginnings[random.integers(3)], *random.integers(0, VOCAB, random.integers(1, 12)).tolist()]
        made.append((ids, {"max_new_tokens": int(random.integers(1, 14)), **kinds[random.integers(len(kinds))]}))
    return made


def test_every_answer_is_that_of_the_request_alone(
    engine_of: Callable[..., Engine], alone: Callable[..., Generation], random: np.random.Generator
) -> None:
    engine = engine_of(slots=3, queue=100)
    requests = _requests(random, 40)
    clients = [Client(engine, ids, **options) for ids, options in requests]
    for (ids, options), client in zip(requests, clients, strict=True):
        wanted, found = alone(ids, **options), client.result()
        assert (found.ids, found.depths, found.text) == (wanted.ids, wanted.depths, wanted.text)
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-4)
    assert engine.counts["done"] == 40
    assert engine.counts["cached_tokens"] > 0
    assert sum(engine.depths.values()) == engine.counts["generated_tokens"]
    shared = sum(client.ticket.result.block_calls for client in clients)
    assert engine.runs["step"] < 0.8 * shared


def test_who_leaves_frees_a_slot_and_disturbs_nobody(
    engine_of: Callable[..., Engine], alone: Callable[..., Generation], random: np.random.Generator
) -> None:
    engine = engine_of(slots=2, queue=100)
    requests = _requests(random, 24)
    clients = [Client(engine, ids, **options) for ids, options in requests]
    leaving = chance.Random(3).sample(range(24), 10)
    for number in leaving:
        clients[number].ticket.cancel()
        time.sleep(0.005)
    for number, ((ids, options), client) in enumerate(zip(requests, clients, strict=True)):
        if number not in leaving:
            assert client.result().ids == alone(ids, **options).ids
    engine.close(patience_s=10)
    assert engine.load == (0, 0)
    assert engine.counts["done"] + engine.counts["cancelled"] == 24


def test_a_beginning_that_is_known_is_not_computed_again(
    engine_of: Callable[..., Engine], alone: Callable[..., Generation], random: np.random.Generator
) -> None:
    engine = engine_of(slots=1)
    system = random.integers(0, VOCAB, 100).tolist()
    first = Client(engine, [*system, 1], max_new_tokens=4)
    said = first.result().ids
    for ids, kept in (([*system, 2], 100), ([*system, 3], 100), ([*system, 1, *said, 7], 104), ([*system, 1], 100)):
        client = Client(engine, ids, max_new_tokens=4)
        assert client.result().ids == alone(ids, max_new_tokens=4).ids
        assert client.ticket.cached_tokens == kept, ids[100:]
    # Rows of other depth parameters are of no use.
    client = Client(engine, [*system, 1], max_new_tokens=4, max_depth=2)
    assert client.result().ids == alone([*system, 1], max_new_tokens=4, max_depth=2).ids
    assert client.ticket.cached_tokens == 0


def test_the_cache_has_bounds(engine_of: Callable[..., Engine], random: np.random.Generator) -> None:
    engine = engine_of(slots=2, cache_bytes=400_000)
    for _ in range(12):
        Client(engine, random.integers(0, VOCAB, 60).tolist(), max_new_tokens=3).result()
    assert 0 < engine.cache.nbytes <= 400_000
    nothing = engine_of(slots=1, cache_bytes=0)
    for _ in range(2):
        client = Client(nothing, list(range(40)), max_new_tokens=3)
        client.result()
        assert client.ticket.cached_tokens == 0
    assert len(nothing.cache) == 0


def test_skipped_loop_steps_are_caught_up_while_nothing_runs(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(slots=1)
    Client(engine, list(range(40)), max_new_tokens=8, threshold=0.3).result()
    (entry,) = engine.cache._entries
    for _ in range(500):
        if set(entry.staircase.lengths) == {entry.staircase.columns}:
            return
        time.sleep(0.01)
    pytest.fail(f"{entry.staircase.lengths} of {entry.staircase.columns}")


def test_what_cannot_be_served_is_refused(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(slots=1, queue=1)
    with pytest.raises(CapacityError, match="the prompt has 5000 tokens, this model takes 512"):
        Client(engine, [1] * 5000)
    with pytest.raises(UsageError, match="token id 99999 is out of range"):
        Client(engine, [99999])
    with pytest.raises(UsageError, match="logit_bias of token 99999 is out of range"):
        Client(engine, [1], logit_bias={99999: 1.0})
    slow = [Client(engine, [1, 2, 3], max_new_tokens=400, policy="full")]
    with pytest.raises(QueueFull, match="1 requests run and 1 wait already"):
        slow += [Client(engine, [1, 2, 3], max_new_tokens=400, policy="full") for _ in range(3)]
    for client in slow:
        client.ticket.cancel()
    while any(engine.load):
        time.sleep(0.001)
    late = Client(engine, [1, 2, 3], max_new_tokens=500, policy="full", deadline=time.monotonic() + 0.05)
    with pytest.raises(TimedOut, match="longer than the server allows"):
        late.result()


def test_a_bias_decides(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(slots=1)
    assert Client(engine, [1, 2, 3], max_new_tokens=5, logit_bias={7: 100.0}).result().ids == [7] * 5
    plain = Client(engine, [1, 2, 3], max_new_tokens=1).result().ids[0]
    other = Client(engine, [1, 2, 3], max_new_tokens=1, logit_bias={plain: -100.0}).result().ids[0]
    assert other != plain


def test_a_failing_run_ends_those_in_it_and_no_others(
    engine_of: Callable[..., Engine], alone: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(slots=1)
    run, broken = engine._backend.run, threading.Event()

    def failing(stage: str, *arguments: Any) -> None:
        if stage == "coda" and not broken.is_set():
            broken.set()
            raise MemoryError("no room")
        run(stage, *arguments)

    monkeypatch.setattr(engine._backend, "run", failing)
    clients = [Client(engine, [1, 2, 3, 4], max_new_tokens=4) for _ in range(2)]
    with pytest.raises(MemoryError):
        clients[0].result()
    assert clients[1].result().ids == alone([1, 2, 3, 4], max_new_tokens=4).ids


def test_nothing_is_taken_after_the_end(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(slots=1)
    last = Client(engine, [1, 2, 3], max_new_tokens=3)
    engine.close(patience_s=20)
    assert len(last.result().ids) == 3
    with pytest.raises(QueueFull, match="the server is ending"):
        Client(engine, [1])


def test_the_policy_last_is_answered_as_alone(
    engine_of: Callable[..., Engine], alone: Callable[..., Generation], random: np.random.Generator
) -> None:
    """The rows that ``last`` repeats depend on the chunks of the prompt, so the cache does not keep them."""
    engine = engine_of(slots=1)
    options = {"policy": "last", "threshold": 0.3, "max_new_tokens": 6}
    ids = random.integers(0, VOCAB, 40).tolist()
    for _ in range(3):
        client = Client(engine, ids, **options)
        found, wanted = client.result(), alone(ids, **options)
        assert client.ticket.cached_tokens == len(engine.cache) == 0
        assert (found.ids, found.depths) == (wanted.ids, wanted.depths)
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-4)
        ids = [*ids, *found.ids, *random.integers(0, VOCAB, 5).tolist()]


def test_what_is_kept_takes_what_it_needs(engine_of: Callable[..., Engine]) -> None:
    """Not the room of the longest answer; nor do loop steps that are caught up later go beyond the limit."""
    engine = engine_of(slots=1, cache_bytes=200_000)
    for number in range(3):
        ends_at_once = {"logit_bias": {7: 100.0}, "stop_ids": [7]}
        Client(engine, [number, *range(39)], max_new_tokens=400, threshold=0.3, **ends_at_once).result()
    for _ in range(200):
        if not engine.cache.has_lagging:
            break
        time.sleep(0.01)
    assert not engine.cache.has_lagging
    assert len(engine.cache) > 0
    held = sum(entry.staircase.nbytes for entry in engine.cache._entries)
    assert 0 < held == engine.cache.nbytes <= 200_000


def test_a_cache_of_many_sequences_stays_quick(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(slots=1)
    for number in range(300):
        Client(engine, [number % 60, number // 60, *range(10)], max_new_tokens=1).result()
    assert len(engine.cache) == 256


def test_who_has_no_memory_yet_waits_for_it(engine_of: Callable[..., Engine], alone: Callable[..., Generation]) -> None:
    """A running request keeps its claim on memory that it has not written yet and that still looks free."""
    engine = engine_of(slots=4)
    one = engine._plan(Request([1, 2, 3], Options(max_new_tokens=200))).worst_bytes
    engine._room = int(one * 2.5)
    most = 0
    clients = [Client(engine, [1, 2, number], max_new_tokens=200, policy="full") for number in range(6)]
    while any(engine.load):
        most = max(most, engine.load[0])
        time.sleep(0.001)
    assert most == 2
    assert all(
        client.result().ids == alone([1, 2, number], max_new_tokens=200).ids for number, client in enumerate(clients)
    )
    engine._room = 10
    assert Client(engine, [1, 2, 3], max_new_tokens=3).result().ids == alone([1, 2, 3], max_new_tokens=3).ids


def test_a_fault_while_idle_costs_no_more_than_what_was_kept(
    engine_of: Callable[..., Engine], alone: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(slots=1)
    run = engine._backend.run

    def failing(stage: str, feeds: Any, outputs: Any) -> None:
        if stage == "step" and not any(engine.load):
            raise MemoryError("no room")
        run(stage, feeds, outputs)

    monkeypatch.setattr(engine._backend, "run", failing)
    for _ in range(2):
        ids = list(range(40))
        found = Client(engine, ids, max_new_tokens=8, threshold=0.3).result()
        assert found.ids == alone(ids, max_new_tokens=8, threshold=0.3).ids
        while engine.cache.has_lagging:
            time.sleep(0.001)
    assert engine.counts["forgotten"] == 2
    assert not engine.failed


def test_a_fault_of_its_own_is_told(engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(slots=1)

    def fault() -> None:
        raise SystemError("a fault")

    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    monkeypatch.setattr(engine, "_let_go", fault)
    with pytest.raises(MythosEdgeError, match="the engine ended: SystemError: a fault"):
        Client(engine, [1, 2, 3]).result()
    assert engine.failed
    with pytest.raises(QueueFull):
        Client(engine, [1, 2, 3])


def test_a_request_that_ends_in_a_loop_step_leaves_caches_of_use(
    engine_of: Callable[..., Engine], alone: Callable[..., Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where states are overwritten in place, as on a GPU."""
    engine = engine_of(slots=1)
    monkeypatch.setattr(engine._backend.memory, "updates_in_place", True, raising=False)
    model, depth = engine._session.model, Options().depth.resolve(engine._session.model)
    staircase = Staircase(engine._backend, model, depth, 100)
    together: Together[Any] = Together(engine._backend)
    for ids, leaves in (([1, 2, 3], False), ([4, 5], True)):
        together.join(0, staircase.feeding(np.array([ids]), np.array([0])))
        while together and not (leaves and together._waiting[0].call.stage == "step"):
            together.round()
        together.leave(0)
    assert (staircase.is_whole, staircase.columns) == (True, 3)


def test_what_was_interrupted_is_not_kept(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(slots=1)
    depth = Options().depth.resolve(engine._session.model)
    staircase = Staircase(engine._backend, engine._session.model, depth, 100)
    staircase.feed(np.array([range(20)]), np.array([19]))
    staircase._torn = True
    engine.cache.put(list(range(20)), staircase)
    assert len(engine.cache) == 0
