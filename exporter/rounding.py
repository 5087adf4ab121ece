"""Weights rounded to 4 or 8 bits in blocks that share a scale, streamed from a bundle's weights file to another.

Three ways: ``rtn`` rounds to nearest with the library's own quantiser; ``search`` tries several scales for each block
and keeps the one with the least squared error; ``calibrated`` weighs the error by how large each input channel is on
real tokens. Not here: which node reads what (``lowering``), how channels are measured (``calibration``).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mythos_edge.exporter.lowering.ort_kernels import Pack
from mythos_edge.exporter.weight_file import Piece, StoredTensor, WeightFile, on_all_cores, plan_file
from mythos_edge.exporter.weights import row_pieces
from mythos_edge.model.errors import BuildError
from mythos_edge.model.recipes import PIECE_BYTES, TensorReader

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]
Codes = NDArray[np.uint8] | NDArray[np.int8]
Importance = Mapping[str, NDArray[np.floating]]
METHODS = ("rtn", "search", "calibrated")
BLOCKS = (32, 64, 128)
ROW = 0
# Candidate scales map the largest value of a block to this far from the end of the range, in steps of the range.
_STRETCHES = (-1.2, -0.8, -0.4, 0.0, 0.4, 0.8)
# Values worked on at once, so that what is tried stays in the cache.
_VALUES_AT_ONCE = 1 << 18
_LARGEST = {ir.DataType.INT8: 127.0, ir.DataType.FLOAT8E4M3FN: 448.0}


@dataclass(frozen=True)
class Matrix:
    """A stored matrix (N, K), or a stack of E of them (E, N, K), that is to be rounded.

    ``rows`` and ``columns`` may be more than the shape says: zeros are added to an expert whose hidden size does not
    divide by the block. With ``halves`` the rows of gate and up, which take turns in the bundle, are parted.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    rounding: "Rounding"
    halves: bool = False

    @property
    def stacked(self) -> bool:
        return len(self.shape) == 3


