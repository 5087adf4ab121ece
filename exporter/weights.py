"""Streams a checkpoint into the bundle's one weights file, and gives the weights of graphs their places in it.

All graphs of a bundle share that file, so that its weights are readable by everyone and exist once. Not here: the
file's format (``weight_file``), what a stored tensor is made of (``model/layout.py``).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from mythos_edge.exporter.weight_file import HashingQueue, Piece, StoredTensor, WeightFile, plan_file
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import CheckpointError, ExportError, MythosEdgeError
from mythos_edge.model.families.family import Config
from mythos_edge.model.families.table import config_of
from mythos_edge.model.layout import recipes
from mythos_edge.model.manifest import WEIGHTS_FILE
from mythos_edge.model.recipes import PIECE_BYTES, Recipe, TensorReader, stored_table_of
from mythos_edge.model.stored_checkpoint import Checkpoint
from mythos_edge.model.tensor_files import read_tensor_file

_NOWHERE = "unwritten"
_LOOKUPS = ("Gather", "GatherBlockQuantized", "RotaryEmbedding", "Reshape")


@dataclass(frozen=True)
class StorageType:
    """One dtype a bundle can be stored in, under its names in the CLI, torch and ONNX."""

    name: str
    torch: torch.dtype
    onnx: ir.DataType


STORAGE_TYPES = {
    "fp32": StorageType("fp32", torch.float32, ir.DataType.FLOAT),
    "fp16": StorageType("fp16", torch.float16, ir.DataType.FLOAT16),
    "bf16": StorageType("bf16", torch.bfloat16, ir.DataType.BFLOAT16),
}
BY_ONNX = {kind.onnx: kind for kind in STORAGE_TYPES.values()}


@dataclass(frozen=True)
class WeightsPlan:
    """The whole weights file before a byte of it is written, and how each of its tensors is read."""

    file: WeightFile
    recipes: dict[str, Recipe]


@dataclass(frozen=True)
class WeightsHashes:
    """sha256 of the file written, and of the checkpoint's tensors (name and bytes) in the order they were read."""

    file: str
    source: str


_WHERE_IT_FITS = {
    "fp32": "use an earlier checkpoint",
    "bf16": "export with --dtype fp32",
    "fp16": "export with --dtype bf16 or fp32",
}


def plan_weights(config: Config, max_context: int, dtype: str) -> WeightsPlan:
    """The layout of the weights file of an export."""
    found = {recipe.name: recipe for recipe in recipes(config, max_context)}
    kinds = {name: STORAGE_TYPES[dtype if recipe.narrow else "fp32"].onnx for name, recipe in found.items()}
    return WeightsPlan(plan_file(StoredTensor(name, kinds[name], found[name].shape) for name in found), found)


def write_weights(
    plan: WeightsPlan, reader: TensorReader, path: Path, progress: Callable[[float], None]
) -> WeightsHashes:
    """Writes the file; ``progress`` is told the fraction that is written.

    Raises CheckpointError for a weight that is not finite, ExportError for one beyond the range of the dtype or
    when the disk is full.
    """
    source = _HashedReader(reader)
    with HashingQueue() as written, source.hashes:
        pieces = _in_turn(plan.file, lambda name: plan.recipes[name].pieces(source), ExportError, _WHERE_IT_FITS)
        plan.file.write(path, pieces, ExportError, progress, written)
    return WeightsHashes(written.hexdigest(), source.hashes.hexdigest())


@contextmanager
def weights_of(bundle: Bundle) -> Iterator[Checkpoint]:
    """A reader of the weights that a bundle stores."""
    stored = read_tensor_file(bundle.file(WEIGHTS_FILE))
    with Checkpoint(bundle.path, stored.kind, config_of(bundle.manifest), stored.entries) as reader:
        yield reader


def copied_pieces(
    plan: WeightFile, reader: TensorReader, refusal: type[MythosEdgeError], mends: Mapping[str, str]
) -> Iterator[Piece]:
    """The tensors of ``plan`` as the weights of a bundle have them, in the dtypes of ``plan``.

    Raises ``refusal`` for a weight beyond the range of a dtype; ``mends`` says by dtype what to do about it.
    """
    shapes = {name: entry.shape for name, entry in plan.entries.items()}
    return _in_turn(plan, lambda name: (piece for _, piece in row_pieces(reader, name, shapes[name])), refusal, mends)


