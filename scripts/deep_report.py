"""``validate --level deep``: where a target first differs from its reference, of what kind that is, and what to try.

Compares what ``deep_run`` wrote down with what ``deep_reference`` makes of the same inputs. Knows neither torch nor
files.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
PARTS = ("prelude", "injection", "attention", "router", "experts", "lora", "halting", "cache", "coda")
# By class of a divergence the advice in one line.
ADVICE = {
    "weights": "it computes with other weights than what it is compared with has: export or build it again",
    "rotary": "rows have their length but another angle: compare the rotary table, the pairing and the positions",
    "cache": "a stage was fed other rows than were made: look at the runtime's slots, rollback and catching up",
    "graph": "the weights agree but the graph computes this part otherwise: look at the lowering of the part",
    "precision growth": "every part is right by itself, but the loop makes rounding grow: try wider weights",
    "router tie": "the scores of two experts are close here, and each run chose its own: compare on other tokens",
    "halting tie": "the halting mass meets the threshold here: compare on other tokens",
}


@dataclass(frozen=True)
class Divergence:
    """A difference beyond what is allowed, as (position, step_index, part), of a ``kind`` that ``ADVICE`` has.

    ``step_index`` is 0 for the prelude, and the last loop step for the coda. ``tap`` names the value that differs, as
    ``attention.2`` of the third inner layer.
    """

    position: int
    step_index: int
    part: str
    kind: str
    tap: str = ""
    error: float = 0.0
    allowed: float = 0.0
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {"class": values.pop("kind"), **values, "advice": ADVICE[self.kind]}


@dataclass(frozen=True)
class Tie:
    """A decision so near that float32 may take it either way, and whether the runs took it differently."""

    position: int
    step_index: int
    kind: str
    margin: float
    differs: bool


@dataclass(frozen=True)
class Disagreement:
    """A choice of the router that differs, with the margin by which the reference preferred its own."""

    position: int
    step_index: int
    margin: float
    tie: bool


@dataclass(frozen=True)
class Contraction:
    """The smallest and largest of the injection's A, and whether 0 < A < 1 holds for all; float32 rounds the A of a
    state that nearly stays to 1, which is no failure."""

    least: float
    largest: float
    contracts: bool


@dataclass(frozen=True)
class DeepReport:
    """All that the deep comparison found.

    ``error (P, M, S)`` is by ``parts``, loop step and position how far a value of the part was off in the worst case,
    as a share of what is allowed, NaN where nothing was compared: above 1 it fails. The prelude counts at loop step 0,
    the coda at the last. ``growth`` and ``reference_growth`` (M,) are by loop step the largest relative error of the
    state in the free run and the largest of the float32 reference's own, ``bound`` what is left of the first error if
    the largest A alone carries it on. ``router_agreement`` is the share of choices that agree.
    ``depth`` and ``reference_depth`` are (S,). ``missing`` names values that the target's graphs do not show,
    ``other_weights`` the tensors in which it differs from the reference.
    """

    ids: NDArray[np.int64]
    first_divergence: Divergence | None
    error: Array
    ties: Sequence[Tie] = ()
    router_agreement: float | None = None
    disagreements: Sequence[Disagreement] = ()
    growth: Array = field(default_factory=lambda: np.zeros(0))
    reference_growth: Array = field(default_factory=lambda: np.zeros(0))
    bound: Array | None = None
    contraction: Contraction | None = None
    depth: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    reference_depth: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    max_abs: float = float("nan")
    allowed_max_abs: float = float("nan")
    missing: Sequence[str] = ()
    other_weights: Sequence[str] = ()
    parts: Sequence[str] = PARTS

    @property
    def passed(self) -> bool:
        """Whether nothing diverges but by ties."""
        return self.first_divergence is None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "passed": self.passed,
            "first_divergence": None if self.first_divergence is None else self.first_divergence.to_dict(),
            "ties": [vars(tie) for tie in self.ties],
            "router_agreement": self.router_agreement,
            "router_disagreements": [vars(one) for one in self.disagreements],
            "parts": self._by_part(),
            "error_of_allowed": self.error.tolist(),
            "growth": self.growth.tolist(),
            "reference_growth": self.reference_growth.tolist(),
            "contraction_bound": None if self.bound is None else self.bound.tolist(),
            "contraction": None if self.contraction is None else vars(self.contraction),
            "depth": self.depth.tolist(),
            "reference_depth": self.reference_depth.tolist(),
            "max_abs": self.max_abs,
            "allowed_max_abs": self.allowed_max_abs,
            "not_compared": list(self.missing),
            "other_weights": list(self.other_weights),
        }

    def _by_part(self) -> dict[str, float]:
        """The worst error of each part that was compared, as a share of what is allowed."""
        worst = {}
        for part, error in zip(self.parts, self.error, strict=True):
            known = error[~np.isnan(error)]
            if known.size:
                worst[part] = float(known.max())
        return worst
