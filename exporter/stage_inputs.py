"""Example inputs of the stages for tracing, with the axes that are free, as ``stages`` declares them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mythos_edge.model.looped import LoopedModel
from mythos_edge.model.stages import (
    ACTIVE,
    BATCH,
    CACHE_WIDTH,
    CHUNK,
    CONTEXT,
    DIM,
    LOGITS,
    OWN,
    STAGES,
    Stage,
    StageTensor,
)

Axes: TypeAlias = dict[int, Any]
# The piece that is traced beside the stages, for all of them.
ATTENTION = "attention"
_FREE = frozenset([BATCH, CHUNK, ACTIVE, CONTEXT, LOGITS])


@dataclass(frozen=True)
class Inputs:
    """Example inputs of a stage by name, and which of their axes are symbolic."""

    values: dict[str, Any]
    axes: dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Example sizes of the free axes of a stage, distinct so that none is tied to another, and their symbols.

    Every stage has symbols of its own, or it would ask for the sizes of another one's inputs. A batch that is free
    must not be one in the example either, or it would be specialised.
    """

    stage: str
    looped: LoopedModel
    dtype: torch.dtype
    one_sequence: bool
    chunk: int = 5
    context: int = 7
    logit_count: int = 4

    @property
    def batch(self) -> int:
        return 1 if self.one_sequence else 2

    @property
    def active(self) -> int:
        return self.chunk if self.one_sequence else 3

    def axes(self, *names: str) -> Axes:
        """The symbols of the leading axes, none for a batch of one."""
        if self.one_sequence:
            names = tuple(CHUNK if name == ACTIVE else name for name in names)
        return {
            axis: torch.export.Dim(f"{self.stage}_{name}")
            for axis, name in enumerate(names)
            if name in _FREE and not (self.one_sequence and name == BATCH)
        }

    def example(self, tensor: StageTensor) -> Tensor:
        """A tensor of that declaration."""
        sizes = {
            BATCH: self.batch,
            CHUNK: self.chunk,
            ACTIVE: self.active,
            CONTEXT: self.context,
            LOGITS: self.logit_count,
            DIM: self.looped.dim,
            CACHE_WIDTH: self.looped.cache_width,
        }
        dtype = self.dtype if tensor.dtype == OWN else getattr(torch, tensor.dtype)
        return torch.zeros([sizes[axis] for axis in tensor.axes], dtype=dtype)


def inputs_of(stage: Stage, sizes: Sizes) -> Inputs:
    """The inputs of a stage as ``stages`` declares them; those of several slots are a list."""
    values: dict[str, Any] = {}
    axes: dict[str, Any] = {}
    for tensor in stage.inputs:
        value: Any = sizes.example(tensor)
        free: Any = sizes.axes(*tensor.axes) or None
        if tensor.slot:
            slots = sizes.looped.slots[stage.name]
            # Tensors of their own: one that is given twice would be one input.
            value, free = [sizes.example(tensor) for _ in range(slots)], [free] * slots
        values[tensor.name], axes[tensor.name] = value, free
    return Inputs(values, axes)


# Attention is a piece that every block calls, on rows that are flat already but for it.
PIECE = Stage(
    ATTENTION,
    rows="x",
    inputs=(
        StageTensor("x", (BATCH, CHUNK, DIM)),
        StageTensor("positions", (BATCH, CHUNK), "int64"),
        StageTensor("past", (BATCH, CONTEXT, CACHE_WIDTH)),
        StageTensor("length", (), "int64"),
        StageTensor("first", (BATCH,), "int64"),
    ),
    outputs=(),
)


def names_of_inputs(values: Mapping[str, Any]) -> list[str]:
    """The names of a stage's inputs in its graph."""
    names: list[str] = []
    for name, value in values.items():
        names += [f"{name}_{index}" for index in range(len(value))] if isinstance(value, list) else [name]
    return names


def output_names(stage: str, slots: Mapping[str, int]) -> list[str]:
    """The names of a stage's outputs in its graph."""
    if stage == ATTENTION:
        return ["attended", "new_rows"]
    return [name for name, _ in STAGES[stage].names_of(STAGES[stage].outputs, slots[stage])]
