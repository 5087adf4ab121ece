"""How much rounding the weights has changed a model: one run against the fp32 run on the same tokens.

Unlike ``parity``, which asks whether two runs are the same but for float32 noise, this measures how far apart they are.
Pure maths on arrays; knows nothing of how either run was made.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.floating[Any]]
Integer = NDArray[np.integer[Any]]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Trace:
    """The record of a run of one sequence: ``logits (S, V)``, ``depth (S,)``, and at each of the loop steps L states
    ``h (L, S, D)`` after it, the experts ``chosen (L, S, k)`` in it and whether others were as good (``tied (L, S)``)
    as them."""

    logits: Float
    depth: Integer
    h: Float
    chosen: Integer
    tied: NDArray[np.bool_]


@dataclass(frozen=True)
class Difference:
    """How one run differs from another, position by position.

    ``kl (S,)`` in nats, ``same_top1 (S,)``, ``h_error (L, S)`` relative, ``common_experts (L, S)`` as a share,
    ``depth (S,)`` in loop steps, signed, ``after_tie (S,)`` at and after the first tie of the router in either run.
    """

    kl: Float64
    same_top1: NDArray[np.bool_]
    h_error: Float64
    common_experts: Float64
    depth: NDArray[np.int64]
    after_tie: NDArray[np.bool_]

    def before_tie(self) -> "Difference":
        """The difference at those positions alone that no tie of the router can have reached."""
        kept = ~self.after_tie
        return Difference(
            self.kl[kept],
            self.same_top1[kept],
            self.h_error[:, kept],
            self.common_experts[:, kept],
            self.depth[kept],
            self.after_tie[kept],
        )


@dataclass(frozen=True)
class LoopStepQuality:
    """One loop step: relative error of ``h``, share of chosen experts in common, share of positions that chose the
    same set; None of a model without experts."""

    h_error_mean: float
    h_error_p99: float
    common_experts: float | None
    same_experts: float | None


@dataclass(frozen=True)
class QualityReport:
    """Figures over all positions; ``kl`` in nats per position, agreements as shares of positions.

    ``depth_difference`` is the mean absolute difference in loop steps; ``loop_steps`` begins with loop step 0.
    Figures are NaN when a logit is not finite.
    """

    positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    depth_agreement: float
    depth_difference: float
    loop_steps: tuple[LoopStepQuality, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Gate:
    """The least quality that passes: at most ``max_kl`` nats on average, at least ``min_top1`` of the top tokens and
    ``min_depth`` of the depths, the state off by at most ``max_h_error`` on average at every loop step, and of exact
    sums at most the share ``max_sums_lost``."""

    max_kl: float
    min_top1: float
    max_h_error: float
    min_depth: float
    max_sums_lost: float

    def failures(self, report: QualityReport, sums_lost: float = 0.0) -> list[str]:
        """The checks that fail, by name; ``sums_lost`` is the share of exact sums that were right in fp32 alone."""
        worst = np.max([step.h_error_mean for step in report.loop_steps])
        # Written so that NaN fails.
        good = {
            "kl": report.kl_mean <= self.max_kl,
            "top-1": report.top1_agreement >= self.min_top1,
            "h error": worst <= self.max_h_error,
            "depth": report.depth_agreement >= self.min_depth,
            "sums": sums_lost <= self.max_sums_lost,
        }
        return [name for name, passed in good.items() if not passed]


def difference(reference: Trace, run: Trace) -> Difference:
    """How ``run`` differs from ``reference``; both must be of the same tokens and loop steps."""
    return Difference(
        kl=kl_divergence(reference.logits, run.logits),
        same_top1=reference.logits.argmax(-1) == run.logits.argmax(-1),
        h_error=relative_error(reference.h, run.h),
        common_experts=common_share(reference.chosen, run.chosen),
        depth=run.depth.astype(np.int64) - reference.depth,
        after_tie=np.logical_or.accumulate((reference.tied | run.tied).any(axis=0)),
    )


def quality_report(differences: Sequence[Difference]) -> QualityReport:
    """The figures of one or more sequences, every position counting the same."""
    kl = np.concatenate([one.kl for one in differences])
    depth = np.concatenate([one.depth for one in differences])
    h_error = np.concatenate([one.h_error for one in differences], axis=1)
    common = np.concatenate([one.common_experts for one in differences], axis=1)
    steps = zip(h_error, common, strict=True)
    return QualityReport(
        positions=len(kl),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.percentile(kl, 99)),
        kl_max=float(kl.max()),
        top1_agreement=float(np.concatenate([one.same_top1 for one in differences]).mean()),
        depth_agreement=float((depth == 0).mean()),
        depth_difference=float(np.abs(depth).mean()),
        loop_steps=tuple(
            LoopStepQuality(float(error.mean()), float(np.percentile(error, 99)), *_of_experts(share))
            for error, share in steps
        ),
    )


def kl_divergence(reference: Float, logits: Float) -> Float64:
    """KL(reference || other) in nats of each position of ``(S, V)``; NaN where a logit is not finite."""
    # One position at a time: a large vocabulary in float64 is several times the logits themselves.
    return np.array([_kl(wanted, found) for wanted, found in zip(reference, logits, strict=True)])


def relative_error(reference: Float, other: Float) -> Float64:
    """||other - reference|| / ||reference|| over the last axis."""
    norms = np.linalg.norm(reference.astype(np.float64), axis=-1)
    error = np.linalg.norm(other.astype(np.float64) - reference, axis=-1)
    relative: Float64 = error / np.maximum(norms, np.finfo(np.float64).tiny)
    return relative


def common_share(reference: Integer, other: Integer) -> Float64:
    """The share of the experts ``(..., k)`` that are in both sets, whatever their order; NaN of sets of none."""
    if not reference.shape[-1]:
        return np.full(reference.shape[:-1], np.nan)
    common = (reference[..., :, None] == other[..., None, :]).any(-1)
    share: Float64 = common.mean(-1)
    return share


def _of_experts(common: Float64) -> tuple[float | None, float | None]:
    """The mean share, and how many are all."""
    return (None, None) if np.isnan(common).any() else (float(common.mean()), float((common == 1).mean()))


def _kl(reference: Float, logits: Float) -> float:
    if not (np.isfinite(reference).all() and np.isfinite(logits).all()):
        return float("nan")
    wanted, found = _log_softmax(reference), _log_softmax(logits)
    # Rounding can bring the sum of equal distributions just below 0.
    return max(0.0, float(np.exp(wanted) @ (wanted - found)))


def _log_softmax(logits: Float) -> Float64:
    shifted = logits.astype(np.float64) - logits.max()
    normalised: Float64 = shifted - np.log(np.exp(shifted).sum())
    return normalised
