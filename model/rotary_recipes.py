"""Rotary tables as stored tensors, and the rows of heads in the order in which they are rotated."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from mythos_edge.model.layers import rope_table
from mythos_edge.model.recipes import Recipe, TensorReader, row_ranges


def rotary_recipes(name: str, head_dim: int, theta: float, max_context: int) -> list[Recipe]:
    """The tables ``name.cos`` and ``name.sin`` of ``max_context`` positions."""
    shape = (max_context, head_dim // 2)
    return [
        Recipe(f"{name}.{which}", shape, partial(_rotary, head_dim, theta, max_context, part))
        for part, which in ((0, "cos"), (1, "sin"))
    ]


def heads_in_pairs(source: str, heads: int, head_dim: int, reader: TensorReader) -> Iterator[Tensor]:
    """The rows of a matrix of queries or keys, head by head, as ``in_pairs`` has them."""
    for head in range(heads):
        yield in_pairs(reader.read(source, head * head_dim, (head + 1) * head_dim), head_dim)


def in_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of heads with those that are rotated together side by side: j and j + head_dim / 2.

    Queries and keys change alike, so that their products stay what they are.
    """
    paired: Tensor = rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)
    return paired


def _rotary(head_dim: int, theta: float, max_context: int, part: int, reader: TensorReader) -> Iterator[Tensor]:
    """Cosines (``part`` 0) or sines (1) of every position."""
    for start, stop in row_ranges(max_context, head_dim):
        yield rope_table(head_dim, stop, theta, start)[part]
