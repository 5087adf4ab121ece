"""The kernels of one op as they travel inside a TensorRT plan: one blob of bytes, the same for the same kernels.

Layout: magic, length of the header (8 bytes, little-endian), sha256 of the header, header (JSON), cubins one after
the other, each stored once. Reading checks everything before anything is used.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mythos_edge.model.errors import BundleError
from mythos_edge.plugins import kernel_store

MAGIC = b"mythos-kernels-1"
_LENGTH_BYTES = 8
_HASH_BYTES = 32


@dataclass(frozen=True)
class CarriedKernel:
    """One compiled kernel: ``entry`` in ``cubin``, for one compute capability, with ``threads`` a block."""

    name: str
    compute_capability: int
    entry: str
    threads: int
    shared_bytes: int
    hidden_pointers: int
    sha256: str
    cubin: bytes


@dataclass(frozen=True)
class Carried:
    """Everything that one plugin of a plan needs at run time: its op, the attributes of its node, and its kernels."""

    op: str
    attributes: dict[str, int | float]
    kernels: tuple[CarriedKernel, ...]

    def for_gpu(self, compute_capability: int) -> dict[str, CarriedKernel]:
        """The kernels by name. Raises BundleError when the plan carries none for this GPU."""
        found = {kernel.name: kernel for kernel in self.kernels if kernel.compute_capability == compute_capability}
        if not found:
            known = ", ".join(map(str, sorted({kernel.compute_capability for kernel in self.kernels}))) or "none"
            raise BundleError(
                f"{self.op}: this plan carries kernels for SM {known}, and this GPU is SM {compute_capability}: "
                "build the target for it"
            )
        return found


def collect(
    op: str, attributes: Mapping[str, int | float], names: Iterable[str], compute_capabilities: Iterable[int]
) -> Carried:
    """The kernels ``names`` for each GPU. Raises BuildError for one that was not built."""
    wanted = sorted(set(names))
    kernels = [
        _carried(kernel_store.kernel(name, compute_capability), compute_capability)
        for compute_capability in sorted(set(compute_capabilities))
        for name in wanted
    ]
    return Carried(op, dict(attributes), tuple(kernels))


def _carried(built: kernel_store.Kernel, compute_capability: int) -> CarriedKernel:
    return CarriedKernel(
        built.name,
        compute_capability,
        built.entry,
        built.threads,
        built.shared_bytes,
        built.hidden_pointers,
        built.sha256,
        built.cubin,
    )


def encode(carried: Carried) -> bytes:
    """The blob."""
    cubins = {kernel.sha256: kernel.cubin for kernel in carried.kernels}
    header = {
        "op": carried.op,
        "attributes": carried.attributes,
        "cubins": [[sha256, len(cubin)] for sha256, cubin in cubins.items()],
        "kernels": [
            [
                kernel.name,
                kernel.compute_capability,
                kernel.entry,
                kernel.threads,
                kernel.shared_bytes,
                kernel.hidden_pointers,
                kernel.sha256,
            ]
            for kernel in carried.kernels
        ],
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    length = len(text).to_bytes(_LENGTH_BYTES, "little")
    return b"".join([MAGIC, length, hashlib.sha256(text).digest(), text, *cubins.values()])


def decode(blob: bytes) -> Carried:
    """The value that ``encode`` was given. Raises BundleError for a blob that is damaged or of another version."""
    start = len(MAGIC) + _LENGTH_BYTES + _HASH_BYTES
    if not blob.startswith(MAGIC) or len(blob) < start:
        found = blob[: len(MAGIC)]
        raise BundleError(
            f"the kernels in this plan begin with {found!r}, expected {MAGIC!r}: the plan is damaged or of another "
            "version of mythos-edge: build the target again"
        )
    end = start + int.from_bytes(blob[len(MAGIC) : len(MAGIC) + _LENGTH_BYTES], "little")
    text = blob[start:end]
    if hashlib.sha256(text).digest() != blob[start - _HASH_BYTES : start]:
        raise _damaged("their list")
    header: dict[str, Any] = json.loads(text)
    cubins: dict[str, bytes] = {}
    for sha256, size in header["cubins"]:
        cubin = blob[end : end + size]
        if hashlib.sha256(cubin).hexdigest() != sha256:
            raise _damaged(f"cubin {sha256[:12]}")
        cubins[sha256], end = cubin, end + size
    if end != len(blob):
        raise _damaged(f"{len(blob)} bytes, expected {end}")
    kernels = tuple(
        CarriedKernel(name, compute_capability, entry, threads, shared_bytes, hidden_pointers, sha256, cubins[sha256])
        for name, compute_capability, entry, threads, shared_bytes, hidden_pointers, sha256 in header["kernels"]
    )
    return Carried(header["op"], header["attributes"], kernels)


def _damaged(what: str) -> BundleError:
    return BundleError(f"the kernels in this plan are damaged ({what}): copy the plan or build the target again")
