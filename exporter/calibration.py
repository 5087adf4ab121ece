"""Which input channels of a matrix matter: the mean square of what it is multiplied with, on given tokens.

Rounding a weight is felt in proportion to its channel's values, so a quantiser that knows them rounds the loud
channels with more care. The same matrices serve every loop step, whose activations differ in size; each loop step is
brought to mean 1 before they are averaged, so that a loud one does not drown the others.

Not here: rounding.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.exporter.probes import Probe, Router, multiplied_in, router_of, stored_weights
from mythos_edge.exporter.targets.spec import Progress
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import CapacityError
from mythos_edge.model.families.table import config_of
from mythos_edge.model.layout import experts_of, recipes
from mythos_edge.model.linked_weights import weights_apart
from mythos_edge.model.network import LoopState
from mythos_edge.model.stages import STAGES

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
# Told a stage, its loop step, and what each matrix was multiplied with.
See = Callable[[str, int, Mapping[str, Array]], None]


@dataclass(frozen=True)
class Calibration:
    """``importance[name]`` of a matrix is (in_features,), of the experts' second matrices (E, in_features), mean 1.

    ``per_step[name]`` is the mean square of all channels at each loop step; the prelude and coda have one. An expert
    that no token chose has importance 1 throughout.
    """

    importance: dict[str, Float32]
    per_step: dict[str, Float64]


def collect_importance(
    bundle: Bundle, ids: NDArray[np.int64], progress: Progress = lambda phase, fraction: None
) -> Calibration:
    """The importance of every matrix that a target may round, from the fp32 target at full depth on ``ids (B, S)``.

    ``ids`` must be tokens of the model, see ``runtime.prompts.checked_ids``; each row is run alone, in one chunk.
    Memory follows S, not the model: experts are read one at a time. Raises CapacityError.
    """
    config, limit = config_of(bundle.manifest), bundle.manifest.max_context
    if ids.shape[1] > limit:
        raise CapacityError(f"the ids have {ids.shape[1]} positions; this bundle was exported for {limit}: cut them")
    with bundle.unchanged():
        names, router = experts_of(config), router_of(bundle)
        network = _Network(bundle, router)
        experts = None if names is None or router is None else _Experts(bundle, router, names.fc1)
    tallies: dict[str, _Tally] = {}

    def see(stage: str, step: int, activations: Mapping[str, Array]) -> None:
        steps = config.looped.max_depth if stage == "step" else 1
        for name, x in activations.items():
            # The fp32 target holds the first matrices of experts in pieces; the router has the same input.
            own = names.fc1 if names is not None and name == names.router else name
            tallies.setdefault(own, _Tally((steps, x.shape[-1]))).add(step, x)
            if names is not None and experts is not None and own == names.fc1:
                tally = tallies.setdefault(names.fc2, _Tally((steps, *experts.sizes)))
                for expert, hidden in experts.hidden(x):
                    tally.add((step, expert), hidden)

    for row in range(len(ids)):
        progress("calibration", row / len(ids))
        network.run(ids[row : row + 1], see)
    return Calibration(
        {name: tally.importance() for name, tally in tallies.items()},
        {name: tally.per_step() for name, tally in tallies.items()},
    )


class _Network:
    """The fp32 target that tells what every matrix is multiplied with."""

    def __init__(self, bundle: Bundle, router: Router | None) -> None:
        self._config = config_of(bundle.manifest)
        target = bundle.manifest.default_target
        graphs = bundle.target(target).graphs
        kept = {"prelude": ["e"], "step": [f"{name}_next" for name in LoopState._fields], "coda": []}
        matrices = [recipe.name for recipe in recipes(self._config, 1) if recipe.parts]
        if router is not None:
            matrices.append(router.name)
        apart = weights_apart(bundle, None, target)
        self._probed, self._probes = {}, {}
        for stage in STAGES:
            self._probed[stage] = multiplied_in(bundle, graphs[stage], matrices)
            if self._probed[stage] or kept[stage]:
                self._probes[stage] = Probe(bundle, graphs[stage], self._probed[stage], kept[stage], apart=apart)

    def run(self, ids: NDArray[np.int64], see: See) -> None:
        """Runs one sequence ``ids (1, S)`` through all stages; ``see`` is told each loop step's activations."""
        c, rows = self._config.looped, ids.shape
        window = {"positions": np.arange(rows[1])[None]}
        past = np.zeros((1, 0, c.cache_width), np.float32)
        e = self._run("prelude", {"input_ids": ids} | window | _slots(past, c.prelude_slots), 0, see)["e"]
        state = {
            "h": e,
            "out": np.zeros_like(e),
            "halt_mass": np.zeros(rows, np.float32),
            "depth": np.zeros(rows, np.int64),
        }
        halting = {"threshold": np.array(c.threshold, np.float32), "min_depth": np.array(1)}
        for index in range(c.max_depth):
            feeds = state | halting | window | {"e": e, "step_index": np.full(rows, index)}
            feeds |= _slots(past, c.step_slots)
            made = self._run("step", feeds, index, see)
            state = {name: made[f"{name}_next"] for name in state}
        last = {"out": state["out"], "logit_rows": np.arange(rows[1])}
        if "coda" in self._probes:
            self._run("coda", last | window | _slots(past, c.coda_slots), 0, see)

    def _run(self, stage: str, feeds: dict[str, Array], index: int, see: See) -> dict[str, Array]:
        made = self._probes[stage].run(feeds)
        see(stage, index, {name: made[name] for name in self._probed[stage]})
        return made


