"""Weights rounded to 4 or 8 bits in blocks that share a scale, streamed from a bundle's weights file to another.

Three ways: ``rtn`` rounds to nearest with the library's own quantiser; ``search`` tries several scales for each block
and keeps the one with the least squared error; ``calibrated`` weighs the error by how large each input channel is on
real tokens. Not here: which node reads what (``lowering``), how channels are measured (``calibration``).
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mythos_edge.exporter.lowering.ort_kernels import Pack
from mythos_edge.exporter.weights import ALIGNMENT, laid_out
from mythos_edge.model.errors import BuildError
from mythos_edge.model.layout import PIECE_BYTES, TensorReader
from mythos_edge.model.machine import cores

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
_PIECES_IN_FLIGHT = 4


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
        if self.method not in METHODS:
            raise BuildError(f"method is {self.method!r}, expected one of {', '.join(METHODS)}")

    def blocks(self, columns: int) -> int:
        """Scales of a row."""
        return -(-columns // self.block) if self.block else 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row's values."""
        return self.blocks(columns) * self.block * self.bits // 8 if self.block else columns


@dataclass(frozen=True)
class _Placed:
    """Where the values and scales of a matrix lie in the file, and the arrays' shapes."""

    matrix: Matrix
    value_shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    value_offset: int = 0
    scale_offset: int = 0


@dataclass(frozen=True)
class RoundedFile:
    """A file of rounded matrices before a byte of it is written."""

    header: bytes
    placed: tuple[_Placed, ...]

    @property
    def total_bytes(self) -> int:
        return len(self.header) + sum(_bytes(item.value_shape) + 4 * _bytes(item.scale_shape) for item in self.placed)

    def packs(self, name: str, folder: Path) -> dict[str, Pack]:
        """The matrices as ONNX Runtime's kernels want them, in the file ``name`` of ``folder``."""
        made = {}
        for item in self.placed:
            matrix, rounding = item.matrix, item.matrix.rounding
            stored = ir.DataType.UINT8 if rounding.block else ir.DataType.INT8
            values, scales = (
                ir.ExternalTensor(name, offset, length, kind, shape=ir.Shape(shape), name="", base_dir=str(folder))
                for offset, length, kind, shape in (
                    (item.value_offset, _bytes(item.value_shape), stored, item.value_shape),
                    (item.scale_offset, 4 * _bytes(item.scale_shape), ir.DataType.FLOAT, item.scale_shape),
                )
            )
            made[matrix.name] = Pack(rounding.bits, rounding.block, matrix.columns, values, scales)
        return made


