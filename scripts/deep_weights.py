"""``validate --level deep``: the weights that a target reads, held against the checkpoint's tensors, piece by piece.

A flipped bit, or an expert that no token reached, shows here and nowhere else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.exporter.target_weights import TargetWeights
from mythos_edge.model.layout import recipes
from mythos_edge.model.recipes import Recipe, TensorReader
from mythos_edge.model.stages import STAGES
from mythos_edge.scripts.deep_report import Contraction

Array = NDArray[Any]
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


def other_weights(reader: TensorReader, weights: TargetWeights, max_context: int, stored: Any) -> list[OtherWeights]:
    """The tensors that differ, in the order of the stages; ``stored`` is the torch dtype of the bundle."""
    found = [
        made
        for recipe in recipes(reader.config, max_context)
        for stage in weights.stages_of(recipe.name)
        if (made := _other(recipe, stage, reader, weights, stored)) is not None
    ]
    return sorted(found, key=lambda one: list(STAGES).index(one.stage))


def part_of_weight(stage: str, name: str) -> str:
    """The part that a tensor belongs to, where ``stage`` reads it."""
    if stage != "step":
        return stage
    return next((part for word, part in _PARTS if word in name), "injection")


def _other(
    recipe: Recipe, stage: str, reader: TensorReader, weights: TargetWeights, stored: Any
) -> OtherWeights | None:
    count, largest, first = 0, 0.0, -1
    for start, wanted in _wanted(recipe, reader, stored):
        given, bound = weights.read(stage, recipe.name, start, start + len(wanted))
        error = np.abs(given - wanted)
        # No number agrees with no number; what a code cannot say is within its bound.
        wrong = ~((error <= bound) | (np.isnan(given) & np.isnan(wanted)) | (given == wanted))
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


def _wanted(recipe: Recipe, reader: TensorReader, stored: Any) -> Iterator[tuple[int, Array]]:
    """The values of a tensor as a bundle stores them, flat, piece by piece, with where each begins."""
    import torch

    start = 0
    for piece in recipe.pieces(reader):
        kept = piece.to(stored if recipe.narrow else torch.float32).to(torch.float32)
        flat: Array = kept.reshape(-1).numpy()
        yield start, flat
        start += len(flat)


def contraction_of(weights: TargetWeights) -> Contraction | None:
    """The spectral check of the injection, as a target reads it; None of a family without one."""
    stages = weights.stages_of(_DECAY)
    if not stages:
        return None
    values, _ = weights.read(stages[0], _DECAY, 0)
    least, largest = float(values.min()), float(values.max())
    return Contraction(least, largest, least > 0 and largest < 1)
