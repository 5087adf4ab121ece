"""``validate --level deep``: compares a target's calls and its free run with the reference's, value by value."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.looped import LoopedModel
from mythos_edge.model.manifest import NEAR_TIE_MARGIN
from mythos_edge.runtime.parity import NOISE_FACTOR
from mythos_edge.scripts.deep_reference import FreeRun, Local, chosen_of
from mythos_edge.scripts.deep_report import PARTS, Disagreement, Divergence, Tie
from mythos_edge.scripts.deep_run import Misfed, StageRun, TargetRun

Array = NDArray[Any]
# The least error that counts, as a share of the largest value of its kind. Errors do not pile up over parts here, so
# it is less than that of logits, but more than what one float32 sum in another order gives.
LOCAL_FLOOR = 1e-6
_ROUTED = ("experts.", "lora.", "h_next", "halt_mass_next", "depth_next", "out_next")
# The choice of the router, where a graph or a reference has it apart from the scores.
_CHOSEN = "chosen.0"
_HALTING = ("halt_mass_next", "depth_next", "out_next")


def part_of(stage: str, name: str) -> str:
    """The part of the model that a value is made by."""
    if stage != "step":
        return stage
    if name in _HALTING:
        return "halting"
    if name == "h_next":
        return "injection"
    return "attention" if name.startswith("rows_") else name.partition(".")[0]


@dataclass
class LocalFindings:
    """The findings of the comparison of calls: ``error (P, M, S)`` as in ``DeepReport``, and the first divergence, with
    the number of the call that showed it."""

    error: Array
    divergence: Divergence | None = None
    call: int = -1
    ties: list[Tie] = field(default_factory=list)
    disagreements: list[Disagreement] = field(default_factory=list)
    choices: int = 0
    missing: dict[str, None] = field(default_factory=dict)


class LocalComparison:
    """Compares the calls of a ``target`` with the reference's values for the same inputs.

    ``allowance`` adds to what is allowed, by stage and name, as for rounded activations.
    """

    def __init__(
        self,
        target: TargetRun,
        local: Local,
        model: LoopedModel,
        allowance: Mapping[tuple[str, str], float] | None = None,
    ) -> None:
        self._target, self._local, self._top_k = target, local, model.experts_per_token
        # No mass of a gate reaches a threshold of 1.
        self._halts = model.halts and (model.exit_rule == "weighted" or target.threshold < 1)
        self._allowance = allowance or {}
        steps, count = target.h.shape[:2]
        self.found = LocalFindings(np.full((len(PARTS), steps, count), np.nan))

    def findings(self) -> LocalFindings:
        """Compares all calls, in the order in which they ran."""
        misfed = list(self._target.misfed)
        for number, run in enumerate(self._target.runs):
            while misfed and misfed[0].run <= number:
                self._take(_misfed(misfed.pop(0)))
            before = self.found.divergence
            self._compare(run, self._local.exact[number], self._excused(number, len(run.positions)))
            if before is None and self.found.divergence is not None:
                self.found.call = number
        for one in misfed:
            self._take(_misfed(one))
        return self.found

    def allowed(self, stage: str, name: str) -> float:
        """The largest absolute error of a value that is no divergence."""
        key = stage, name
        own, largest = self._local.own_error.get(key, 0.0), self._local.largest.get(key, 0.0)
        return NOISE_FACTOR * max(own, LOCAL_FLOOR * largest) + self._allowance.get(key, 0.0)

    def _excused(self, number: int, rows: int) -> NDArray[np.bool_]:
        known = self._local.excused
        return known[number].copy() if known else np.zeros(rows, np.bool_)

    def _take(self, divergence: Divergence) -> None:
        if self.found.divergence is None:
            self.found.divergence = divergence

    def _compare(self, run: StageRun, wanted: Mapping[str, Array], excused: NDArray[np.bool_]) -> None:
        count = len(run.positions)
        for name, exact in wanted.items():
            if name == _CHOSEN:
                continue
            part = part_of(run.stage, name)
            if name not in run.values:
                self.found.missing.setdefault(f"{run.stage}: {name}")
                if name == "router.0":
                    excused |= chosen_of(exact, self._top_k)[1] < NEAR_TIE_MARGIN
                continue
            given = run.values[name]
            if not exact.size or exact.shape != given.shape:
                if exact.shape != given.shape:
                    self._take(Divergence(int(run.positions[0]), run.step_index, part, "graph", name))
                continue
            active = slice(count - len(exact), count)
            compared = ~excused[active] if name.startswith(_ROUTED) else np.ones(len(exact), np.bool_)
            if name == "depth_next":
                tied = self._halting_ties(run, wanted, active)
                excused[active] |= tied
                compared &= ~tied
            self._value(run, name, exact, given, compared)
            if name == "router.0":
                excused |= self._choices(run, wanted, given)

    def _value(self, run: StageRun, name: str, exact: Array, given: Array, compared: NDArray[np.bool_]) -> None:
        allowed, part = self.allowed(run.stage, name), part_of(run.stage, name)
        error = np.abs(exact.astype(np.float64) - given)
        # What is no number on both sides agrees.
        error = np.where(np.isnan(error) & (np.isnan(exact) == np.isnan(given)), 0.0, error).max(-1)
        error = np.where(np.isnan(error), np.inf, error)
        share = np.where(error == 0, 0.0, error / max(allowed, np.finfo(np.float64).tiny))
        positions = run.positions[len(run.positions) - len(exact) :]
        for position, one in zip(positions[compared].tolist(), share[compared].tolist(), strict=True):
            self._enter(part, run.step_index, position, one)
        wrong = compared & (share > 1)
        if wrong.any():
            at = int(wrong.argmax())
            kind = "rotary" if _is_turned(name, exact[wrong], given[wrong], allowed) else "graph"
            found = Divergence(int(positions[at]), run.step_index, part, kind, name, float(error[at]), allowed)
            self._take(found)

    def _enter(self, part: str, step_index: int, position: int, share: float) -> None:
        place = PARTS.index(part), min(step_index, self.found.error.shape[1] - 1), position
        if position < self.found.error.shape[2]:
            known = self.found.error[place]
            self.found.error[place] = share if np.isnan(known) else max(known, share)

    def _choices(self, run: StageRun, values: Mapping[str, Array], given: Array) -> NDArray[np.bool_]:
        """Takes down where other experts were chosen; True for rows that a tie excuses."""
        wanted, margin = chosen_of(values["router.0"], self._top_k)
        if _CHOSEN in values:
            wanted = np.sort(values[_CHOSEN], axis=-1)
        chosen = chosen_of(given, self._top_k)[0]
        # Two scores may each be off by as much.
        tie = margin <= max(2 * self.allowed(run.stage, "router.0"), NEAR_TIE_MARGIN)
        if _CHOSEN in run.values:
            real = run.values[_CHOSEN]
            if real.shape != wanted.shape:
                self._take(Divergence(int(run.positions[0]), run.step_index, "router", "graph", _CHOSEN))
                return tie
            chosen = np.sort(real, axis=-1)
        other = (wanted != chosen).any(-1)
        self.found.choices += len(wanted)
        rows = zip(run.positions.tolist(), other.tolist(), tie.tolist(), margin.tolist(), strict=True)
        for position, differs, near, distance in rows:
            if near:
                self.found.ties.append(Tie(position, run.step_index, "router tie", distance, differs))
            if differs:
                self.found.disagreements.append(Disagreement(position, run.step_index, distance, near))
                if not near:
                    self._enter("router", run.step_index, position, np.inf)
                    what = f"chose others by a margin of {distance:.2g}"
                    self._take(Divergence(position, run.step_index, "router", "graph", _CHOSEN, distance, 0.0, what))
        excused: NDArray[np.bool_] = tie & other
        return excused

    def _halting_ties(self, run: StageRun, wanted: Mapping[str, Array], active: slice) -> NDArray[np.bool_]:
        """Rows whose halting was decided by less than what is allowed, before or after this loop step."""
        if not self._halts:
            return np.zeros(len(wanted["halt_mass_next"]), np.bool_)
        threshold = float(run.feeds["threshold"])
        margin = np.abs(wanted["halt_mass_next"][:, 0] - threshold)
        tie = margin <= max(self.allowed("step", "halt_mass_next"), NEAR_TIE_MARGIN)
        for position, distance in zip(run.positions[active][tie].tolist(), margin[tie].tolist(), strict=True):
            self.found.ties.append(Tie(position, run.step_index, "halting tie", distance, False))
        result: NDArray[np.bool_] = tie
        return result


def _misfed(one: Misfed) -> Divergence:
    return Divergence(one.position, one.step_index, one.part, "cache", "feeds", detail=one.what)


def _is_turned(name: str, exact: Array, given: Array, allowed: float) -> bool:
    """Whether cached rows differ, but have the lengths that they should have."""
    if not name.startswith("rows_"):
        return False
    lengths = [np.linalg.norm(rows.astype(np.float64), axis=-1) for rows in (exact, given)]
    return bool((np.abs(lengths[0] - lengths[1]) <= 2 * allowed * np.sqrt(exact.shape[-1])).all())


@dataclass(frozen=True)
class Growth:
    """How errors grow over the loop steps of the free run, and where they are first more than allowed."""

    target: Array
    reference: Array
    depth: NDArray[np.int64]
    max_abs: float
    allowed: float
    divergence: Divergence | None


def growth_of(
    target: TargetRun,
    exact: FreeRun,
    noisy: Sequence[FreeRun],
    top_k: int,
    floor: float,
    beside: FreeRun | None = None,
) -> Growth:
    """Compares the free run with the reference's, or with the one ``beside`` that errs, too, up to where a tie parts
    them.

    ``floor`` is the share of the largest logit that always is allowed.
    """
    factor = NOISE_FACTOR if beside is None else 2 * NOISE_FACTOR
    alone, beside = beside is None, beside or exact
    parted = np.zeros(len(target.ids), np.bool_)
    own_h, own_logits = np.zeros(len(exact.h)), 0.0
    for run in noisy:
        same = ~np.logical_or.accumulate(_other_choices(exact, run, top_k))
        parted |= ~same
        if same.any():
            own_h = np.maximum(own_h, [_relative(exact.h[i], run.h[i])[same].max() for i in range(len(own_h))])
            own_logits = max(own_logits, float(np.abs(exact.logits - run.logits)[same].max()))
    differs = target.depth != beside.depth
    margin = np.abs(exact.mass - target.threshold)
    at = np.clip(np.minimum(target.depth, beside.depth) - 1, 0, len(exact.h) - 1)
    halting_tie = differs & (margin[at, np.arange(len(at))] < NEAR_TIE_MARGIN)
    after = np.logical_or.accumulate(halting_tie) | parted | np.logical_or.accumulate(_router_ties(exact, top_k))
    shares = np.stack([_relative(wanted, given) for wanted, given in zip(beside.h, target.h, strict=True)])
    clear = np.where(after, np.nan, shares)
    errors = np.abs(beside.logits - target.logits).max(-1)
    allowed = factor * max(own_logits, floor * float(np.abs(exact.logits).max()))
    wrong = ~after & ((errors > allowed) | np.isnan(errors) | differs)
    divergence = None
    if wrong.any():
        position = int(wrong.argmax())
        beyond = clear[:, position] > factor * np.maximum(own_h, floor)
        step = int(beyond.argmax()) if beyond.any() else len(own_h) - 1
        error = float(errors[position])
        divergence = Divergence(position, step, "injection", "precision growth", "logits", error, allowed)
        if differs[position] and not beyond.any():
            # The states agree, so that nothing but the halting mass near its threshold tells the two apart.
            took = f"takes {target.depth[position]} loop steps, not {beside.depth[position]}"
            near, last = float(margin[at[position], position]), int(at[position])
            divergence = Divergence(position, last, "halting", "halting tie", "depth", near, NEAR_TIE_MARGIN, took)
        elif alone and beyond.any():  # what another target chose is not known
            divergence = _other_choice(target, exact, position, step, top_k) or divergence
    largest = np.array([np.nanmax(row, initial=0.0) for row in clear])
    counted = errors[~after]
    most = float(counted.max()) if counted.size else float("nan")
    return Growth(largest, own_h, beside.depth, most, allowed, divergence)


def _other_choice(target: TargetRun, exact: FreeRun, position: int, step: int, top_k: int) -> Divergence | None:
    """The choice of other experts at which the state of a position leaves the reference's, by loop step ``step``."""
    for index, scores in enumerate([] if exact.scores is None else exact.scores[: step + 1]):
        runs = [run for run in target.runs if (run.stage, run.step_index) == ("step", index)]
        # The last that computed it: a draft's were rolled back.
        run = next((run for run in reversed(runs) if position in run.positions), None)
        if run is None or "router.0" not in run.values:
            continue
        given = run.values[_CHOSEN] if _CHOSEN in run.values else chosen_of(run.values["router.0"], top_k)[0]
        wanted, margin = chosen_of(scores, top_k)
        if {*given[position - int(run.positions[0])].tolist()} != {*wanted[position].tolist()}:
            near = float(margin[position])
            what = (
                f"each part is right by itself, but the state drifted enough to choose others by a margin of {near:.2g}"
            )
            return Divergence(position, index, "router", "router tie", _CHOSEN, near, NEAR_TIE_MARGIN, what)
    return None


