"""Finds out which integer products this processor has, as far as targets depend on it. Import-light."""

import platform
from pathlib import Path


def has_integer_dot_products() -> bool:
    """Whether 8-bit integers are multiplied and summed exactly in one instruction (VNNI, or Arm's dot products).

    Older x86 processors add pairs of products in 16 bits, which overflow. False where the system does not tell.
    """
    arm = platform.machine().lower() in ("aarch64", "arm64")
    if arm and platform.system() == "Darwin":
        return True
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    name, wanted = ("Features", {"asimddp"}) if arm else ("flags", {"avx512_vnni", "avx_vnni"})
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(name)), [])
    return not wanted.isdisjoint(flags)
