"""Who runs the stages that sequences ask for: one sequence alone, or several that share the reading of weights.

What a sequence has to do is a generator, its **work**: it yields the next stage call it needs, goes on when that has
been run, and returns its result. Not here: what is asked for, and how a stage runs.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar

from mythos_edge.model.stages import MAX_TOGETHER
from mythos_edge.runtime.backends.packing import ROWS, Arrays, Call
from mythos_edge.runtime.backends.protocol import Backend

# Rows that one shared run takes in: more are not bound by reading weights, and would only make everybody wait.
MAX_ROWS = 512


class StageCall(NamedTuple):
    """One run of a stage for one sequence; see ``Backend.run``."""

    stage: str
    feeds: Arrays
    outputs: Arrays

    @property
    def rows(self) -> int:
        """The new positions in it."""
        return int(self.feeds[ROWS[self.stage]].shape[1])


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
    """A work and the call it waits for."""

    number: int
    call: StageCall


def run_together(works: Sequence[Work[Result]], backend: Backend) -> tuple[list[Result], Counter[str]]:
    """The results of ``works`` of different sequences, and the runs of every stage, a shared one counted once.

    In every round the stage that most of them wait for is run for all of those, as far as one run takes them.
    """
    results: dict[int, Result] = {}
    runs: Counter[str] = Counter()

    def resumed(number: int) -> list[_Waiting]:
        try:
            return [_Waiting(number, next(works[number]))]
        except StopIteration as end:
            results[number] = end.value
            return []

    try:
        waiting = [item for number in range(len(works)) for item in resumed(number)]
        while waiting:
            chosen = _chosen(waiting)
            _run([item.call for item in chosen], backend)
            runs[chosen[0].call.stage] += 1
            # Who was served goes to the end of the queue.
            waiting = [item for item in waiting if all(item is not served for served in chosen)]
            waiting += [again for item in chosen for again in resumed(item.number)]
    finally:
        for work in works:
            work.close()
    return [results[number] for number in range(len(works))], runs


def _chosen(waiting: list[_Waiting]) -> list[_Waiting]:
    """Those who share the next run: of the stage that most wait for, the longest waiting first."""
    votes = Counter(item.call.stage for item in waiting)
    stage = max(votes, key=lambda name: (votes[name], name == "step"))
    chosen: list[_Waiting] = []
    rows = 0
    for item in waiting:
        fits = not chosen or rows + item.call.rows <= MAX_ROWS
        if item.call.stage == stage and fits and len(chosen) < MAX_TOGETHER:
            chosen.append(item)
            rows += item.call.rows
    return chosen


def _run(calls: list[StageCall], backend: Backend) -> None:
    if len(calls) == 1:
        backend.run(*calls[0])
    else:
        backend.run_together(calls[0].stage, [Call(call.feeds, call.outputs) for call in calls])
