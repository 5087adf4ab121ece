"""``validate --level deep``: a target run over real tokens as a server would, with every stage call written down.

The tokens go in as two chunks, then one at a time; a draft of other tokens is rolled back in between, and loop steps
that lag are brought up once. What each call is fed is held against what the calls before it made: a cache row that
comes late, or stays after a rollback, shows here, whatever the graphs compute. Not here: whether they compute rightly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.stages import OWN
from mythos_edge.runtime.backends.memory import Rows, host_array
from mythos_edge.runtime.backends.packing import ROWS, Arrays, Call, declared
from mythos_edge.runtime.backends.protocol import Backend
from mythos_edge.runtime.halting import Depth, ResolvedDepth
from mythos_edge.runtime.staircase import Staircase

Array = NDArray[Any]
# The share of the positions that is prefill, and how many tokens are drafted and rolled back after it.
_PREFILL, DRAFT = 0.6, 2


class GraphTaps(Protocol):
    """The inside of one stage's graph; see ``exporter.taps``."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...


@dataclass(frozen=True)
class StageRun:
    """One run of a stage: the ``positions (S,)`` of its rows, all that was fed, and what the target made of it.

    ``step_index`` is 0 for the prelude, and the last loop step for the coda. ``values`` are the outputs of the backend
    by name, and what ``taps`` of the graph show, each (rows, channels); fewer rows are the last of the positions.
    """

    stage: str
    step_index: int
    positions: NDArray[np.int64]
    feeds: dict[str, Array]
    values: dict[str, Array]


@dataclass(frozen=True)
class Misfed:
    """A call that was fed something else than the calls before it made: ``run`` counts the calls."""

    run: int
    position: int
    step_index: int
    part: str
    what: str


class Recorder:
    """A backend that writes down every run in ``runs``, and in ``misfed`` what was not as it should be."""

    def __init__(self, backend: Backend, taps: Mapping[str, GraphTaps], depth: ResolvedDepth) -> None:
        self._backend, self._taps, self._depth = backend, taps, depth
        self.memory, self.max_context = backend.memory, backend.max_context
        self.runs: list[StageRun] = []
        self.misfed: list[Misfed] = []
        # By (stage, step_index, slot) the row of every position; by step_index the state that goes in, 0 the prelude's.
        self._rows: dict[tuple[str, int, int], list[Array]] = {}
        self._h: list[list[Array]] = [[] for _ in range(depth.max_depth + 1)]
        self._carried: dict[str, dict[int, Any]] = {"out": {}, "halt_mass": {}, "depth": {}}
        self._ids: list[Any] = []

    # What the driver says.

    def begin(self, ids: Sequence[int]) -> None:
        """The tokens that come next."""
        self._ids += ids

    def rollback(self, columns: int) -> None:
        """Forgets everything from position ``columns`` on."""
        del self._ids[columns:]
        for rows in [*self._rows.values(), *self._h]:
            del rows[columns:]
        for values in self._carried.values():
            for position in [one for one in values if one >= columns]:
                del values[position]

    def ended(self, start: int, depth: Array) -> None:
        """The chunk from ``start`` on is through, with the depth of every row."""
        for position, given in enumerate(depth.tolist(), start):
            mass, taken = self._carried["halt_mass"][position], int(self._carried["depth"][position])
            if taken < self._depth.max_depth and mass < self._depth.threshold:
                self._wrong(position, taken, "halting", f"ended after {taken} loop steps with a mass of {mass:.3g}")
            elif given != taken:
                self._wrong(position, taken - 1, "halting", f"is said to have depth {given}, but took {taken}")

    def state(self, step_index: int, position: int) -> Array | None:
        """The state of a position after a loop step, where it was computed."""
        rows = self._h[step_index + 1]
        return rows[position] if position < len(rows) else None

    # What the staircase asks for.

    def run(self, stage: str, feeds: Arrays, outputs: Arrays) -> None:
        given = {name: self._on_host(stage, name, rows).copy() for name, rows in feeds.items()}
        length, chunk = int(given["length"]), given[ROWS[stage]].shape[1]
        positions = length + np.arange(chunk)
        index = {"prelude": 0, "coda": self._depth.max_depth - 1}.get(stage)
        index = int(given["step_index"][0, 0]) if index is None else index
        self._check(stage, index, positions, given)
        values = self._taps[stage].run({**given, "positions": positions[None]}) if stage in self._taps else {}
        self._backend.run(stage, feeds, outputs)
        made = {name: self._on_host(stage, name, rows).copy() for name, rows in outputs.items()}
        self._take_in(stage, index, positions, made)
        flat = {name: array[0] if array.ndim > 2 else array[0][:, None] for name, array in made.items()}
        self.runs.append(StageRun(stage, index, positions, given, values | flat))

    def run_together(self, stage: str, calls: Sequence[Call]) -> None:
        for call in calls:
            self.run(stage, *call)

    def close(self) -> None:
        self._backend.close()

    def _on_host(self, stage: str, name: str, rows: Rows) -> Array:
        tensor = declared(stage, name)
        if tensor.on_host:
            return host_array(rows)
        return self.memory.to_floats(rows) if tensor.dtype == OWN else self.memory.to_host(rows)

    def _wrong(self, position: int, step_index: int, part: str, what: str) -> None:
        self.misfed.append(Misfed(len(self.runs), position, step_index, part, what))

    def _check(self, stage: str, index: int, positions: NDArray[np.int64], feeds: Mapping[str, Array]) -> None:
        first, chunk = int(positions[0]), len(positions)
        slots = sum(name.startswith("past_") for name in feeds)
        for slot in range(slots):
            known = self._rows.get((stage, index, slot), [])
            if first != len(known):
                self._wrong(min(first, len(known)), index, "cache", f"is computed where {len(known)} rows are known")
                continue
            self._check_rows(known, feeds[f"past_{slot}"][0], index, f"past_{slot}")
        if stage == "prelude":
            wanted = self._ids[first : first + chunk] + [None] * chunk
            self._check_each(positions, wanted[:chunk], feeds["input_ids"][0], index, "prelude", "input_ids")
        elif stage == "step":
            self._check_step(index, positions, feeds)
        else:
            out = [self._carried["out"].get(position) for position in positions.tolist()]
            self._check_each(positions, out, feeds["out"][0], index, "coda", "out")

    def _check_step(self, index: int, positions: NDArray[np.int64], feeds: Mapping[str, Array]) -> None:
        states = self._h[min(index, len(self._h) - 1)]
        wanted = {"h": states, "e": self._h[0]}
        for name, rows in wanted.items():
            known = [rows[position] if position < len(rows) else None for position in positions.tolist()]
            self._check_each(positions, known, feeds[name][0], index, "cache", name)
        active = positions[len(positions) - feeds["halt_mass"].shape[1] :]
        for name, values in self._carried.items():
            carried = [values.get(position) for position in active.tolist()]
            self._check_each(active, carried, feeds[name][0], index, "halting", name)
        for name, number in (("threshold", np.float32(self._depth.threshold)), ("min_depth", self._depth.min_depth)):
            if feeds[name] != number:
                self._wrong(int(positions[0]), index, "halting", f"has {name} {feeds[name]}, not {number}")

    def _check_rows(self, known: list[Array], past: Array, index: int, name: str) -> None:
        """The fed rows, the last of all where a window gives up the earlier ones, are those that were made."""
        first = len(known) - len(past)
        if first < 0:
            self._wrong(len(known), index, "cache", f"has {len(past)} rows in {name}, not {len(known)}")
            return
        self._check_each(np.arange(first, len(known)), known[first:], past, index, "cache", name)

    def _check_each(
        self, positions: NDArray[np.int64], wanted: Sequence[Any], given: Array, index: int, part: str, name: str
    ) -> None:
        for position, one, other in zip(positions.tolist(), wanted, given, strict=True):
            if one is None or not np.array_equal(one, other, equal_nan=given.dtype.kind == "f"):
                self._wrong(position, index, part, f"was fed another {name} than was made for it")
                return

    def _take_in(self, stage: str, index: int, positions: NDArray[np.int64], made: Mapping[str, Array]) -> None:
        first = int(positions[0])
        for name in made:
            if name.startswith("rows_"):
                rows = self._rows.setdefault((stage, index, int(name.removeprefix("rows_"))), [])
                rows[first:] = list(made[name][0])
        if stage == "prelude":
            self._h[0][first:] = list(made["e"][0])
            for position in positions.tolist():
                nothing = np.zeros_like(made["e"][0, 0])
                self._carried["out"][position], self._carried["halt_mass"][position] = nothing, np.float32(0)
                self._carried["depth"][position] = 0
        if stage == "step" and index + 1 < len(self._h):
            self._h[index + 1][first:] = list(made["h_next"][0])
            active = positions[len(positions) - made["halt_mass_next"].shape[1] :]
            for name, values in self._carried.items():
                values.update(zip(active.tolist(), made[f"{name}_next"][0], strict=True))


