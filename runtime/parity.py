"""Numeric agreement of two runs on the same tokens. Knows nothing of how either was made."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A run may be this many times as far from float64 as the reference's own float32 run is. Kernels sum in other
# orders, and depth amplifies: more would be a bug, less is luck.
NOISE_FACTOR = 3.0
# On short or tame inputs the reference's own error may be near 0 by chance; then this share of the largest logit
# counts.
NOISE_FLOOR = 3e-6
# A bundle's self-test compares with logits that another machine's float32 gave at export: a share of the largest logit.
SELF_TEST_SHARE = 1e-4
# Halting mass this close to the threshold can fall either way in float32.
NEAR_TIE_MARGIN = 1e-4


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
class ParityReport:
    """Agreement of ``logits`` and ``depth`` with a reference; figures leave out what follows a near tie.

    ``compared`` is the share of positions not left out. ``max_abs`` is NaN when any logit of either is not finite.
    ``max_rel_l2`` is the largest ||a - b|| / ||a|| of a position; agreements are shares of positions.
    """

    max_abs: float
    max_rel_l2: float
    top1_agreement: float
    depth_agreement: float
    near_ties: list[NearTie] = field(default_factory=list)
    compared: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    reference: NDArray[np.floating[Any]],
    logits: NDArray[np.floating[Any]],
    reference_depth: NDArray[np.integer[Any]],
    depth: NDArray[np.integer[Any]],
    margin: NDArray[np.floating[Any]],
) -> ParityReport:
    """How ``logits (B, S, V)`` and ``depth (B, S)`` agree with the reference's.

    ``margin (B, S, M)`` is the distance of the reference's halting mass to the threshold after every loop step.
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
    # What follows a tie attends to its output in the coda, so it may differ by as much.
    counted = ~np.logical_or.accumulate(tie, axis=1)
    if not (np.isfinite(reference).all() and np.isfinite(logits).all()):
        return ParityReport(float("nan"), float("nan"), 0.0, float(1 - (differs & ~tie).mean()), ties)
    if not counted.any():
        return ParityReport(0.0, 0.0, 1.0, float(1 - (differs & ~tie).mean()), ties, 0.0)
    error = np.abs(reference.astype(np.float64) - logits)
    norms = np.linalg.norm(reference.astype(np.float64), axis=-1)
    relative = np.linalg.norm(error, axis=-1) / np.maximum(norms, np.finfo(np.float64).tiny)
    same_top = reference.argmax(-1) == logits.argmax(-1)
    return ParityReport(
        max_abs=float(error[counted].max()),
        max_rel_l2=float(relative[counted].max()),
        top1_agreement=float(same_top[counted].mean()),
        depth_agreement=float(1 - (differs & ~tie).mean()),
        near_ties=ties,
        compared=float(counted.mean()),
    )


def tolerance(reference_error: float, largest_logit: float) -> float:
    """The largest absolute logit error that is parity, given the reference's own float32 error."""
    return NOISE_FACTOR * max(reference_error, NOISE_FLOOR * largest_logit)


def passes(report: ParityReport, allowed: float) -> bool:
    """Whether the run is in parity; with nothing left to compare it is not."""
    agrees = report.depth_agreement == 1.0 and bool(np.isfinite(report.max_abs)) and report.max_abs <= allowed
    return agrees and report.compared > 0