@dataclass(frozen=True)
class Rounding:
    """How a target rounds: bits 4 or 8, values that share a scale (``ROW``: a whole row), and the method."""

    bits: int
    block: int
    method: str

    def __post_init__(self) -> None:
        if self.block not in BLOCKS and (self.block, self.bits) != (ROW, 8):
            row = (
                f"or {ROW} (a whole row) for int8" if self.bits == 8 else f"for int4 ({ROW}, a whole row, is for int8)"
            )
            raise BuildError(f"block is {self.block}, expected one of {', '.join(map(str, BLOCKS))} {row}")
        assert self.method in METHODS, self.method

    def blocks(self, columns: int) -> int:
        """Scales of a row."""
        return -(-columns // self.block) if self.block else 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row's values."""
        return self.blocks(columns) * self.block * self.bits // 8 if self.block else columns


@dataclass(frozen=True)
class RoundedFile:
    """A file of rounded matrices before a byte of it is written; each is the tensors ``.q`` and ``.scale``."""

    matrices: tuple[Matrix, ...]
    file: WeightFile

    @property
    def total_bytes(self) -> int:
        """Bytes of the file."""
        return self.file.total_bytes

    def packs(self, name: str, folder: Path) -> dict[str, Pack]:
        """The matrices as ONNX Runtime's kernels want them, in the file ``name`` of ``folder``."""
        tensors = self.file.tensors(name, folder)
        packs = {}
        for one in self.matrices:
            values, scales = tensors[f"{one.name}.q"], tensors[f"{one.name}.scale"]
            packs[one.name] = Pack(one.rounding.bits, one.rounding.block, one.columns, values, scales)
        return packs


def plan_rounded(matrices: list[Matrix]) -> RoundedFile:
    """The layout of the file of ``matrices``."""
    tensors = [tensor for matrix in matrices for tensor in _tensors_of(matrix)]
    return RoundedFile(tuple(matrices), plan_file(tensors))


def _tensors_of(matrix: Matrix) -> Iterator[StoredTensor]:
    rounding, rows = matrix.rounding, (*matrix.shape[:-2], matrix.rows)
    blocks, row_bytes = rounding.blocks(matrix.columns), rounding.row_bytes(matrix.columns)
    yield StoredTensor(f"{matrix.name}.scale", ir.DataType.FLOAT, (*rows, *((blocks,) if rounding.block else ())))
    # Without blocks a matrix is just one of bytes; MatMulNBits wants its blocks as an axis, QMoE does not.
    flat = not rounding.block or matrix.stacked
    kind = ir.DataType.UINT8 if rounding.block else ir.DataType.INT8
    yield StoredTensor(f"{matrix.name}.q", kind, (*rows, *((row_bytes,) if flat else (blocks, row_bytes // blocks))))


def write_rounded(
    plan: RoundedFile,
    reader: TensorReader,
    path: Path,
    importance: Importance | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> None:
    """Rounds and writes every matrix, a few pieces in memory at a time. Raises BuildError when the disk is full."""
    pieces = (piece for made in on_all_cores(_jobs(plan, reader, importance or {})) for piece in made)
    plan.file.write(path, pieces, BuildError, progress)


def _jobs(plan: RoundedFile, reader: TensorReader, importance: Importance) -> Iterator[Callable[[], list[Piece]]]:
    for matrix in plan.matrices:
        for rows, weights, first in _rows_of(matrix, reader, importance.get(matrix.name)):
            yield partial(_rounded, matrix.name, first, rows, matrix.rounding, weights)


def _rounded(
    name: str, first: int, rows: Float32, rounding: Rounding, weights: NDArray[np.floating] | None
) -> list[Piece]:
    values, scales = round_blocks(rows, rounding, weights)
    return [
        Piece(f"{name}.{part}", first * data.nbytes // len(rows), data)
        for part, data in (("q", values), ("scale", scales))
    ]


def round_blocks(
    rows: Float32, rounding: Rounding, importance: NDArray[np.floating] | None = None
) -> tuple[Codes, Float32]:
    """``rows (N, K)`` as packed values (N, blocks, block * bits / 8) and scales (N, blocks).

    A value is (code - 2^(bits - 1)) * scale; with whole rows as blocks the codes less 128, as int8.
    ``importance (K,)`` weighs the squared error of each column.
    """
    if rounding.method == "rtn":
        if not rounding.block:
            return _nearest_by_row(rows, ir.DataType.INT8, ir.DataType.FLOAT)
        return _nearest(rows, rounding)
    count, columns = rows.shape
    bits, block = rounding.bits, rounding.block or columns
    blocks = -(-columns // block)
    padded = np.zeros((count, blocks * block), np.float32)
    padded[:, :columns] = rows
    weights = np.ones(blocks * block, np.float32)
    if importance is not None:
        # Channels that the calibration never saw still count a little.
        weights[:columns] = importance / max(float(importance.mean()), 1e-30) + 1e-3
    weights = np.tile(weights.reshape(blocks, block), (count, 1))
    signed, scales = _searched(padded.reshape(-1, block), weights, bits)
    if not rounding.block:
        return signed, scales
    codes = signed.view(np.uint8) + np.uint8(1 << bits - 1)  # wraps around
    packed: UInt8 = codes if bits == 8 else np.bitwise_or(codes[:, 0::2], codes[:, 1::2] << 4)
    return packed.reshape(count, blocks, block * bits // 8), scales.reshape(count, blocks)


def round_symmetrically(
    rows: Float32, codes: ir.DataType, scale: ir.DataType
) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Codes (N, K) as int8 or float8 and scales (N,) above zero in the dtype ``scale``: a value is code * scale.

    int4 keeps the best of a few scales; TensorRT refuses those below zero.
    """
    if codes != ir.DataType.INT4:
        return _nearest_by_row(rows, codes, scale)
    made, exact = _searched(rows, np.ones_like(rows), 4, positive=True)
    scales = exact.astype(scale.numpy())
    # Rows so small that the dtype has no number for their scale are zeros.
    made[scales == 0], scales[scales == 0] = 0, 1
    return made, scales


def unpacked(values: Codes, scales: Float32, bits: int, columns: int) -> Float32:
    """The matrix (N, columns) that rounded values stand for."""
    if values.dtype == np.int8:
        return values.astype(np.float32) * scales[:, None]
    codes = values if bits == 8 else np.stack([values & 15, values >> 4], axis=-1)
    centred = codes.reshape(*scales.shape, -1).astype(np.float32) - (1 << bits - 1)
    matrix: Float32 = (centred * scales[..., None]).reshape(len(scales), -1)[:, :columns]
    return matrix


def _searched(
    flat: Float32, weights: Float32, bits: int, *, positive: bool = False
) -> tuple[NDArray[np.int8], Float32]:
    """Codes and scale of each block (row) with the least weighted squared error of those tried."""
    codes, scales = np.empty(flat.shape, np.int8), np.empty(len(flat), np.float32)
    step = max(1, _VALUES_AT_ONCE // flat.shape[1])
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        codes[part], scales[part] = _best_scale(flat[part], weights[part], bits, positive)
    return codes, scales


def _best_scale(x: Float32, weights: Float32, bits: int, positive: bool) -> tuple[Float32, Float32]:
    """Codes, as whole numbers, and the scale of each block.

    A candidate maps the largest value to about the lowest code, which takes a scale of either sign; where scales must
    be ``positive`` it maps its size to about the highest. The scale for given codes is the least-squares one. In the
    manner of llama.cpp's ``make_qx_quants``.
    """
    lowest = -(1 << bits - 1)
    largest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], axis=1)[:, 0]
    end = lowest
    if positive:
        largest, end = -np.abs(largest), lowest + 1
    safe = np.where(largest == 0, 1, largest)
    weighed = x * weights
    best = np.full(len(x), -1.0, np.float32)
    codes, scales = np.zeros(x.shape, np.float32), np.zeros(len(x), np.float32)
    for stretch in _STRETCHES:
        inverse = np.where(largest == 0, 0, (end + stretch) / safe).astype(np.float32)
        tried = np.clip(np.rint(x * inverse[:, None]), lowest, -lowest - 1)
        overlap = np.einsum("ij,ij->i", weighed, tried)
        size = np.einsum("ij,ij,ij->i", weights, tried, tried)
        scale = overlap / np.where(size == 0, 1, size)
        # What the codes take off the squared error.
        gain = overlap * scale
        better = gain > best
        best[better], scales[better], codes[better] = gain[better], scale[better], tried[better]
    return codes, scales


def _nearest(rows: Float32, rounding: Rounding) -> tuple[UInt8, Float32]:
    library: Any = import_module("onnxruntime.capi._pybind_state")
    quantize = library.quantize_matmul_4bits if rounding.bits == 4 else library.quantize_matmul_8bits
    count, columns = rows.shape
    blocks = -(-columns // rounding.block)
    values = np.zeros((count, blocks, rounding.block * rounding.bits // 8), np.uint8)
    scales = np.zeros((count, blocks), np.float32)
    # The quantiser wants the zero points' memory although they are all the middle of the range.
    zero_points = np.zeros((count, -(-blocks * rounding.bits // 8)), np.uint8)
    columns_first = np.ascontiguousarray(rows.T)
    quantize(values, columns_first, scales.reshape(-1), zero_points.reshape(-1), rounding.block, count, columns, True)
    return values, scales


def _nearest_by_row(rows: Float32, codes: ir.DataType, scale: ir.DataType) -> tuple[Any, Any]:
    """Codes of each row, which are int8 or float8, and its scale above zero: rows of zeros are zeros at any."""
    top = _LARGEST[codes]
    scales = (np.abs(rows).max(axis=1) / np.float32(top)).astype(scale.numpy())
    scales[scales == 0] = 1
    values = np.clip(rows / scales.astype(np.float32)[:, None], -top, top)
    return (np.rint(values) if codes == ir.DataType.INT8 else values).astype(codes.numpy()), scales


def _rows_of(
    matrix: Matrix, reader: TensorReader, importance: NDArray[np.floating] | None
) -> Iterator[tuple[Float32, NDArray[np.floating] | None, int]]:
    """Rows of a matrix from top to bottom, the weight of their columns, and the number of the first."""
    if not matrix.stacked:
        for first, piece in row_pieces(reader, matrix.name, matrix.shape):
            yield piece.float().numpy(), importance, first
        return
    height = max(1, PIECE_BYTES // (4 * matrix.columns))
    count, rows, columns = matrix.shape
    for expert in range(count):
        whole = np.zeros((matrix.rows, matrix.columns), np.float32)
        whole[:rows, :columns] = reader.read(matrix.name, expert, expert + 1)[0].float().numpy()
        if matrix.halves:
            whole = np.concatenate([whole[0::2], whole[1::2]])
        own = importance[expert] if importance is not None and importance.ndim == 2 else importance
        if own is not None:
            own = np.pad(own, (0, matrix.columns - columns))
        for start in range(0, matrix.rows, height):
            yield whole[start : start + height], own, expert * matrix.rows + start
