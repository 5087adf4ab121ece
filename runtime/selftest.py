"""The self-test of a bundle: does this machine compute what the exporter saw?

The manifest holds a golden sample: a few tokens, the depth that the network gave each, and the largest logits of the
last. A target with other weights than the export's, or with other caches, comes to other numbers by right, so that it
is held to less.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import SelfTestError
from mythos_edge.runtime import parity
from mythos_edge.runtime.scoring import Score


class _Scorer(Protocol):
    """The part of a session that is used."""

    bundle: Bundle
    target: str

    @property
    def cache(self) -> str: ...

    def score(self, ids: Any, *, max_depth: int | None, threshold: float | None) -> Score: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class SelfTest:
    """The result: by how much the largest logits differ, which may be ``allowed``.

    ``max_abs`` is NaN for logits that are none, infinite where a depth differs that nothing explains. ``tie`` names
    what excuses a larger difference, see ``GoldenSample``; empty where nothing had to.
    """

    max_abs: float
    allowed: float
    tie: str
    passed: bool


def self_test(session: _Scorer) -> SelfTest:
    """Runs the golden sample on the target of ``session``, which then holds that sequence."""
    sample, target = session.bundle.manifest.sample, session.target
    score = session.score(np.array([sample.ids]), max_depth=sample.max_depth, threshold=sample.threshold)
    logits = score.logits[0, -1]
    largest = float(np.abs(logits).max())
    default = session.bundle.manifest.default_target
    as_exported = (*_numbers(session.bundle, target), session.cache) == (
        *_numbers(session.bundle, default),
        session.bundle.manifest.targets[default].own_cache,
    )
    allowed = _share(session.bundle, target) * max(1.0, *map(abs, sample.top_logits))
    if not as_exported:
        allowed = max(allowed, parity.OTHER_ROUNDING_SHARE * largest)
    difference = float(np.abs(logits[list(sample.top_ids)] - np.array(sample.top_logits)).max())
    if not np.isfinite(score.logits).all():
        difference = float("nan")
    elif as_exported and sample.tie != "halting" and tuple(score.depth[0].tolist()) != sample.depth:
        difference = float("inf")
    # With a tie, another kernel than the export's may rightly come to other numbers, but not to any.
    tied = sample.tie != "" and allowed < difference <= parity.TIED_SELF_TEST_SHARE * largest
    return SelfTest(difference, allowed, sample.tie if tied else "", difference <= allowed or tied)


def require_self_test(session: _Scorer) -> None:
    """Raises SelfTestError unless this machine computes what the exporter saw; the session is closed then."""
    try:
        found = self_test(session)
    except BaseException:
        session.close()
        raise
    if found.passed:
        return
    session.close()
    what = f"differ by {found.max_abs:.2g} from those that it was exported with, {found.allowed:.2g} is allowed"
    if np.isnan(found.max_abs):
        what = "are not finite"
    elif np.isinf(found.max_abs):
        what = "come of other depths than those that it was exported with"
    raise SelfTestError(
        f"{session.bundle.path}: the self-test failed: on this machine the logits of target {session.target!r} {what}: "
        "check its files with mythos-edge validate, or use another target"
    )


def _numbers(bundle: Bundle, target: str) -> tuple[Any, ...]:
    """The forms of the numbers that a target computes with."""
    record = bundle.manifest.targets[target]
    return record.weights, record.compute_dtype


def _share(bundle: Bundle, target: str) -> float:
    """The share of the largest logit by which the self-test may be off."""
    weights, compute_dtype = _numbers(bundle, target)
    rounded = {*weights.values(), compute_dtype} != {"fp32"}
    return parity.ROUNDED_SELF_TEST_SHARE if rounded else parity.SELF_TEST_SHARE
