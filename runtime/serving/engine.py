"""Continuous batching: the requests of many clients share runs, and what was computed for one serves the next.

One thread owns the backend. Between two runs of a stage it lets in requests that wait, as far as there are slots, and
lets go of those that nobody wants any more. A request that is done leaves its caches to the prompt cache. While there
is nothing to do, skipped loop steps of these are caught up. Not here: HTTP (``app``).
"""

import threading
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from mythos_edge.model.errors import CapacityError, MythosEdgeError
from mythos_edge.runtime.backends.protocol import Backend
from mythos_edge.runtime.caches import CachePlan, plan_cache, plan_in, require_memory
from mythos_edge.runtime.decoding import Decoding, Generation, TextSoFar, Token, TokenSequence
from mythos_edge.runtime.options import Options
from mythos_edge.runtime.prompts import check_range
from mythos_edge.runtime.sampling import Sampler
from mythos_edge.runtime.serving.prompt_cache import PromptCache
from mythos_edge.runtime.session import Session
from mythos_edge.runtime.speculation import check_draft
from mythos_edge.runtime.staircase import Staircase
from mythos_edge.runtime.together import Together, Work


class QueueFull(CapacityError):
    """More requests wait than the server keeps."""


class TimedOut(MythosEdgeError):
    """A request was not done in the time that it has."""


# What a listener is told: every token, and at the end the whole or why there is none.
Event: TypeAlias = Token | Generation | Exception
Listener: TypeAlias = Callable[[Event], None]


@dataclass(frozen=True)
class Request:
    """One completion: the prompt's ``ids``, its options, what is added to logits, and when it is too late
    (``time.monotonic``)."""

    ids: Sequence[int]
    options: Options
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    deadline: float = float("inf")


class Ticket:
    """A request that was taken: ``cancel`` ends it. ``cached_tokens`` of its prompt were not computed again."""

    def __init__(self, number: int, request: Request, listener: Listener) -> None:
        self.number, self.request, self.tell = number, request, listener
        self.cancelled = False
        self.cached_tokens = 0
        self.worst_bytes = 0
        self.sequence: TokenSequence | None = None
        self.result = Generation()

    def cancel(self) -> None:
        """Ends the request between two runs; its listener hears nothing more."""
        self.cancelled = True


