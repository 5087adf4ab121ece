"""Numeric agreement of two runs on the same tokens. Knows nothing of how either was made."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.manifest import EXACT_TIE_MARGIN, NEAR_TIE_MARGIN

Float = NDArray[np.floating[Any]]
Integer = NDArray[np.integer[Any]]
# A run may be this many times as far from float64 as the reference's own float32 run is. Kernels sum in other
# orders, and depth amplifies: more would be a bug, less is luck.
NOISE_FACTOR = 3.0
# On short or tame inputs the reference's own error may be near 0 by chance; then this share of the largest logit
# counts.
NOISE_FLOOR = 3e-6
# A bundle's self-test compares with logits that another machine's float32 gave at export: a share of the largest logit.
SELF_TEST_SHARE = 1e-4
# Rounded weights take rounded activations, and another machine may round one to the next code.
ROUNDED_SELF_TEST_SHARE = 0.05
# Where the self-test meets a tie, other experts give other logits: this share of the run's largest at most.
TIED_SELF_TEST_SHARE = 0.5
# A target whose weights were rounded after the export is another model, close by: up to 0.4 of the run's largest logit
# away with int4 weights that are random. More says that it is no such model.
OTHER_ROUNDING_SHARE = 0.75


@dataclass(frozen=True)
class NearTie:
    """A position whose halting mass came so close to the threshold, at the loop step after which the shallower of two
    runs halted, that float32 may decide either way."""

    row: int
    position: int
    reference_depth: int
    depth: int
    margin: float


@dataclass(frozen=True)
class RouterTie:
    """A position at which, in the loop step ``step_index``, two experts were so equally good for the router at the edge
    of the chosen ones that float32, or another kernel, may choose either."""

    row: int
    position: int
    step_index: int
    margin: float


@dataclass(frozen=True)
class ParityReport:
    """Agreement of ``logits`` and ``depth`` with a reference; figures leave out what follows a tie.

    ``near_ties`` are of halting, ``router_ties`` of the router where a run then differed. ``compared`` is the share of
    positions not left out; of the router, only exact ties leave any out. ``inconclusive`` is the share that follows a
    difference at or after a near tie of the router, and 0 when anything differs that no tie of the router precedes.
    ``max_abs`` is NaN when any logit of either is not finite.
    ``max_rel_l2`` is the largest ||a - b|| / ||a|| of a position; agreements are shares of positions.
    """

    max_abs: float
    max_rel_l2: float
    top1_agreement: float
    depth_agreement: float
    near_ties: list[NearTie] = field(default_factory=list)
    compared: float = 1.0
    router_ties: list[RouterTie] = field(default_factory=list)
    inconclusive: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    reference: Float,
    logits: Float,
    reference_depth: Integer,
    depth: Integer,
    margin: Float,
    router_margin: Float | None = None,
    allowed: float = float("inf"),
) -> ParityReport:
    """How ``logits (B, S, V)`` and ``depth (B, S)`` agree with the reference's.

    ``margin (B, S, M)`` is the distance of the reference's halting mass to the threshold after every loop step, and
    ``router_margin (B, S, M)`` by how much its router preferred the last chosen expert, so that a run that differs by
    more than ``allowed`` after an exact tie of the router is told from one that is wrong.
    """
    differs = reference_depth != depth
    # Only a tie where the two part can have made them differ.
    parted = np.clip(np.minimum(reference_depth, depth) - 1, 0, margin.shape[-1] - 1)
    margin = np.take_along_axis(margin, parted[..., None], axis=-1)[..., 0]
    tie = differs & (margin < NEAR_TIE_MARGIN)
    ties = [
        NearTie(int(b), int(s), int(reference_depth[b, s]), int(depth[b, s]), float(margin[b, s]))
        for b, s in np.argwhere(tie)
    ]
    if not (np.isfinite(reference).all() and np.isfinite(logits).all()):
        return ParityReport(float("nan"), float("nan"), 0.0, float(1 - (differs & ~tie).mean()), ties)
    error = np.abs(reference.astype(np.float64) - logits)
    # What follows a tie attends to its output, so it may differ by as much.
    wrong = differs & ~tie | (error.max(-1) > allowed)
    other_experts = _after_router_tie(wrong, router_margin, EXACT_TIE_MARGIN)
    counted = ~(np.logical_or.accumulate(tie, axis=1) | other_experts)
    wrong &= counted
    unsure = _after_router_tie(wrong, router_margin, NEAR_TIE_MARGIN) & counted
    inconclusive = 0.0 if (wrong & ~unsure).any() else float(unsure.mean())
    depth_agreement = float(1 - (differs & ~tie & ~other_experts).mean())
    router = [] if router_margin is None else _until_parted(router_ties(router_margin), other_experts | unsure)
    if not counted.any():
        return ParityReport(0.0, 0.0, 1.0, depth_agreement, ties, 0.0, router)
    norms = np.linalg.norm(reference.astype(np.float64), axis=-1)
    relative = np.linalg.norm(error, axis=-1) / np.maximum(norms, np.finfo(np.float64).tiny)
    same_top = reference.argmax(-1) == logits.argmax(-1)
    return ParityReport(
        max_abs=float(error[counted].max()),
        max_rel_l2=float(relative[counted].max()),
        top1_agreement=float(same_top[counted].mean()),
        depth_agreement=depth_agreement,
        near_ties=ties,
        compared=float(counted.mean()),
        router_ties=router,
        inconclusive=inconclusive,
    )


def router_ties(router_margin: Float) -> list[RouterTie]:
    """Every position ``router_margin (B, S, M)`` shows a tie at, with the loop step of its smallest margin."""
    least = router_margin.min(-1)
    return [
        RouterTie(int(b), int(s), int(router_margin[b, s].argmin()), float(least[b, s]))
        for b, s in np.argwhere(least < NEAR_TIE_MARGIN)
    ]


def _after_router_tie(differs: NDArray[np.bool_], router_margin: Float | None, tie: float) -> NDArray[np.bool_]:
    """The positions ``(B, S)`` from the first on that ``differs`` at or after a margin below ``tie``.

    The cache rows of that position reach all later ones.
    """
    if router_margin is None:
        return np.zeros_like(differs)
    tied = np.logical_or.accumulate((router_margin < tie).any(-1), axis=1)
    reached: NDArray[np.bool_] = np.logical_or.accumulate(differs & tied, axis=1)
    return reached


def _until_parted(ties: list[RouterTie], parted: NDArray[np.bool_]) -> list[RouterTie]:
    """The ties that can have made the runs part: those up to the first position that ``parted (B, S)``."""
    first = np.where(parted.any(1), parted.argmax(1), -1)
    return [tie for tie in ties if tie.position <= first[tie.row]]


def tolerance(reference_error: float, largest_logit: float) -> float:
    """The largest absolute logit error that is parity, given the reference's own float32 error."""
    return NOISE_FACTOR * max(reference_error, NOISE_FLOOR * largest_logit)


def passes(report: ParityReport, allowed: float) -> bool:
    """Whether the run is in parity; with nothing left to compare it is not, unless exact ties of the router are why."""
    agrees = report.depth_agreement == 1.0 and bool(np.isfinite(report.max_abs)) and report.max_abs <= allowed
    exact = any(tie.margin < EXACT_TIE_MARGIN for tie in report.router_ties)
    return agrees and (report.compared > 0 or exact)
