"""Writes a safetensors file of weights as a stream: planned whole before a byte is written, and never whole in memory.

Every weights file of this project is written here; it is also the external data of graphs. Not here: what the bytes of
a tensor are made of (``weights``, ``rounding``, ``narrowing``, ``lowering.tensorrt_weights``).
"""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mythos_edge.model.errors import MythosEdgeError, OSErrorAs
from mythos_edge.model.machine import cores

# Vector loads of the CPU kernels want no more; the safetensors format allows no holes between tensors.
_ALIGNMENT = 64
_IN_FLIGHT = 4
_NAMES = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.INT8: "I8",
    ir.DataType.UINT8: "U8",
}
Result = TypeVar("Result")


class Piece(NamedTuple):
    """Bytes of a tensor, from its byte ``start`` on."""

    name: str
    start: int
    data: NDArray[Any]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: at byte ``offset`` of the file."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor; two numbers of 4 bits share one."""
        return math.ceil(math.prod(self.shape) * self.dtype.itemsize)


@dataclass(frozen=True)
class WeightFile:
    """A whole weights file before a byte of it is written; ``entries`` by name, in the order of the file."""

    header: bytes
    entries: dict[str, StoredTensor]

    @property
    def total_bytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(entry.n_bytes for entry in self.entries.values())

    def tensors(self, file: str, folder: Path) -> dict[str, ir.TensorProtocol]:
        """The tensors by name, as places in the file that is called ``file`` in ``folder``."""
        return {
            entry.name: ir.ExternalTensor(
                file,
                entry.offset,
                entry.n_bytes,
                entry.dtype,
                shape=ir.Shape(entry.shape),
                name=entry.name,
                base_dir=str(folder),
            )
            for entry in self.entries.values()
        }

    def write(
        self,
        path: Path,
        pieces: Iterable[Piece],
        refusal: type[MythosEdgeError],
        progress: Callable[[float], None] = lambda fraction: None,
        hashes: "HashingQueue | None" = None,
    ) -> None:
        """Writes the file; ``hashes`` is fed its bytes, for which pieces must come in the order of the file.

        Raises ``refusal`` when the file cannot be written, and what ``pieces`` raises.
        """
        done, refused = 0, OSErrorAs(refusal, f"{path.parent}: cannot write {path.name}")
        with refused:
            file = path.open("wb", buffering=0)
        with file:
            with refused:
                os.truncate(file.fileno(), self.total_bytes)
            for offset, data in self._placed(pieces):
                if hashes is not None:
                    assert offset == done, "pieces must come in the order of the file"
                    hashes.update(data)
                with refused:
                    _write(file.fileno(), data, offset)
                done += len(data)
                progress(done / self.total_bytes)
        assert done == self.total_bytes, path.name

    def _placed(self, pieces: Iterable[Piece]) -> Iterator[tuple[int, memoryview]]:
        yield 0, memoryview(self.header)
        for name, start, data in pieces:
            yield self.entries[name].offset + start, np.ascontiguousarray(data).reshape(-1).view(np.uint8).data


def plan_file(tensors: Iterable[StoredTensor]) -> WeightFile:
    """The layout of a file: aligned tensors first, so that all of them stay aligned, and then large numbers first."""
    ordered = sorted(tensors, key=lambda entry: (entry.n_bytes % _ALIGNMENT != 0, -entry.dtype.itemsize))
    header: dict[str, object] = {"__metadata__": {"format": "pt", "made_by": "mythos-edge"}}
    offset, offsets = 0, []
    for entry in ordered:
        end = offset + entry.n_bytes
        # The format has no 4-bit numbers: their bytes, two numbers each, are a vector.
        shape = entry.shape if entry.dtype in _NAMES else (entry.n_bytes,)
        assert entry.dtype in _NAMES or entry.dtype.itemsize < 1, entry.dtype
        kind = _NAMES.get(entry.dtype, "U8")
        header[entry.name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offsets.append(offset)
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    placed = (
        StoredTensor(entry.name, entry.dtype, entry.shape, len(head) + offset)
        for entry, offset in zip(ordered, offsets, strict=True)
    )
    return WeightFile(head, {entry.name: entry for entry in placed})


def on_all_cores(jobs: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """The results of ``jobs``, in their order; only a few are in memory at once, unlike with ``map`` of a pool."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(max_workers=cores()) as pool:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) > _IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class HashingQueue:
    """A sha256 fed on a thread of its own, a few pieces behind the writer."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> "HashingQueue":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=False)

    def update(self, data: bytes | memoryview) -> None:
        """Adds bytes, which must not change any more; waits while too many are pending."""
        while len(self._pending) >= _IN_FLIGHT:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._sha256.update, data))

    def hexdigest(self) -> str:
        """The hash of all bytes; to be asked for when the queue is closed."""
        return self._sha256.hexdigest()


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