class _Experts:
    """The first matrices of the routed experts, mapped from the file and read one at a time."""

    def __init__(self, bundle: Bundle, router: Router, fc1: str) -> None:
        self._router = router
        self._fc1 = stored_weights(bundle, "step")[fc1].numpy()

    @property
    def sizes(self) -> tuple[int, int]:
        """How many experts there are, and the size of their hidden layer."""
        experts, both, _ = self._fc1.shape
        return experts, both // 2

    def hidden(self, x: Float32) -> Iterator[tuple[int, Float32]]:
        """Every expert that rows of ``x (N, D)`` choose, with the hidden activations (rows, F) of those rows."""
        chosen = self._router.chosen(x)
        for expert in np.unique(chosen):
            both = x[(chosen == expert).any(-1)] @ self._fc1[expert].astype(np.float32).T
            gate, up = both[:, 0::2], both[:, 1::2]
            with np.errstate(over="ignore"):  # the quotient is 0, which is right
                yield int(expert), gate / (1 + np.exp(-gate)) * up


class _Tally:
    """Sums of squares by loop step (and expert), and the rows that were in them."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._squares = np.zeros(shape)
        self._rows = np.zeros(shape[:-1])

    def add(self, place: int | tuple[int, int], x: Float32) -> None:
        self._squares[place] += np.einsum("nc,nc->c", x, x)
        self._rows[place] += len(x)

    def importance(self) -> Float32:
        """Loop steps at mean 1 each, then averaged over the rows that took them."""
        mean = self._squares.mean(-1, keepdims=True)
        level = np.divide(self._squares, mean, out=np.ones_like(self._squares), where=mean > 0)
        # What was never seen counts as one row of ones.
        rows = np.where(self._rows.sum(0) > 0, self._rows, 1.0)[..., None]
        average: Float64 = (level * rows).sum(0) / rows.sum(0)
        return average.astype(np.float32)

    def per_step(self) -> Float64:
        """The mean square of all channels at each loop step."""
        steps = len(self._squares)
        squares = self._squares.reshape(steps, -1).sum(1) / self._squares.shape[-1]
        mean: Float64 = squares / self._rows.reshape(steps, -1).sum(1)
        return mean


def _slots(past: Float32, layers: int) -> dict[str, Array]:
    return {f"past_{index}": past for index in range(layers)}
