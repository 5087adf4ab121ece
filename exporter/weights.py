"""Streams a checkpoint into the bundle's one weights file, piece by piece: memory does not grow with the model.

The file is a safetensors file that is also the external data of every graph, so the weights of a bundle stay
readable by everyone and exist once. Not here: what a stored tensor is made of (``model/layout.py``).
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from mythos_edge.model.config import MythosConfig
from mythos_edge.model.errors import CheckpointError, ExportError
from mythos_edge.model.layout import Recipe, TensorReader, recipes, stored_table_of
from mythos_edge.model.manifest import WEIGHTS_FILE
from mythos_edge.model.rope_tables import StoredTable

# Vector loads of the CPU kernels want no more; the safetensors format allows no holes between tensors.
ALIGNMENT = 64
_MAX_PIECES_IN_FLIGHT = 4
_NOWHERE = "unwritten"
_LOOKUPS = ("Gather", "GatherBlockQuantized", "RotaryEmbedding", "Reshape")


@dataclass(frozen=True)
class StorageType:
    """One dtype a bundle can be stored in, under its names in the CLI, torch, safetensors and ONNX."""

    name: str
    torch: torch.dtype
    safetensors: str
    onnx: ir.DataType


STORAGE_TYPES = {
    "fp32": StorageType("fp32", torch.float32, "F32", ir.DataType.FLOAT),
    "fp16": StorageType("fp16", torch.float16, "F16", ir.DataType.FLOAT16),
    "bf16": StorageType("bf16", torch.bfloat16, "BF16", ir.DataType.BFLOAT16),
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor will lie: ``offset`` and ``length`` in bytes from the start of the file."""

    recipe: Recipe
    type: StorageType
    offset: int
    length: int


@dataclass(frozen=True)
class WeightsPlan:
    """The whole weights file before a byte of it is written."""

    header: bytes
    tensors: tuple[StoredTensor, ...]

    @property
    def total_bytes(self) -> int:
        return len(self.header) + sum(tensor.length for tensor in self.tensors)


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


def plan_weights(config: MythosConfig, max_context: int, dtype: str) -> WeightsPlan:
    """The layout of the weights file: aligned tensors first, so that all of them stay aligned."""
    sized = []
    for recipe in recipes(config, max_context):
        kind = STORAGE_TYPES[dtype if recipe.narrow else "fp32"]
        count = 1
        for size in recipe.shape:
            count *= size
        sized.append((recipe, kind, count * kind.torch.itemsize))
    sized.sort(key=lambda item: (item[2] % ALIGNMENT != 0, -item[1].torch.itemsize))
    header, offsets = laid_out([(r.name, kind.safetensors, r.shape, length) for r, kind, length in sized])
    tensors = [StoredTensor(r, kind, offsets[r.name], length) for r, kind, length in sized]
    return WeightsPlan(header, tuple(tensors))


def laid_out(sized: Sequence[tuple[str, str, tuple[int, ...], int]]) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file of tensors (name, dtype, shape, bytes) in this order, and each one's offset."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", "made_by": "mythos-edge"}}
    offset = 0
    for name, dtype, shape, length in sized:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    offsets, offset = {}, len(head)
    for name, _, _, length in sized:
        offsets[name] = offset
        offset += length
    return head, offsets


def write_weights(
    plan: WeightsPlan, reader: TensorReader, path: Path, progress: Callable[[int], None]
) -> WeightsHashes:
    """Writes the file; ``progress`` is told the bytes written so far.

    Raises CheckpointError for a weight that is not finite, ExportError for one beyond the range of the dtype or
    when the disk is full.
    """
    written = _HashingQueue()
    source = _HashedReader(reader)
    try:
        with path.open("wb", buffering=0) as file, written, source.hashes:
            done = _write(file.fileno(), plan.header, written)
            for tensor in plan.tensors:
                for piece in _stored_pieces(tensor, source):
                    done += _write(file.fileno(), piece, written)
                    progress(done)
            assert done == plan.total_bytes
    except OSError as error:
        raise ExportError(f"{path.parent}: cannot write the weights: {error.strerror}") from error
    return WeightsHashes(written.hexdigest(), source.hashes.hexdigest())


def attach_weights(graph: ir.Graph, plan: WeightsPlan, folder: Path) -> None:
    """Points every weight of a traced graph into the weights file, with a Cast where it is stored narrower."""
    stored = {tensor.recipe.name: tensor for tensor in plan.tensors}
    for name, value in list(graph.initializers.items()):
        if name not in stored:
            assert value.const_value is not None, name
            continue
        tensor = stored[name]
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE,
            tensor.offset,
            tensor.length,
            tensor.type.onnx,
            shape=ir.Shape(tensor.recipe.shape),
            name=name,
            base_dir=str(folder),
        )
        if tensor.type.onnx != ir.DataType.FLOAT:
            _widen(graph, value, tensor.type.onnx)


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


def bytes_read(graph: ir.Graph, config: MythosConfig) -> int:
    """Bytes of weights that one row reads: all, but of the experts the chosen, and of tables next to nothing."""
    share = config.n_experts_per_tok / config.n_experts
    total = 0.0
    for value in graph.initializers.values():
        tensor = value.const_value
        looked_up = all(node.op_type in _LOOKUPS for node, _ in value.uses())
        if not isinstance(tensor, ir.ExternalTensor) or looked_up:
            continue
        routed = ".fc1" in str(value.name) or ".fc2" in str(value.name)
        total += tensor.nbytes * (share if routed else 1.0)
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


def _stored_pieces(tensor: StoredTensor, reader: TensorReader) -> Iterator[memoryview]:
    length = 0
    for piece in tensor.recipe.pieces(reader):
        stored = piece.to(tensor.type.torch).contiguous()
        largest = torch.finfo(stored.dtype).max
        if largest < torch.finfo(piece.dtype).max and not torch.isfinite(stored).all():
            raise ExportError(
                f"{tensor.recipe.name}: a weight of {piece.abs().max().item():g} does not fit {tensor.type.name} "
                f"(largest {largest:g}): {_WHERE_IT_FITS[tensor.type.name]}"
            )
        length += stored.nbytes
        yield stored.view(-1).view(torch.uint8).numpy().data
    assert length == tensor.length, tensor.recipe.name


def _write(descriptor: int, data: bytes | memoryview, hashes: "_HashingQueue") -> int:
    hashes.update(data)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    return len(data)


class _HashingQueue:
    """A sha256 fed on a thread of its own, a few pieces behind the writer."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> "_HashingQueue":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=False)

    def update(self, data: bytes | memoryview) -> None:
        while len(self._pending) >= _MAX_PIECES_IN_FLIGHT:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._sha256.update, data))

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


class _HashedReader:
    """A reader that refuses weights that are not finite, by their name in the checkpoint, and hashes what it reads."""

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self.hashes = _HashingQueue()

    @property
    def config(self) -> MythosConfig:
        return self._reader.config

    @property
    def stored_table(self) -> StoredTable | None:
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