def row_pieces(reader: TensorReader, name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """A tensor in pieces of whole rows along its first axis, each with the number of its first row."""
    rows, per_row = shape[0], torch.Size(shape[1:]).numel()
    height = max(1, PIECE_BYTES // max(1, 4 * per_row))
    for start in range(0, rows, height):
        yield start, reader.read(name, start, min(rows, start + height))


def converted(piece: Tensor, dtype: ir.DataType, name: str, refusal: type[MythosEdgeError], mend: str) -> Tensor:
    """``piece`` of the tensor ``name`` in ``dtype``. Raises ``refusal`` where a weight is beyond its range."""
    kind = BY_ONNX[dtype]
    stored = piece.to(kind.torch).contiguous()
    largest = torch.finfo(stored.dtype).max
    if largest < torch.finfo(piece.dtype).max and not torch.isfinite(stored).all():
        raise refusal(
            f"{name}: a weight of {piece.abs().max().item():g} does not fit {kind.name} (largest {largest:g}): {mend}"
        )
    return stored


def piece_of(name: str, start: int, values: Tensor) -> Piece:
    """Contiguous ``values`` as bytes for a weights file, from byte ``start`` of the tensor on."""
    return Piece(name, start, values.view(-1).view(torch.uint8).numpy())


def attach_weights(graph: ir.Graph, plan: WeightsPlan, folder: Path) -> None:
    """Points every weight of a traced graph into the weights file, with a Cast where it is stored narrower."""
    stored = plan.file.tensors(WEIGHTS_FILE, folder)
    for name, value in list(graph.initializers.items()):
        if name not in stored:
            assert value.const_value is not None, name
            continue
        value.const_value = stored[name]
        if stored[name].dtype != ir.DataType.FLOAT:
            _widen(graph, value, stored[name].dtype)


def unwritten(name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.ExternalTensor:
    """A stand-in for the value of a weight that is not on disk yet: graphs can be changed, saved and loaded with it."""
    return ir.ExternalTensor(_NOWHERE, 0, 0, dtype, shape=ir.Shape(shape), name=name, base_dir="")


def is_unwritten(value: ir.Value) -> bool:
    return isinstance(value.const_value, ir.ExternalTensor) and value.const_value.location == _NOWHERE


def name_weights(graph: ir.Graph) -> None:
    """Gives all weights of a traced graph stand-ins for values."""
    for name, value in graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None
            assert value.shape is not None
            value.const_value = unwritten(name, value.dtype, value.shape.numpy())


def bytes_read(graph: ir.Graph, config: Config) -> int:
    """Bytes of weights that one row reads: all, but of the experts the chosen, and of tables next to nothing."""
    shares = {recipe.name: recipe.share for recipe in recipes(config, 1) if recipe.share < 1}
    total = 0.0
    for value in graph.initializers.values():
        tensor = value.const_value
        looked_up = all(node.op_type in _LOOKUPS for node, _ in value.uses())
        if not isinstance(tensor, ir.ExternalTensor) or looked_up:
            continue
        # Rounded ones, and single experts, have names that begin with that of the stored tensor.
        share = next((share for name, share in shares.items() if str(value.name).startswith(name)), 1.0)
        total += tensor.nbytes * share
    return round(total)


def _widen(graph: ir.Graph, value: ir.Value, stored: ir.DataType) -> None:
    """Stores ``value`` as ``stored`` and computes with it in float32, which every runtime can do."""
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}.cast")
    wide = cast.outputs[0]
    wide.name, wide.type, wide.shape = f"{value.name}.fp32", ir.TensorType(ir.DataType.FLOAT), value.shape
    ir.convenience.replace_all_uses_with(value, wide)
    cast.replace_input_with(0, value)
    value.type = ir.TensorType(stored)
    graph.insert_before(graph[0], cast)


def _in_turn(
    plan: WeightFile,
    pieces: Callable[[str], Iterable[Tensor]],
    refusal: type[MythosEdgeError],
    mends: Mapping[str, str],
) -> Iterator[Piece]:
    """The ``pieces`` of each tensor by name, in the order and dtypes of ``plan``; ``mends`` are by dtype."""
    for name, entry in plan.entries.items():
        start = 0
        for piece in pieces(name):
            stored = converted(piece, entry.dtype, name, refusal, mends.get(BY_ONNX[entry.dtype].name, ""))
            yield piece_of(name, start, stored)
            start += stored.nbytes


class _HashedReader:
    """A reader that refuses weights that are not finite, by their name in the checkpoint, and hashes what it reads."""

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self.hashes = HashingQueue()

    @property
    def config(self) -> Config:
        return self._reader.config

    @property
    def stored_table(self) -> Any:
        return stored_table_of(self._reader)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        tensor = self._reader.read(name, start, stop)
        # One sum is cheaper than a mask, and is finite unless a weight is not or the sum itself overflows.
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if not torch.isfinite(real.sum(dtype=torch.float32)) and not torch.isfinite(real).all():
            kind = "NaN" if torch.isnan(real).any() else "infinity"
            raise CheckpointError(f"{name}: holds {kind}: this checkpoint cannot be exported; use an earlier one")
        self.hashes.update(f"{name}[{start}]".encode())
        self.hashes.update(real.contiguous().view(-1).view(torch.uint8).numpy().data)
        return tensor
