"""How far two tensors are apart, read piece by piece, so that memory does not grow with them."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mythos_edge.model.entry_reader import EntryReader
from mythos_edge.model.tensor_files import TensorEntry

# Each is held in float64 a few times.
_PIECE_ELEMENTS = 1 << 20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorDifference:
    """The difference of ``b`` from ``a``: values that ``changed``, of how many ``values``.

    ``max_abs`` and ``relative_l2``, which is ||b - a|| / ||a||, are of the values that are finite in both;
    ``not_finite`` counts the changed ones that are not. Of the same dtype, values are compared bit by bit.
    """

    values: int
    changed: int
    max_abs: float
    relative_l2: float
    not_finite: int

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "share": self.changed / self.values if self.values else 0.0}


def tensor_difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> TensorDifference:
    """The difference of two tensors, given as pairs of pieces with as many values each."""
    values = changed = not_finite = 0
    largest = squares = norm = 0.0
    for a, b in pairs:
        values += a.numel()
        if a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)):
            norm += _squares(a)
            continue
        wide_a, wide_b = _wide(a), _wide(b)
        differs = _bits(a) != _bits(b) if a.dtype == b.dtype else _differ(wide_a, wide_b)
        finite = wide_a.isfinite() & wide_b.isfinite()
        changed += int(differs.sum())
        not_finite += int((differs & ~finite).sum())
        apart = torch.where(finite, wide_b - wide_a, 0.0).abs()
        largest = max(largest, float(apart.max()))
        squares += float(apart.square().sum())
        norm += _squares(a)
    relative = math.sqrt(squares / norm) if norm else math.inf if squares else 0.0
    return TensorDifference(values, changed, largest, relative, not_finite)


def pieces_of(reader: EntryReader, entry: TensorEntry) -> Iterator[Tensor]:
    """The values of a stored tensor, flat, in pieces of one length. Raises CheckpointError."""
    for start in range(0, entry.n_elements, _PIECE_ELEMENTS):
        yield values_of(reader, entry, start, min(start + _PIECE_ELEMENTS, entry.n_elements))


def values_of(reader: EntryReader, entry: TensorEntry, start: int, stop: int) -> Tensor:
    """The values ``start`` to ``stop`` of a stored tensor, flat, in its own dtype. Raises CheckpointError."""
    return reader.read(replace(entry, shape=(entry.n_elements,)), start, stop)


def pairs_of(reader: EntryReader, a: TensorEntry, b: TensorEntry) -> Iterator[tuple[Tensor, Tensor]]:
    """The pieces of two stored tensors with as many values each. Raises CheckpointError."""
    return zip(pieces_of(reader, a), pieces_of(reader, b), strict=True)


def _bits(values: Tensor) -> Tensor:
    """The values as whole numbers: two zeros differ, and NaN is equal to itself."""
    return values.view(_BITS[values.dtype.itemsize])


def _differ(a: Tensor, b: Tensor) -> Tensor:
    return (a != b) & ~(a.isnan() & b.isnan())


def _squares(values: Tensor) -> float:
    wide = _wide(values)
    return float(torch.where(wide.isfinite(), wide, 0.0).abs().square().sum())


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.complex128 if values.dtype.is_complex else torch.float64)
