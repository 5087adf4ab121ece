"""The weights of an engine's graphs on disk: a bundle's own, converted to the compute dtype or rounded.

Streamed piece by piece, so that memory does not grow with the model. What the bundle stores as it is wanted is not
copied: its weights file is linked beside the graphs. Not here: which matrices are rounded (``tensorrt_passes``).
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from mythos_edge.exporter.rounding import round_symmetrically
from mythos_edge.exporter.weight_file import Piece, StoredTensor, WeightFile, on_all_cores, plan_file
from mythos_edge.exporter.weights import BY_ONNX, converted, is_unwritten, piece_of, row_pieces, weights_of
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BuildError
from mythos_edge.model.manifest import WEIGHTS_FILE
from mythos_edge.model.stored_checkpoint import Checkpoint

ENGINE_WEIGHTS_FILE = "engine.safetensors"
_WHERE_IT_FITS = {
    ir.DataType.FLOAT: "export an earlier checkpoint",
    ir.DataType.FLOAT16: "build with bf16",
    ir.DataType.BFLOAT16: "build with fp32",
}

Wanted = Mapping[str, ir.Value]
Tensors = dict[str, ir.TensorProtocol]


def write_engine_weights(wanted: Wanted, bundle: Bundle, folder: Path, progress: Callable[[float], None]) -> Tensors:
    """The tensors of ``wanted`` by name, in files of ``folder``; a weight, or ``.codes`` and ``.scale`` of one.

    Raises BuildError for a weight beyond the range of what the engine computes in, and when the disk is full.
    """
    with weights_of(bundle) as reader:
        linked = _linked(wanted, reader, bundle.file(WEIGHTS_FILE), folder)
        plan = plan_file(_stored(value) for name, value in wanted.items() if name not in linked)
        if plan.entries:
            pieces = (piece for made in on_all_cores(_jobs(plan, reader)) for piece in made)
            plan.write(folder / ENGINE_WEIGHTS_FILE, pieces, BuildError, progress)
    return linked | plan.tensors(ENGINE_WEIGHTS_FILE, folder)


def attach(graph: ir.Graph, tensors: Mapping[str, ir.TensorProtocol]) -> None:
    """Gives every weight of a graph its value."""
    for name, value in graph.initializers.items():
        if name in tensors:
            value.const_value = tensors[name]
        assert not is_unwritten(value), name


def _linked(wanted: Wanted, reader: Checkpoint, source: Path, folder: Path) -> Tensors:
    """The tensors that the bundle has as they are wanted, by a link to its file; none where links cannot be."""
    kinds = {name: entry.dtype for name, entry in reader.tensors.items()}
    same = [name for name, value in wanted.items() if name in kinds and kinds[name] == _torch_type(value)]
    link = folder / WEIGHTS_FILE
    link.unlink(missing_ok=True)
    if not same:
        return {}
    try:
        # Not a hard link: while there are two, onnx reads no weights of the bundle, here and in other programs.
        link.symlink_to(source.resolve())
    except OSError:  # a disk without links: they are copied like the others
        return {}
    stored = [_stored(wanted[name], reader.tensors[name].offset) for name in same]
    return WeightFile(b"", {entry.name: entry for entry in stored}).tensors(WEIGHTS_FILE, folder)


def _torch_type(value: ir.Value) -> torch.dtype | None:
    return BY_ONNX[value.dtype].torch if value.dtype in BY_ONNX else None


def _stored(value: ir.Value, offset: int = 0) -> StoredTensor:
    assert value.dtype is not None
    assert value.shape is not None
    return StoredTensor(str(value.name), value.dtype, value.shape.numpy(), offset)


def _jobs(plan: WeightFile, reader: Checkpoint) -> Iterator[Callable[[], list[Piece]]]:
    """Jobs that make what the file holds of each piece of the bundle's weights."""
    for name, entry in plan.entries.items():
        source = name.removesuffix(".codes")
        if name.endswith(".scale") and name not in reader.tensors:
            continue  # comes with its codes
        make = partial(_converted, entry)
        if source != name:
            make = partial(_rounded, entry, plan.entries[f"{source}.scale"])
        for first, piece in row_pieces(reader, source, reader.tensors[source].shape):
            yield partial(make, first, piece.float())


def _converted(entry: StoredTensor, first: int, piece: torch.Tensor) -> list[Piece]:
    made = converted(piece, entry.dtype, entry.name, BuildError, _WHERE_IT_FITS[entry.dtype])
    return [piece_of(entry.name, first * entry.n_bytes // entry.shape[0], made)]


def _rounded(codes: StoredTensor, scale: StoredTensor, first: int, piece: torch.Tensor) -> list[Piece]:
    """A piece's codes and their scales; the piece gets zeros up to the sizes of its codes."""
    converted(piece, scale.dtype, codes.name.removesuffix(".codes"), BuildError, _WHERE_IT_FITS[scale.dtype])
    missing = [(0, size - had) for size, had in zip(codes.shape[1:], piece.shape[1:], strict=True)]
    whole = np.pad(piece.numpy(), [(0, 0), *missing])
    block = whole[0].size // int(np.prod(scale.shape[1:]))
    made, scales = round_symmetrically(whole.reshape(-1, block), codes.dtype, scale.dtype)
    starts = (first * entry.n_bytes // entry.shape[0] for entry in (codes, scale))
    return [
        Piece(entry.name, start, data)
        for entry, start, data in zip((codes, scale), starts, (packed(made, codes.dtype), scales), strict=True)
    ]


def packed(codes: NDArray[np.generic], dtype: ir.DataType) -> NDArray[np.generic]:
    """Codes as ONNX stores them: of two int4 neighbours the first is in the low half of a byte."""
    if dtype != ir.DataType.INT4:
        return codes
    pairs = codes.reshape(-1, 2).view(np.uint8)
    return pairs[:, 0] & 15 | pairs[:, 1] << 4
