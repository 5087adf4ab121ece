"""How deep a request lets the model think: policy, bounds and threshold, checked against the model."""

import warnings
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from mythos_edge.model.errors import UsageError
from mythos_edge.model.looped import MOST_DEPTH, LoopedModel
from mythos_edge.model.manifest import Manifest
from mythos_edge.runtime.request_values import Within, check_fields

LOOP_STEPS = Within(least=1, most=MOST_DEPTH, unit="loop step")
# The graphs compare in float32, where a smaller one would be 0 and a larger one infinite.
THRESHOLD = Within(above=1e-37, most=3e38, says="a finite number above 0 (more than 1e-37, at most 3e+38)")


class Policy(StrEnum):
    """The fate of the loop steps that a position does not need itself."""

    EXACT = "exact"
    """They run when a later position needs their cache rows: output equals ``full``, cost follows depth."""
    FULL = "full"
    """They run at once: the reference with a cache."""
    LAST = "last"
    """They never run; the position's last cache row stands in: approximate."""


@dataclass(frozen=True)
class Depth:
    """The depth parameters of a request; ``None`` is what the model was trained with.

    ``max_depth`` and ``min_depth`` count loop steps; a position halts when its halting mass, counted from loop step
    ``min_depth`` on, reaches ``threshold``. Raises UsageError for values out of range.
    """

    policy: Annotated[str, Policy] = Policy.EXACT
    max_depth: Annotated[int | None, LOOP_STEPS] = None
    min_depth: Annotated[int, LOOP_STEPS] = 1
    threshold: Annotated[float | None, THRESHOLD] = None

    def __post_init__(self) -> None:
        check_fields(self)

    def resolve(self, model: LoopedModel) -> "ResolvedDepth":
        """The parameters with the model's own values filled in; warns when depth goes beyond training."""
        max_depth = self.max_depth or model.max_depth
        if self.min_depth > max_depth:
            raise UsageError(f"min_depth is {self.min_depth}, expected at most max_depth {max_depth}")
        if max_depth > model.deepest:
            warnings.warn(
                f"max_depth {max_depth} is beyond the {model.deepest} loop steps this model was trained with",
                stacklevel=2,
            )
        threshold = model.threshold if self.threshold is None else self.threshold
        if threshold != model.threshold and not model.halts:
            raise UsageError(
                f"threshold is {threshold:g}, but no position of this model halts by itself: choose its depth with "
                "max_depth"
            )
        return ResolvedDepth(Policy(self.policy), max_depth, self.min_depth, threshold)


@dataclass(frozen=True)
class ResolvedDepth:
    """Depth parameters with no blanks."""

    policy: Policy
    max_depth: int
    min_depth: int
    threshold: float


def depth_of_preset(manifest: Manifest, name: str) -> dict[str, Any]:
    """The fields of ``Depth`` that a preset of the bundle sets. Raises UsageError when there is none of that name."""
    preset = manifest.presets.get(name)
    if preset is None:
        known = f"only {', '.join(sorted(manifest.presets))}" if manifest.presets else "as it has no presets"
        raise UsageError(f"this bundle has no preset {name!r}, {known}: mythos-edge tune makes one")
    return {"max_depth": preset.max_depth, "threshold": preset.threshold}


def target_and_depth(manifest: Manifest, target: str | None, preset: str | None) -> tuple[str, dict[str, Any]]:
    """The target that is asked for by name or by preset, else the first, and the fields of ``Depth`` of the preset.

    Raises UsageError when there is no such preset, or it was found for another target.
    """
    if preset is None:
        return target or manifest.default_target, {}
    depth, found_for = depth_of_preset(manifest, preset), manifest.presets[preset].target
    if target not in (None, found_for):
        raise UsageError(f"preset {preset!r} was found for target {found_for!r}, not {target!r}: leave one out")
    return found_for, depth