def plan_rounded(matrices: list[Matrix]) -> RoundedFile:
    """The layout of the file, with aligned tensors first so that all of them stay aligned."""
    placed = []
    for matrix in matrices:
        rounding = matrix.rounding
        blocks, row_bytes = rounding.blocks(matrix.columns), rounding.row_bytes(matrix.columns)
        stack = matrix.shape[:-2]
        # Without blocks a matrix is just one of bytes; MatMulNBits wants its blocks as an axis, QMoE does not.
        flat = not rounding.block or matrix.stacked
        value_shape = (*stack, matrix.rows, *((row_bytes,) if flat else (blocks, row_bytes // blocks)))
        scale_shape = (*stack, matrix.rows, *((blocks,) if rounding.block else ()))
        placed.append(_Placed(matrix, value_shape, scale_shape))
    sized = [(f"{item.matrix.name}.scale", "F32", item.scale_shape, 4 * _bytes(item.scale_shape)) for item in placed]
    for item in placed:
        kind = "U8" if item.matrix.rounding.block else "I8"
        sized.append((f"{item.matrix.name}.q", kind, item.value_shape, _bytes(item.value_shape)))
    sized.sort(key=lambda entry: (entry[3] % ALIGNMENT != 0, entry[1] != "F32"))
    header, offsets = laid_out(sized)
    final = [
        _Placed(
            item.matrix,
            item.value_shape,
            item.scale_shape,
            offsets[f"{item.matrix.name}.q"],
            offsets[f"{item.matrix.name}.scale"],
        )
        for item in placed
    ]
    return RoundedFile(header, tuple(final))


def write_rounded(
    plan: RoundedFile,
    reader: TensorReader,
    path: Path,
    importance: Importance | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> None:
    """Rounds and writes every matrix, a few pieces in memory at a time. Raises BuildError when the disk is full."""
    total = sum(_bytes(item.value_shape) for item in plan.placed)
    done = 0
    try:
        with path.open("wb", buffering=0) as file, ThreadPoolExecutor(max_workers=cores()) as pool:
            descriptor = file.fileno()
            os.truncate(descriptor, plan.total_bytes)
            os.pwrite(descriptor, plan.header, 0)
            for item in plan.placed:
                weights = None if importance is None else importance.get(item.matrix.name)
                for values, scales, row in _rounded(pool, item.matrix.rounding, _pieces(item, reader, weights)):
                    per_row = values.nbytes // len(scales)
                    _write(descriptor, values, item.value_offset + row * per_row)
                    _write(descriptor, scales, item.scale_offset + row * scales.nbytes // len(scales))
                    done += values.nbytes
                    progress(done / total)
    except OSError as error:
        raise BuildError(f"{path.parent}: cannot write the rounded weights: {error.strerror}") from error


def round_blocks(
    rows: Float32, rounding: Rounding, importance: NDArray[np.floating] | None = None
) -> tuple[Codes, Float32]:
    """``rows (N, K)`` as packed values (N, blocks, block * bits / 8) and scales (N, blocks).

    A value is (code - 2^(bits - 1)) * scale; with whole rows as blocks the codes less 128, as int8.
    ``importance (K,)`` weighs the squared error of each column.
    """
    if rounding.method == "rtn":
        return _nearest(rows, rounding) if rounding.block else _nearest_by_row(rows)
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
    flat = padded.reshape(-1, block)
    codes, scales = np.empty(flat.shape, np.uint8), np.empty(len(flat), np.float32)
    step = max(1, _VALUES_AT_ONCE // block)
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        codes[part], scales[part] = _best_scale(flat[part], weights[part], bits)
    if not rounding.block:
        return (codes ^ 128).view(np.int8), scales
    packed: UInt8 = codes if bits == 8 else np.bitwise_or(codes[:, 0::2], codes[:, 1::2] << 4)
    return packed.reshape(count, blocks, block * bits // 8), scales.reshape(count, blocks)


def unpacked(values: Codes, scales: Float32, bits: int, columns: int) -> Float32:
    """The matrix (N, columns) that rounded values stand for."""
    if values.dtype == np.int8:
        return values.astype(np.float32) * scales[:, None]
    codes = values if bits == 8 else np.stack([values & 15, values >> 4], axis=-1)
    centred = codes.reshape(*scales.shape, -1).astype(np.float32) - (1 << bits - 1)
    matrix: Float32 = (centred * scales[..., None]).reshape(len(scales), -1)[:, :columns]
    return matrix


def _best_scale(x: Float32, weights: Float32, bits: int) -> tuple[UInt8, Float32]:
    """Codes and scale of each block (row) of ``x`` with the least weighted squared error of those tried.

    The scale for given codes is the least-squares one. In the manner of llama.cpp's ``make_qx_quants``.
    """
    lowest = -(1 << bits - 1)
    largest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], axis=1)[:, 0]
    safe = np.where(largest == 0, 1, largest)
    weighed = x * weights
    best = np.full(len(x), -1.0, np.float32)
    codes, scales = np.zeros(x.shape, np.float32), np.zeros(len(x), np.float32)
    for stretch in _STRETCHES:
        inverse = np.where(largest == 0, 0, (lowest + stretch) / safe).astype(np.float32)
        tried = np.clip(np.rint(x * inverse[:, None]), lowest, -lowest - 1)
        overlap = np.einsum("ij,ij->i", weighed, tried)
        size = np.einsum("ij,ij,ij->i", weights, tried, tried)
        scale = overlap / np.where(size == 0, 1, size)
        # What the codes take off the squared error.
        gain = overlap * scale
        better = gain > best
        best[better], scales[better], codes[better] = gain[better], scale[better], tried[better]
    return (codes - lowest).astype(np.uint8), scales


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


def _nearest_by_row(rows: Float32) -> tuple[Codes, Float32]:
    scales = np.abs(rows).max(axis=1) / np.float32(127)
    return np.rint(rows / np.where(scales == 0, 1, scales)[:, None]).astype(np.int8), scales


_Piece = tuple[Float32, NDArray[np.floating] | None, int]


def _pieces(item: _Placed, reader: TensorReader, importance: NDArray[np.floating] | None) -> Iterator[_Piece]:
    """Rows of a matrix from top to bottom, the weight of their columns, and the number of the first."""
    matrix = item.matrix
    height = max(1, PIECE_BYTES // (4 * matrix.columns))
    if not matrix.stacked:
        for start in range(0, matrix.rows, height):
            piece = reader.read(matrix.name, start, min(matrix.rows, start + height))
            yield piece.float().numpy(), importance, start
        return
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


def _rounded(
    pool: ThreadPoolExecutor, rounding: Rounding, pieces: Iterator[_Piece]
) -> Iterator[tuple[Codes, Float32, int]]:
    """Each piece rounded, with the number of its first row; only a few are in memory at once, unlike with ``map``."""
    pending: deque[tuple[Future[tuple[Codes, Float32]], int]] = deque()
    for rows, importance, start in pieces:
        pending.append((pool.submit(round_blocks, rows, rounding, importance), start))
        if len(pending) > _PIECES_IN_FLIGHT:
            future, first = pending.popleft()
            yield *future.result(), first
    for future, first in pending:
        yield *future.result(), first


def _write(descriptor: int, array: NDArray[np.generic], offset: int) -> None:
    view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _bytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))
