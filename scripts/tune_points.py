"""The points that ``mythos-edge tune`` measures, and which of them is the knee."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mythos_edge.model.manifest import Preset
from mythos_edge.scripts.measuring import NOISY_SHARE

# Medians this close are equally fast; then the better quality decides.
_TIMING_NOISE = 0.03


@dataclass(frozen=True)
class Setting:
    """A target and how deep it thinks."""

    target: str
    threshold: float
    max_depth: int

    @property
    def depth(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "max_depth": self.max_depth}


@dataclass(frozen=True)
class Point:
    """Measurements of a setting: mean KL divergence to full depth in nats, part of equal top tokens, mean depth in loop
    steps, median milliseconds per decoded token, how far its repetitions lie apart as a share of that, and the time of
    full depth over it."""

    setting: Setting
    kl: float
    top1_agreement: float
    mean_depth: float
    ms_per_token: float
    spread: float
    speedup: float

    @property
    def steady(self) -> bool:
        """Whether the repetitions agree well enough to be compared with others."""
        return self.spread <= NOISY_SHARE

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values.pop("setting"), **values}

    def preset(self) -> Preset:
        values = self.to_dict()
        del values["ms_per_token"], values["spread"]  # of this machine alone
        return Preset(**values)


def knee_of(points: Sequence[Point], max_kl: float) -> Point | None:
    """The fastest steady point within the budget; of those as fast as that one, the one nearest to full depth.

    As fast is what lies within half of how far its repetitions lie apart, so that a lucky median decides nothing.
    """
    good = [point for point in points if point.kl <= max_kl and point.steady]
    if not good:
        return None
    fastest = min(good, key=lambda point: point.ms_per_token)
    limit = fastest.ms_per_token * (1 + max(_TIMING_NOISE, fastest.spread / 2))
    return min((point for point in good if point.ms_per_token <= limit), key=lambda point: point.kl)
