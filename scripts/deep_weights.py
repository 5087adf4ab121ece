"""``validate --level deep``: the weights that a target reads, held against the checkpoint's tensors, piece by piece.

A flipped bit, or an expert that no token reached, shows here and nowhere else.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mythos_edge.exporter.target_weights import TargetWeights
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.families.table import config_of
from mythos_edge.model.layout import recipes
from mythos_edge.model.recipes import Recipe, TensorReader
from mythos_edge.model.stages import STAGES
from mythos_edge.scripts.deep_report import Contraction

Array = NDArray[Any]
# A part of a tensor: where it begins, its values, flat, and by how much rounding may have moved each.
Piece = tuple[int, Array, Array | float]
# What a name has in it, and the part that a tensor of the loop step then belongs to; the first that fits.
_PARTS = (
    ("lora", "lora"),
    ("router", "router"),
    ("attn", "attention"),
    ("rope", "attention"),
    ("halt_", "halting"),
    ("gate_weight", "halting"),
    ("gate_bias", "halting"),
    ("ffn", "experts"),
    ("mlp", "experts"),
    ("gate_up", "experts"),
    ("down", "experts"),
)
_DECAY = "step.decay"


@dataclass(frozen=True)
class OtherWeights:
    """A tensor in which a target differs from the checkpoint: how many values, by how much, and the first index."""

    name: str
    stage: str
    part: str
    step_index: int
    count: int
    largest: float
    index: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}{list(self.index)} and {self.count - 1} more, by up to {self.largest:.3g}"


class StoredWeights(Protocol):
    """The weights that the graphs of a model read, by stage and name; see ``exporter.target_weights``."""

    def stages_of(self, name: str) -> list[str]: ...

    def read(self, stage: str, name: str, start: int, stop: int | None = None) -> tuple[Array, Array | float]: ...


def other_weights(reader: TensorReader, weights: StoredWeights, max_context: int, stored: Any) -> list[OtherWeights]:
    """The tensors that differ, in the order of the stages; ``stored`` is the torch dtype of the bundle."""

    def wanted(recipe: Recipe) -> Iterator[Piece]:
        return _wanted(recipe, reader, stored)

    return _others(recipes(reader.config, max_context), wanted, weights)


def weights_between(bundle: Bundle, one: TargetWeights, other: StoredWeights) -> list[OtherWeights]:
    """The tensors in which ``other`` differs from ``one``, by more than the rounding of both."""
    stored = TargetWeights(bundle, None)

    def wanted(recipe: Recipe) -> Iterator[Piece]:
        # A lowering keeps one of two tensors that are alike.
        known = one if one.stages_of(recipe.name) else stored
        stage, size, start = known.stages_of(recipe.name)[0], math.prod(recipe.shape), 0
        row = size // recipe.shape[0] if len(recipe.shape) == 3 else size
        while start < size:
            values, bound = known.read(stage, recipe.name, start, start + row)
            yield start, values, bound
            start += row

    return _others(recipes(config_of(bundle.manifest), bundle.manifest.max_context), wanted, other)


def _others(
    every: Sequence[Recipe], wanted: Callable[[Recipe], Iterator[Piece]], weights: StoredWeights
) -> list[OtherWeights]:
    found = [
        made
        for recipe in every
        for stage in weights.stages_of(recipe.name)
        if (made := _other(recipe, stage, wanted(recipe), weights)) is not None
    ]
    return sorted(found, key=lambda one: list(STAGES).index(one.stage))


def part_of_weight(stage: str, name: str) -> str:
    """The part that a tensor belongs to, where ``stage`` reads it."""
    if stage != "step":
        return stage
    return next((part for word, part in _PARTS if word in name), "injection")


def _other(recipe: Recipe, stage: str, pieces: Iterator[Piece], weights: StoredWeights) -> OtherWeights | None:
    count, largest, first = 0, 0.0, -1
    for start, wanted, own_bound in pieces:
        given, bound = weights.read(stage, recipe.name, start, start + len(wanted))
        error = np.abs(given - wanted)
        # No number agrees with no number; what a code cannot say is within its bound.
        wrong = ~((error <= bound + own_bound) | (np.isnan(given) & np.isnan(wanted)) | (given == wanted))
        if wrong.any():
            first = start + int(wrong.argmax()) if first < 0 else first
            count += int(wrong.sum())
            largest = max(largest, float(np.nan_to_num(error[wrong], nan=np.inf).max()))
    if first < 0:
        return None
    index = tuple(int(one) for one in np.unravel_index(first, recipe.shape))
    part = part_of_weight(stage, recipe.name)
    return OtherWeights(
        recipe.name, stage, part, index[0] if part == "lora" and "scale" in recipe.name else 0, count, largest, index
    )


def _wanted(recipe: Recipe, reader: TensorReader, stored: Any) -> Iterator[Piece]:
    """The values of a tensor as a bundle stores them."""
    import torch

    start = 0
    for piece in recipe.pieces(reader):
        kept = piece.to(stored if recipe.narrow else torch.float32).to(torch.float32)
        flat: Array = kept.reshape(-1).numpy()
        yield start, flat, 0.0
        start += len(flat)


def contraction_of(weights: StoredWeights) -> Contraction | None:
    """The spectral check of the injection, as a target reads it; None of a family without one."""
    stages = weights.stages_of(_DECAY)
    if not stages:
        return None
    values, _ = weights.read(stages[0], _DECAY, 0)
    least, largest = float(values.min()), float(values.max())
    return Contraction(least, largest, least > 0 and largest < 1)
