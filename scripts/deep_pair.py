"""``validate --level deep --against TARGET``: the inside of a run, held against the graphs of a target of the bundle.

Both see the very inputs of each stage call. What two sets of weights are bound to differ by, the network in torch
says: it runs with the weights of both on these inputs, in float64, and its own float32 runs are the yardstick.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mythos_edge.exporter.taps import CHOSEN, ROUTER
from mythos_edge.exporter.target_weights import TargetWeights
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.families.table import config_of
from mythos_edge.model.layout import network_of, recipes
from mythos_edge.model.manifest import NEAR_TIE_MARGIN
from mythos_edge.model.network import LoopedNetwork, in_dtype
from mythos_edge.runtime.backends.protocol import Backend
from mythos_edge.runtime.parity import NOISE_FACTOR, NOISE_FLOOR
from mythos_edge.scripts.deep_check import Progress, fill, first_of, report_of, taps_of
from mythos_edge.scripts.deep_compare import LOCAL_FLOOR, Growth, LocalComparison, LocalFindings, growth_of
from mythos_edge.scripts.deep_reference import FreeRun, Local, Networks, Values, chosen_of, free_run, local_reference
from mythos_edge.scripts.deep_report import DeepReport, Divergence
from mythos_edge.scripts.deep_run import DRAFT, StageRun, TargetRun, target_run
from mythos_edge.scripts.deep_weights import StoredWeights, contraction_of, weights_between

Array = NDArray[Any]
Key = tuple[str, str]


@dataclass(frozen=True)
class _Computed:
    """The network in torch with one set of weights: on the inputs of every call, and run freely."""

    local: Local
    free: FreeRun
    noisy: list[FreeRun]

    def error(self, run: StageRun, call: int, name: str, given: Array) -> tuple[float, float]:
        """The largest error of a value that was made with these weights, and how much is allowed."""
        key = run.stage, name
        own = max(self.local.own_error.get(key, 0.0), LOCAL_FLOOR * self.local.largest.get(key, 0.0))
        error = np.abs(self.local.exact[call][name].astype(np.float64) - given)
        return float(np.nan_to_num(error, nan=np.inf).max(initial=0.0)), NOISE_FACTOR * own


@dataclass(frozen=True)
class Pair:
    """A run that is ``called`` so, to be held against the graphs of ``target``, whose backend is ``backend``."""

    bundle: Bundle
    target: str
    backend: Backend
    called: str
    seed: int = 0
    progress: Progress = lambda what, share: None

    def report(self, given: TargetRun, weights: StoredWeights | None) -> DeepReport:
        """The comparison of a run, which reads ``weights``; None where these cannot be seen."""
        self.progress("running the other graphs", 0.0)
        graphs = taps_of(self.bundle, self.target, outputs=True)
        beside = [graphs[run.stage].run({**run.feeds, "positions": run.positions[None]}) for run in given.runs]
        free = target_run(self.bundle, self.backend, {}, given.ids, given.threshold)
        own = TargetWeights(self.bundle, self.target)
        self.progress("running the reference", 0.0)
        first = self._computed(own, given)
        second = first
        if isinstance(weights, TargetWeights) and (own.rounded or weights.rounded):
            second = self._computed(weights, given)
        self.progress("comparing", 0.0)
        model = self.bundle.manifest.model
        local = _expected(beside, first, second, given.runs, model.experts_per_token)
        found = LocalComparison(given, local, model).findings()
        found.missing |= {
            f"{run.stage}: {name}": None
            for run, exact, shown in zip(given.runs, first.local.exact, beside, strict=True)
            for name in exact.keys() - shown.keys()
        }
        found.divergence = self._earliest(given, beside, found, first, second)
        if free.misfed:
            one = free.misfed[0]
            what = f"target {self.target} {one.what}"
            found.divergence = Divergence(one.position, one.step_index, one.part, "cache", "feeds", detail=what)
        growth = _growth(given, free, first, second, model.experts_per_token)
        self.progress("comparing weights", 0.0)
        others = [] if weights is None else weights_between(self.bundle, own, weights)
        contraction = contraction_of(TargetWeights(self.bundle, None) if weights is None else weights)
        return report_of(given, found, growth, first_of(found, growth, others), contraction, others)

    def _computed(self, weights: TargetWeights, given: TargetRun) -> _Computed:
        # The draft that is rolled back reaches a little further than the tokens.
        positions = min(len(given.ids) + DRAFT, self.bundle.manifest.max_context)
        made = [network_with(self.bundle, weights, positions, dtype) for dtype in (torch.float64, torch.float32)]
        networks = Networks(made[0], made[1], self.seed, weights.rounded)
        local = local_reference(networks, given.runs)
        exact = free_run(networks.exact, given.ids, given.threshold)
        noisy = [free_run(network, given.ids, given.threshold) for network in networks.noisy()]
        return _Computed(local, exact, noisy)

    def _earliest(
        self, given: TargetRun, beside: Sequence[Values], found: LocalFindings, first: _Computed, second: _Computed
    ) -> Divergence | None:
        """The first divergence, also of each side alone from the network in torch: where one of them rounds, and the
        other does not, that is the sharper look at the latter."""
        shown = [replace(run, values=values) for run, values in zip(given.runs, beside, strict=True)]
        earliest, call = self._explained(given, beside, found, first, second), found.call
        for name, run, local in (
            (self.called, given, second.local),
            (self.target, replace(given, runs=shown, misfed=[]), first.local),
        ):
            alone = LocalComparison(run, local, self.bundle.manifest.model).findings()
            if alone.divergence is not None and (earliest is None or alone.call < call):
                told = f"{name} differs from the network in torch, which has its weights"
                earliest, call = replace(alone.divergence, detail=told), alone.call
        return earliest

    def _explained(
        self, given: TargetRun, beside: Sequence[Values], found: LocalFindings, first: _Computed, second: _Computed
    ) -> Divergence | None:
        """The first divergence, with which of the two the network in torch agrees with."""
        one, call = found.divergence, found.call
        if one is None or call < 0 or one.tap not in first.local.exact[call]:
            return one
        run = given.runs[call]
        sides = (
            [
                (self.called, *second.error(run, call, one.tap, run.values[one.tap])),
                (self.target, *first.error(run, call, one.tap, beside[call][one.tap])),
            ]
            if run.values[one.tap].shape == first.local.exact[call][one.tap].shape
            else []
        )
        wrong = [name for name, error, allowed in sides if error > allowed]
        if len(wrong) != 1:
            return one
        right = next(name for name, *_ in sides if name not in wrong)
        told = f"the network in torch agrees with {right}, and not with {wrong[0]}"
        return replace(one, detail=f"{one.detail}; {told}" if one.detail else told)


def network_with(bundle: Bundle, weights: TargetWeights, positions: int, dtype: torch.dtype) -> LoopedNetwork:
    """The network of a bundle with the weights that a target reads, its tables of angles as long as ``positions``."""
    config, stored = config_of(bundle.manifest), TargetWeights(bundle, None)
    network = in_dtype(network_of(config, positions), dtype).requires_grad_(False).eval()
    parameters = dict(network.named_parameters())
    for recipe in recipes(config, positions):
        # A lowering keeps one of two tensors that are alike.
        fill(parameters[recipe.name].data, weights if weights.stages_of(recipe.name) else stored, recipe.name)
    return network


def _expected(
    beside: Sequence[Values], first: _Computed, second: _Computed, runs: Sequence[StageRun], top_k: int
) -> Local:
    """The values that follow from those of the other graphs, and from what the weights differ in.

    Either may err, so that the errors of both add up.
    """
    wanted: list[Values] = []
    excused: list[NDArray[np.bool_]] = []
    for number, (shown, run) in enumerate(zip(beside, runs, strict=True)):
        one, other = first.local.exact[number], second.local.exact[number]
        values = {}
        for name in one:
            if name in shown and shown[name].shape == one[name].shape:
                values[name] = shown[name] if first is second else shown[name] + (other[name] - one[name])
            elif name in shown:
                values[name] = shown[name]
        if first is second and CHOSEN in shown:
            values[CHOSEN] = shown[CHOSEN]
        wanted.append(values)
        excused.append(
            np.zeros(len(run.positions), np.bool_) if first is second else _near(run, one, first.local, top_k)
        )
    keys = {*first.local.own_error, *second.local.own_error}
    own = {key: first.local.own_error.get(key, 0.0) + second.local.own_error.get(key, 0.0) for key in keys}
    largest = {key: max(value, second.local.largest.get(key, 0.0)) for key, value in first.local.largest.items()}
    return Local(wanted, own, largest, excused)


def _near(run: StageRun, exact: Values, local: Local, top_k: int) -> NDArray[np.bool_]:
    """The rows (S,) that a tie may have decided in the other graphs."""
    near = np.zeros(len(run.positions), np.bool_)
    if run.stage != "step":
        return near
    own = {name: NOISE_FACTOR * local.own_error.get(("step", name), 0.0) for name in (ROUTER, "halt_mass_next")}
    if ROUTER in exact:
        near |= chosen_of(exact[ROUTER], top_k)[1] <= max(2 * own[ROUTER], NEAR_TIE_MARGIN)
    mass = exact["halt_mass_next"][:, 0]
    active = near[len(near) - len(mass) :]
    active |= np.abs(mass - float(run.feeds["threshold"])) <= max(own["halt_mass_next"], NEAR_TIE_MARGIN)
    return near


def _growth(given: TargetRun, free: TargetRun, first: _Computed, second: _Computed, top_k: int) -> Growth:
    beside = FreeRun(free.logits, free.depth, free.h, first.free.mass, first.free.scores)
    noisy = first.noisy if first is second else [*first.noisy, second.free, *second.noisy]
    return growth_of(given, first.free, noisy, top_k, NOISE_FLOOR, beside)
