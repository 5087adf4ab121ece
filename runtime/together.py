"""Who runs the stages that sequences ask for: one sequence alone, or several that share the reading of weights.

What a sequence has to do is a generator, its **work**: it yields the next stage call it needs, goes on when that has
been run, and returns its result. Not here: what is asked for, and how a stage runs.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from mythos_edge.model.stages import MAX_TOGETHER
from mythos_edge.runtime.backends.memory import host_array
from mythos_edge.runtime.backends.packing import REQUEST, ROWS, Arrays, Call
from mythos_edge.runtime.backends.protocol import Backend

# Rows that one shared run takes in: more are not bound by reading weights, and would only make everybody wait.
MAX_ROWS = 512
# Runs of other kinds that a call waits for at most: one of a rare kind would else wait as long as others come.
PATIENCE = 12


class StageCall(NamedTuple):
    """One run of a stage for one sequence; see ``Backend.run``."""

    stage: str
    feeds: Arrays
    outputs: Arrays

    @property
    def rows(self) -> int:
        """The new positions in it."""
        return int(self.feeds[ROWS[self.stage]].shape[1])

    @property
    def kind(self) -> tuple[Any, ...]:
        """Calls of one kind can share a run: those of one stage whose requests have equal scalars."""
        return (self.stage, *(host_array(self.feeds[name]).item() for name in REQUEST[self.stage]))


class NotRun(Exception):
    """Thrown into a work that ends at a call which nobody has begun to run."""


Result = TypeVar("Result")
Work: TypeAlias = Generator[StageCall, None, Result]


def run_alone(work: Work[Result], backend: Backend, note: Callable[[StageCall, float], None] | None = None) -> Result:
    """The result of ``work``; an error or interrupt in a stage closes it, so that it can tidy up.

    ``note`` is told of every call the seconds until the next one was asked for.
    """
    call, started = None, 0.0
    try:
        while True:
            try:
                following = next(work)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            finally:
                now = time.perf_counter()
                if note is not None and call is not None:
                    note(call, now - started)
            call, started = following, now
            backend.run(*call)
    finally:
        work.close()


@dataclass(frozen=True)
class _Waiting:
    """A work, the call it waits for, and the number of the round since which it does."""

    number: int
    call: StageCall
    since: int


class Together(Generic[Result]):
    """Works of different sequences that share runs; others may join, and leave, between two ``round``.

    A work that has ended is in ``results`` or in ``errors``, by its number. ``runs`` counts the runs of every stage, a
    shared one once.
    """

    def __init__(self, backend: Backend) -> None:
        self.results: dict[int, Result] = {}
        self.errors: dict[int, Exception] = {}
        self.runs: Counter[str] = Counter()
        self._backend = backend
        self._works: dict[int, Work[Result]] = {}
        self._waiting: list[_Waiting] = []
        self._rounds = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, number: int, work: Work[Result]) -> None:
        """Takes in a work under a number that no other has."""
        self._works[number] = work
        self._resume(number)

    def leave(self, number: int) -> None:
        """Ends a work where it is, between two of its calls."""
        others = [item for item in self._waiting if item.number != number]
        waits, self._waiting = len(others) < len(self._waiting), others
        if (work := self._works.pop(number, None)) is None:
            return
        if waits:
            with suppress(NotRun):
                work.throw(NotRun())
        else:  # interrupted inside a run
            work.close()

    def round(self) -> None:
        """Runs the stage that most works wait for, or one has waited for too long, as far as one run takes them."""
        self._rounds += 1
        first = self._waiting[0]
        chosen = _chosen(self._waiting, first.call.kind if self._rounds - first.since > PATIENCE else None)
        # Who was served goes to the end of the queue, so that the first has waited longest.
        self._waiting = [item for item in self._waiting if all(item is not served for served in chosen)]
        try:
            _run([item.call for item in chosen], self._backend)
        except Exception as error:  # each work in the run gets it and may tidy up; the others go on
            for item in chosen:
                self._resume(item.number, error)
        else:
            self.runs[chosen[0].call.stage] += 1
            for item in chosen:
                self._resume(item.number)

    def close(self) -> None:
        """Ends all works where they are."""
        for number in list(self._works):
            self.leave(number)

    def _resume(self, number: int, error: Exception | None = None) -> None:
        work = self._works[number]
        try:
            call = next(work) if error is None else work.throw(error)
        except StopIteration as end:
            self.results[number] = end.value
        except Exception as failure:  # the result of this work alone, for the caller to read
            self.errors[number] = failure
        else:
            self._waiting.append(_Waiting(number, call, self._rounds))
            return
        del self._works[number]


def run_together(works: Sequence[Work[Result]], backend: Backend) -> tuple[list[Result], Counter[str]]:
    """The results of ``works`` of different sequences, and the runs of every stage, a shared one counted once."""
    together: Together[Result] = Together(backend)
    try:
        for number, work in enumerate(works):
            together.join(number, work)
        while together and not together.errors:
            together.round()
    finally:
        together.close()
        for work in works:
            work.close()
    for error in together.errors.values():
        raise error
    return [together.results[number] for number in range(len(works))], together.runs


def _chosen(waiting: list[_Waiting], kind: tuple[Any, ...] | None) -> list[_Waiting]:
    """Those who share the next run: of ``kind``, or of the one that most wait for; the longest waiting first."""
    if kind is None:
        votes = Counter(item.call.kind for item in waiting)
        kind = max(votes, key=lambda kind: (votes[kind], kind[0] == "step"))
    chosen: list[_Waiting] = []
    rows = 0
    for item in waiting:
        fits = not chosen or rows + item.call.rows <= MAX_ROWS
        if item.call.kind == kind and fits and len(chosen) < MAX_TOGETHER:
            chosen.append(item)
            rows += item.call.rows
    return chosen


def _run(calls: list[StageCall], backend: Backend) -> None:
    if len(calls) == 1:
        backend.run(*calls[0])
    else:
        backend.run_together(calls[0].stage, [Call(call.feeds, call.outputs) for call in calls])