def _relative(wanted: Array, given: Array) -> Array:
    """The error of each row as a share of its length."""
    lengths = np.linalg.norm(wanted.astype(np.float64), axis=-1)
    error = np.linalg.norm(wanted.astype(np.float64) - given, axis=-1)
    relative: Array = error / np.maximum(lengths, np.finfo(np.float64).tiny)
    return relative


def _other_choices(one: FreeRun, other: FreeRun, top_k: int) -> NDArray[np.bool_]:
    """The positions at which two free runs chose other experts, or halted elsewhere."""
    parted: NDArray[np.bool_] = one.depth != other.depth
    for wanted, given in _scores(one, other):
        parted = parted | (chosen_of(wanted, top_k)[0] != chosen_of(given, top_k)[0]).any(-1)
    return parted


def _scores(one: FreeRun, other: FreeRun) -> Iterator[tuple[Array, Array]]:
    if one.scores is not None and other.scores is not None:
        yield from zip(one.scores, other.scores, strict=True)


def _router_ties(run: FreeRun, top_k: int) -> NDArray[np.bool_]:
    tied = np.zeros(len(run.depth), np.bool_)
    for scores, _ in _scores(run, run):
        tied |= chosen_of(scores, top_k)[1] < NEAR_TIE_MARGIN
    return tied
