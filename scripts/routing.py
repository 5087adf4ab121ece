"""Which experts every loop step chooses: load, overlap between loop steps, dead experts, how decided the router is.

Knows arrays alone, not where they come from.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StepRouting:
    """One loop step over all positions that take it. NaN stands for a mean over none.

    ``load`` counts how often each expert was chosen. ``entropy`` is the router's, in nats, on average; ``as_before``
    and ``as_first`` are the shares of the chosen experts that the loop step before, and the first, had chosen as well
    for the same position.
    """

    positions: int
    load: tuple[int, ...]
    entropy: float
    as_before: float
    as_first: float

    @property
    def dead(self) -> list[int]:
        """The experts that no position chose."""
        return [expert for expert, count in enumerate(self.load) if not count]

    @property
    def largest_share(self) -> float:
        """The share of the choices that fell on the expert chosen most often."""
        return max(self.load) / sum(self.load) if any(self.load) else float("nan")

    def to_dict(self) -> dict[str, Any]:
        return {
            "load": list(self.load),
            "dead": self.dead,
            "router_entropy": self.entropy,
            "same_as_step_before": self.as_before,
            "same_as_first_step": self.as_first,
        }


class Routing:
    """Sums of what the router of a model with ``experts`` chose, ``chosen_each`` of them for each position."""

    def __init__(self, experts: int, chosen_each: int) -> None:
        self.experts, self.chosen_each = experts, chosen_each
        self._sums: list[_Sums] = []

    @property
    def by_chance(self) -> float:
        """The share of experts in common that choices would have which know nothing of each other."""
        return self.chosen_each / self.experts

    @property
    def dead(self) -> list[int]:
        """The experts that no position chose at any loop step."""
        return [expert for expert in range(self.experts) if not any(step.load[expert] for step in self._sums)]

    def add(self, chosen: NDArray[np.int64], entropy: NDArray[np.float64], taken: NDArray[np.bool_]) -> None:
        """Takes in the choices ``chosen (M, S, K)`` and ``entropy (M, S)`` of a sequence, where a position has
        ``taken (M, S)`` the loop step. It takes none after one that it has not taken.
        """
        for index in range(len(chosen)):
            if index == len(self._sums):
                self._sums.append(_Sums(np.zeros(self.experts, np.int64)))
            at, sums = taken[index], self._sums[index]
            sums.positions += int(at.sum())
            sums.load += np.bincount(chosen[index, at].ravel(), minlength=self.experts)
            sums.entropy += float(entropy[index, at].sum())
            sums.as_first += _in_common(chosen[index, at], chosen[0, at])
            sums.as_before += _in_common(chosen[index, at], chosen[max(0, index - 1), at])

    def steps(self) -> list[StepRouting]:
        """The figures of each loop step, from the first on."""
        return [
            StepRouting(
                one.positions,
                tuple(one.load.tolist()),
                _mean(one.entropy, one.positions),
                _mean(one.as_before, one.positions) if index else float("nan"),
                _mean(one.as_first, one.positions) if index else float("nan"),
            )
            for index, one in enumerate(self._sums)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The figures of all loop steps together."""
        load = np.sum([step.load for step in self._sums], axis=0, dtype=np.int64) if self._sums else np.zeros(0)
        return {
            "count": self.experts,
            "chosen_each": self.chosen_each,
            "same_by_chance": self.by_chance,
            "load": load.tolist(),
            "dead": self.dead,
        }


@dataclass
class _Sums:
    load: NDArray[np.int64]
    positions: int = 0
    entropy: float = 0.0
    as_before: float = 0.0
    as_first: float = 0.0


def _in_common(some: NDArray[np.int64], others: NDArray[np.int64]) -> float:
    """The sum over rows of the shares of the experts in ``some (rows, K)`` that are in ``others (rows, K)``, too."""
    return float((some[:, :, None] == others[:, None, :]).any(-1).mean(-1).sum()) if some.size else 0.0


def _mean(total: float, count: int) -> float:
    return total / count if count else float("nan")
