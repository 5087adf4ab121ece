"""Stand-ins for compiled kernels: bytes that name their entry, as the fake driver wants them."""

import hashlib

from mythos_edge.model.errors import BuildError
from mythos_edge.plugins.carried_kernels import CarriedKernel
from mythos_edge.plugins.kernels.variants import VARIANTS

KNOWN = (75, 86, 89, 90, 120)


def fake_kernel(name: str, compute_capability: int) -> CarriedKernel:
    """Has what ``kernel_store.kernel`` gives; threads and shared bytes differ from kernel to kernel."""
    variant = VARIANTS[name]
    if compute_capability not in KNOWN:
        raise BuildError(f"kernel {name} is not built for SM {compute_capability}")
    cubin = f"\x7fELF\0cubin of {name}_entry for SM {compute_capability} ".encode() + bytes(range(256))
    shared_bytes = 1024 * (sorted(VARIANTS).index(name) % 90)
    return CarriedKernel(
        name,
        compute_capability,
        f"{name}_entry",
        32 * variant.tuned(compute_capability).warps,
        shared_bytes,
        hashlib.sha256(cubin).hexdigest(),
        cubin,
    )
