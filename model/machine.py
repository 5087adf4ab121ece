"""How much memory this machine has to offer. Not here: its processor (``plugins/processor.py``) and its GPUs."""

from pathlib import Path


def free_memory_bytes() -> int | None:
    """Memory that can be allocated without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":") for line in lines)
    return int(sizes["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in sizes else None