class Engine:
    """Runs requests on the backend of ``session``, which nobody else may use meanwhile.

    At most ``slots`` run at once and ``queue`` wait. ``cache_bytes`` bounds what is kept of requests that are done.
    """

    def __init__(self, session: Session, slots: int = 8, queue: int = 64, cache_bytes: int = 2 << 30) -> None:
        self.slots, self.queue = slots, queue
        self.counts: Counter[str] = Counter()
        """Sums since the start: requests by how they ended, tokens, block calls."""
        self.depths: Counter[int] = Counter()
        """Generated tokens by their depth."""
        self.cache = PromptCache(cache_bytes)
        self._session = session
        self._backend: Backend = session.backend
        self._waiting: deque[Ticket] = deque()
        self._active: dict[int, Ticket] = {}
        self._together: Together[None] = Together(self._backend)
        self._news = threading.Condition()
        self._closing = False
        self.failed = False
        """Whether the engine ended by a fault of its own: it takes nothing more."""
        # Bytes for the caches of all requests and what is kept; memory that is not written yet looks free.
        self._room = self._backend.memory.free_bytes()
        self._numbers = 0
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run, and requests that wait."""
        return len(self._active), len(self._waiting)

    @property
    def fair_context(self) -> int:
        """Positions for which every slot has memory while all are taken, at most those that the model takes."""
        model, memory, most = self._session.model, self._backend.memory, self._session.max_context
        if self._room is None:
            return most
        plan = partial(
            plan_cache,
            model,
            model.deepest,
            value_bytes=memory.dtype.itemsize,
            row_bytes=model.row_bytes(memory.cache),
            all_columns=memory.keeps_all_columns,
        )
        share, contexts = self._room // self.slots, range(1, most + 1)
        return max(1, bisect_right(contexts, share, key=lambda n: plan(n).worst_bytes))

    @property
    def runs(self) -> Mapping[str, int]:
        """Runs of every stage, shared ones counted once."""
        return self._together.runs

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Takes a request; ``listener`` is called by the engine's thread.

        Raises QueueFull, CapacityError, UsageError.
        """
        limit = self._session.max_context
        if len(request.ids) > limit:
            raise CapacityError(
                f"the prompt has {len(request.ids)} tokens, this model takes {limit}: shorten it, or export with "
                "--max-context"
            )
        check_range(request.ids, self._session.model)
        check_range(list(request.logit_bias), self._session.model, "logit_bias of token")
        check_draft(request.options.draft_depth, request.options.depth.resolve(self._session.model))
        TextSoFar(self._session.tokenizer, request.options)
        with self._news:
            if self._closing:
                raise QueueFull("the server is ending")
            if sum(self.load) >= self.slots + self.queue:
                raise QueueFull(f"{self.slots} requests run and {self.queue} wait already: try again later")
            self._numbers += 1
            ticket = Ticket(self._numbers, request, listener)
            self._waiting.append(ticket)
            self._news.notify()
        return ticket

    def close(self, patience_s: float = 0.0) -> None:
        """Takes nothing more, gives what runs ``patience_s`` to end, and ends it."""
        with self._news:
            self._closing = True
            self._news.notify()
        until = time.monotonic() + patience_s
        while any(self.load) and time.monotonic() < until and self._thread.is_alive():
            time.sleep(0.01)
        with self._news:
            for ticket in [*self._waiting, *self._active.values()]:
                ticket.cancel()
            self._news.notify()
        self._thread.join()

    def _serve(self) -> None:
        try:
            self._serve_all()
        except BaseException as error:
            # A fault of ours: nobody may wait for what does not come.
            with self._news:
                self._closing = self.failed = True
            for ticket in [*self._waiting, *self._active.values()]:
                ticket.tell(MythosEdgeError(f"the engine ended: {type(error).__name__}: {error}"))
            raise

    def _serve_all(self) -> None:
        while True:
            with self._news:
                while not (self._active or self._waiting or self._has_idle_work()):
                    if self._closing:
                        return
                    self._news.wait()
            self._let_in()
            self._let_go()
            if self._together:
                self._together.round()
                self._end_finished()
            elif not self._waiting and self._has_idle_work():
                self._catch_up()

    def _let_in(self) -> None:
        """Gives free slots to those that wait, the longest waiting first, as far as there is memory for them."""
        # Nobody else takes from the queue.
        while self._waiting and len(self._active) < self.slots and self._has_room_for(self._waiting[0]):
            with self._news:
                ticket = self._waiting.popleft()
                self._active[ticket.number] = ticket
            if ticket.cancelled:
                continue
            try:
                work = self._begin(ticket)
            except Exception as error:  # of this request alone; the others go on
                self._end(ticket, error)
                continue
            self._together.join(ticket.number, work)
        self._end_finished()

    def _plan(self, request: Request) -> CachePlan:
        """The memory that a request takes at most."""
        model, memory = self._session.model, self._backend.memory
        columns = min(len(request.ids) + request.options.max_new_tokens, self._session.max_context)
        depth = request.options.depth.resolve(model)
        return plan_in(memory, model, depth.max_depth, columns, chunk=request.options.chunk)

    def _held_back(self) -> int:
        """The bytes that all who run may come to take."""
        return sum(ticket.worst_bytes for ticket in self._active.values())

    def _has_room_for(self, ticket: Ticket) -> bool:
        """Whether a request need not wait for the memory of those who run; alone it is let in, or refused."""
        wanted = self._plan(ticket.request).worst_bytes
        return not self._active or self._room is None or self._held_back() + wanted <= self._room

    def _make_room(self, plan: CachePlan, held: int) -> None:
        """Forgets of the prompt cache what a request needs. Raises CapacityError where that is not enough."""
        if self._room is not None:
            self.cache.shrink(min(self.cache.limit, self._room - self._held_back()))
        try:
            require_memory(plan, held, self._backend.memory.free_bytes())
        except CapacityError:
            self.cache.shrink(0)
            require_memory(plan, held, self._backend.memory.free_bytes())

    def _begin(self, ticket: Ticket) -> Work[None]:
        """The work of a request, on what the prompt cache has of its prompt."""
        request, session, plan = ticket.request, self._session, self._plan(ticket.request)
        options, model = request.options, session.model
        depth, ids = options.depth.resolve(model), list(request.ids)
        staircase = self.cache.take(ids, depth)
        ticket.worst_bytes = plan.worst_bytes
        self._make_room(plan, 0 if staircase is None else staircase.nbytes)
        ticket.cached_tokens = 0 if staircase is None else staircase.columns
        staircase = staircase or Staircase(self._backend, model, depth, session.max_context, options.max_lag)
        staircase.max_lag = options.max_lag
        staircase.expect(plan.context)
        ticket.sequence = TokenSequence(ids, staircase, Sampler(options.sampling, request.logit_bias))
        text = TextSoFar(session.tokenizer, options)
        ends = tuple(token.id for token in session.bundle.manifest.end_tokens)
        stop_ids = ends if options.stop_ids is None else options.stop_ids
        decoding = Decoding(ticket.sequence, options, (*stop_ids, *text.stop_ids), text, ticket.result)

        def working() -> Work[None]:
            while not decoding.finished:
                token = yield from decoding.advance()
                self.depths[token.depth] += 1
                ticket.tell(token)

        return working()

    def _let_go(self) -> None:
        """Ends the requests that nobody wants any more, and those whose time is over."""
        now = time.monotonic()
        for ticket in list(self._active.values()):
            late = now > ticket.request.deadline
            if ticket.cancelled or late:
                self._together.leave(ticket.number)
                self._end(ticket, TimedOut("the request took longer than the server allows") if late else None)
        with self._news:
            gone = [ticket for ticket in self._waiting if ticket.cancelled or now > ticket.request.deadline]
            for ticket in gone:
                self._waiting.remove(ticket)
        for ticket in gone:
            self._end(ticket, TimedOut("the request waited longer than the server allows"))

    def _end_finished(self) -> None:
        for number in list(self._together.results):
            del self._together.results[number]
            self._end(self._active[number], self._active[number].result)
        for number, error in list(self._together.errors.items()):
            del self._together.errors[number]
            self._end(self._active[number], error)

    def _end(self, ticket: Ticket, how: Generation | Exception | None) -> None:
        self._active.pop(ticket.number, None)
        result = ticket.result
        kind = "cancelled" if ticket.cancelled else "failed" if isinstance(how, Exception) else "done"
        self.counts[kind] += 1
        self.counts["prompt_tokens"] += len(ticket.request.ids)
        self.counts["cached_tokens"] += ticket.cached_tokens
        self.counts["generated_tokens"] += len(result.ids)
        self.counts["block_calls"] += result.block_calls
        self.counts["drafted_tokens"] += result.drafted
        self.counts["accepted_tokens"] += result.accepted
        sequence, ticket.sequence = ticket.sequence, None
        if sequence is not None and (isinstance(how, TimedOut) or not isinstance(how, Exception)):
            self.cache.put(sequence.ids, sequence.staircase)
        if how is not None and not ticket.cancelled:
            ticket.tell(how)

    def _has_idle_work(self) -> bool:
        return not self._closing and self.cache.has_lagging

    def _catch_up(self) -> None:
        try:
            self.cache.catch_up(lambda: bool(self._waiting) or self._closing)
        except Exception:  # of what may be forgotten, and is; requests go on
            self.counts["forgotten"] += 1
