"""Stand-ins for compiled kernels: bytes that name their entry, as the fake driver wants them."""

import hashlib

from mythos_edge.model.errors import BuildError
from mythos_edge.plugins.kernel_store import Kernel
from mythos_edge.plugins.kernels.variants import VARIANTS

KNOWN = (75, 86, 89, 90, 120)


def fake_kernel(name: str, compute_capability: int) -> Kernel:
    """Stands in for ``kernel_store.kernel``; threads, shared bytes and hidden pointers differ from kernel to kernel."""
    variant, number = VARIANTS[name], sorted(VARIANTS).index(name)
    if compute_capability not in KNOWN:
        raise BuildError(f"kernel {name} is not built for SM {compute_capability}")
    cubin = f"\x7fELF\0cubin of {name}_entry for SM {compute_capability} ".encode() + bytes(range(256))
    return Kernel(
        name=name,
        entry=f"{name}_entry",
        cubin=cubin,
        shared_bytes=1024 * (number % 90),
        threads=32 * variant.tuned(compute_capability).warps,
        hidden_pointers=number % 3,
        arguments=variant.arguments,
        sha256=hashlib.sha256(cubin).hexdigest(),
    )
