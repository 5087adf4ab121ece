"""The weights of an engine's graphs on disk: a bundle's own, converted to the compute dtype or rounded.

Streamed piece by piece, so that memory does not grow with the model. What the bundle stores as it is wanted is not
copied: its weights file is linked beside the graphs. Not here: which matrices are rounded (``tensorrt_passes``).
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from mythos_edge.exporter.weights import ALIGNMENT, is_unwritten
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.checkpoint import Checkpoint
from mythos_edge.model.errors import BuildError
from mythos_edge.model.layout import PIECE_BYTES, TensorReader
from mythos_edge.model.machine import cores
from mythos_edge.model.manifest import WEIGHTS_FILE
from mythos_edge.model.tensor_files import TensorFile, read_tensor_file

ENGINE_WEIGHTS_FILE = "engine.weights"
_TORCH = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}
_LARGEST = {ir.DataType.INT8: 127.0, ir.DataType.INT4: 7.0, ir.DataType.FLOAT8E4M3FN: 448.0}
# An int4 block's scale maps its largest value to this far beyond 7, in steps of the range; the best is kept.
_STRETCHES = (0.0, -0.8, -0.4, 0.4, 0.8, 1.2)
# Values rounded at once, so that what is tried stays in the cache.
_VALUES_AT_ONCE = 1 << 18

Float32 = NDArray[np.float32]
Wanted = Mapping[str, ir.Value]


def write_engine_weights(
    wanted: Wanted, bundle: Bundle, folder: Path, progress: Callable[[float], None]
) -> dict[str, ir.ExternalTensor]:
    """The tensors of ``wanted`` by name, in files of ``folder``; a weight, or ``.codes`` and ``.scale`` of one.

    Raises BuildError for a weight beyond the range of fp16, and when the disk is full.
    """
    stored = read_tensor_file(bundle.file(WEIGHTS_FILE))
    try:
        linked = _linked(wanted, stored, bundle.file(WEIGHTS_FILE), folder)
        placed = _placed({name: value for name, value in wanted.items() if name not in linked}, folder)
        path = folder / ENGINE_WEIGHTS_FILE
        with (
            path.open("wb", buffering=0) as file,
            Checkpoint(bundle.path, stored.kind, bundle.manifest.config, stored.entries) as reader,
            ThreadPoolExecutor(max_workers=cores()) as pool,
        ):
            total = sum(tensor.length or 0 for tensor in placed.values())
            os.truncate(file.fileno(), max((_end(tensor) for tensor in placed.values()), default=0))
            done = 0
            for offset, data in _pieces(placed, stored, reader, pool):
                _write(file.fileno(), data, offset)
                done += len(data)
                progress(done / total)
            assert done == total
    except OSError as error:
        raise BuildError(f"{folder}: cannot write the engine's weights: {error.strerror}") from error
    return linked | placed


def attach(graph: ir.Graph, tensors: Mapping[str, ir.ExternalTensor]) -> None:
    """Gives every weight of a graph its value."""
    for name, value in graph.initializers.items():
        if name in tensors:
            value.const_value = tensors[name]
        assert not is_unwritten(value), name


def _linked(wanted: Wanted, stored: TensorFile, source: Path, folder: Path) -> dict[str, ir.ExternalTensor]:
    """The tensors that the bundle has as they are wanted, by a link to its file; none where links cannot be."""
    same = [
        name
        for name, value in wanted.items()
        if name in stored.entries and stored.entries[name].dtype == _TORCH.get(value.dtype or ir.DataType.UNDEFINED)
    ]
    link = folder / WEIGHTS_FILE
    link.unlink(missing_ok=True)
    if not same:
        return {}
    try:
        # Not a hard link: while there are two, onnx reads no weights of the bundle, here and in other programs.
        link.symlink_to(source.resolve())
    except OSError:  # a disk without links: they are copied like the others
        return {}
    return {
        name: _tensor(wanted[name], WEIGHTS_FILE, stored.entries[name].offset, stored.entries[name].n_bytes, folder)
        for name in same
    }


def _placed(wanted: Wanted, folder: Path) -> dict[str, ir.ExternalTensor]:
    offset, placed = 0, {}
    for name, value in wanted.items():
        assert value.dtype is not None
        length = math.ceil(math.prod(_shape(value)) * value.dtype.itemsize)
        placed[name] = _tensor(value, ENGINE_WEIGHTS_FILE, offset, length, folder)
        offset += length + -length % ALIGNMENT
    return placed


def _tensor(value: ir.Value, file: str, offset: int, length: int, folder: Path) -> ir.ExternalTensor:
    assert value.dtype is not None
    shape = ir.Shape(_shape(value))
    return ir.ExternalTensor(file, offset, length, value.dtype, shape=shape, name=str(value.name), base_dir=str(folder))


def _pieces(
    placed: Mapping[str, ir.ExternalTensor], stored: TensorFile, reader: TensorReader, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, bytes]]:
    """Bytes of the file and where they go, tensor by tensor."""
    for name, tensor in placed.items():
        if name.endswith(".scale") and name not in stored.entries:
            continue  # comes with its codes
        source = name.removesuffix(".codes")
        scale = placed.get(f"{source}.scale") if source != name else None
        offset, scale_offset = tensor.offset or 0, 0 if scale is None else scale.offset or 0
        entry = stored.entries[source]
        height = max(1, PIECE_BYTES // max(1, 4 * entry.n_elements // entry.shape[0]))
        for start in range(0, entry.shape[0], height):
            piece = reader.read(source, start, min(entry.shape[0], start + height)).float()
            if scale is None:
                data = _converted(piece, tensor.dtype, name)
            else:
                codes, scales = _rounded(pool, _padded(piece.numpy(), tensor), tensor, scale)
                yield scale_offset, scales
                scale_offset, data = scale_offset + len(scales), codes
            yield offset, data
            offset += len(data)


def _converted(piece: torch.Tensor, dtype: ir.DataType, name: str) -> bytes:
    made = piece.to(_TORCH[dtype]).contiguous()
    if made.dtype == torch.float16 and not torch.isfinite(made).all():
        raise BuildError(
            f"{name}: a weight of {piece.abs().max().item():g} does not fit fp16 (largest 65504): build with bf16"
        )
    return made.view(-1).view(torch.uint8).numpy().tobytes()


def _padded(piece: Float32, codes: ir.ExternalTensor) -> Float32:
    """The piece with zeros up to the sizes of its codes."""
    missing = [(0, size - had) for size, had in zip(codes.shape.numpy()[1:], piece.shape[1:], strict=True)]
    return np.pad(piece, [(0, 0), *missing])


def _rounded(
    pool: ThreadPoolExecutor, piece: Float32, codes: ir.ExternalTensor, scale: ir.ExternalTensor
) -> tuple[bytes, bytes]:
    """The bytes of a piece's codes and of their scales."""
    block = math.prod(codes.shape.numpy()) // math.prod(scale.shape.numpy())
    rows = piece.reshape(-1, block)
    step = max(1, _VALUES_AT_ONCE // block)
    parts = [rows[start : start + step] for start in range(0, len(rows), step)]
    made = list(pool.map(lambda part: round_symmetrically(part, codes.dtype, scale.dtype), parts))
    return b"".join(packed(one, codes.dtype) for one, _ in made), b"".join(scales.tobytes() for _, scales in made)


def round_symmetrically(
    rows: Float32, codes: ir.DataType, scale: ir.DataType
) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Codes (N, K) as int8 or float8 and scales (N,) above zero in their own dtype: a value is code * scale.

    int4 tries a few scales and keeps the one of the least squared error; ``rounding`` does so with scales of either
    sign, which TensorRT refuses.
    """
    largest = np.abs(rows).max(axis=1)
    best_error, best_codes, best_scale = np.full(len(rows), np.inf, np.float32), None, None
    for stretch in _STRETCHES if codes == ir.DataType.INT4 else (0.0,):
        stored = (largest / np.float32(_LARGEST[codes] + stretch)).astype(scale.numpy())
        # Rows of zeros, and rows so small that the scale's dtype has no number for them, are zeros at any scale.
        stored = np.where(stored == 0, np.ones_like(stored), stored)
        wide = stored.astype(np.float32)[:, None]
        tried = _nearest(rows / wide, codes)
        error = np.square(tried.astype(np.float32) * wide - rows).sum(axis=1)
        if best_codes is None or best_scale is None:
            best_error, best_codes, best_scale = error, tried, stored
            continue
        better = error < best_error
        best_error[better], best_codes[better], best_scale[better] = error[better], tried[better], stored[better]
    assert best_codes is not None
    assert best_scale is not None
    return best_codes, best_scale


def _nearest(values: Float32, codes: ir.DataType) -> NDArray[np.generic]:
    top = _LARGEST[codes]
    if codes == ir.DataType.FLOAT8E4M3FN:
        return np.clip(values, -top, top).astype(ml_dtypes.float8_e4m3fn)
    return np.clip(np.rint(values), -8 if codes == ir.DataType.INT4 else -top, top).astype(np.int8)


def packed(codes: NDArray[np.generic], dtype: ir.DataType) -> bytes:
    """The bytes of codes as ONNX stores them: of two int4 neighbours the first is in the low half of a byte."""
    if dtype != ir.DataType.INT4:
        return codes.tobytes()
    pairs = codes.reshape(-1, 2).view(np.uint8)
    return (pairs[:, 0] & 15 | pairs[:, 1] << 4).tobytes()


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in value.shape if isinstance(size, int))


def _end(tensor: ir.ExternalTensor) -> int:
    return (tensor.offset or 0) + (tensor.length or 0)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