@dataclass(frozen=True)
class TargetRun:
    """A target's run over ``ids (S,)``: its calls, what was misfed, and its results.

    ``logits (S, V)``, ``depth (S,)``, and the states ``h (M, S, D)`` after each loop step, NaN where none was needed.
    """

    ids: NDArray[np.int64]
    threshold: float
    runs: list[StageRun]
    misfed: list[Misfed]
    logits: Array
    depth: Array
    h: Array


def target_run(
    bundle: Bundle, backend: Backend, taps: Mapping[str, GraphTaps], ids: NDArray[np.int64], threshold: float
) -> TargetRun:
    """Runs a target over ``ids (S,)`` with halting at ``threshold``; see the module."""
    model, vocabulary = bundle.manifest.model, bundle.manifest.model.vocab_size
    depth = Depth(threshold=threshold if model.halts else None).resolve(model)
    recorder = Recorder(backend, taps, depth)
    stairs = Staircase(recorder, model, depth, bundle.manifest.max_context)
    logits: list[Array] = []
    depths: list[Array] = []

    def feed(start: int, tokens: NDArray[np.int64], keep: bool = True) -> None:
        recorder.begin(tokens.tolist())
        fed = stairs.feed(tokens[None], np.arange(len(tokens)))
        recorder.ended(start, fed.depth[0])
        if keep:
            logits.append(fed.logits[0])
            depths.append(fed.depth[0])

    count = len(ids)
    prefill = max(1, min(count, round(count * _PREFILL)))
    half = max(1, prefill // 2)
    for start, stop in ((0, half), (half, prefill)):
        if start < stop:
            feed(start, ids[start:stop])
    draft = min(DRAFT, bundle.manifest.max_context - prefill)
    for number in range(draft):
        feed(prefill + number, (ids[number : number + 1] + 1) % vocabulary, keep=False)
    stairs.rollback(prefill)
    recorder.rollback(prefill)
    for position in range(prefill, count):
        if position == (prefill + count) // 2:
            stairs.flush()
        feed(position, ids[position : position + 1])
    h = np.full((depth.max_depth, count, model.dim), np.nan, np.float32)
    for index, position in np.ndindex(depth.max_depth, count):
        state = recorder.state(index, position)
        if state is not None:
            h[index, position] = state
    return TargetRun(ids, threshold, recorder.runs, recorder.misfed, np.concatenate(logits), np.concatenate(depths), h)
