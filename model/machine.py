"""The memory and the cores that this process may use: the machine's, or less where a control group sets a limit.

Control groups of version 1 and 2 are read at their usual places below ``/sys/fs/cgroup``; ``root`` is where the file
system of the machine begins, so that tests can bring one of their own. Not here: the processor
(``plugins/processor.py``) and GPUs.
"""

import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")
# Where version 2 is mounted, alone or beside version 1.
_UNIFIED = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
# Version 1 writes no limit as the largest number of pages.
_NO_LIMIT_BYTES = 1 << 60
# Pages of files and of the kernel's caches: counted as used, and given back when a process asks for memory.
_RECLAIMABLE = {
    2: ("active_file", "inactive_file", "slab_reclaimable"),
    1: ("total_active_file", "total_inactive_file"),
}


@dataclass(frozen=True)
class Memory:
    """Bytes that can be allocated: ``machine_bytes`` without swapping, ``group_bytes`` below the nearest limit of a
    control group, ``limit_bytes`` that limit. None is for what the system does not tell, or for no limit.
    """

    machine_bytes: int | None
    group_bytes: int | None
    limit_bytes: int | None

    @property
    def free_bytes(self) -> int | None:
        """The smaller of what the machine and what the control groups leave; None where neither is known."""
        return min((one for one in (self.machine_bytes, self.group_bytes) if one is not None), default=None)


@dataclass(frozen=True)
class Processors:
    """Cores that this process may run on, and ``quota``, the most of their time it gets, in cores; None is for all."""

    affinity: int
    quota: float | None

    @property
    def cores(self) -> int:
        """Threads that are worth starting: at least 1."""
        return max(1, self.affinity if self.quota is None else min(self.affinity, math.ceil(self.quota)))


def free_memory_bytes(root: Path = _ROOT) -> int | None:
    """Memory that can be allocated without swapping and within the limits of control groups; None where unknown."""
    return memory(root).free_bytes


def cores(root: Path = _ROOT) -> int:
    """CPU cores this process may use: its affinity, or less where a control group has a quota."""
    return processors(root).cores


def memory(root: Path = _ROOT) -> Memory:
    """The memory of the machine and of the control groups around this process."""
    kilobytes = _table(root / "proc/meminfo").get("MemAvailable:")
    free, limit = min(_memory_limits(root), default=(None, None))
    return Memory(None if kilobytes is None else kilobytes * 1024, free, limit)


def processors(root: Path = _ROOT) -> Processors:
    """The cores of this process and the quota of the control groups around it."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Processors(usable, min(_quotas(root), default=None))


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """For each limit around this process the bytes that are free below it, and the limit."""
    for version, group in _groups(root, "memory"):
        if version == 2:
            # Beyond ``high`` a group is slowed down until it is as good as stopped.
            limits, usage = [_number(group / name) for name in ("memory.max", "memory.high")], "memory.current"
        else:
            limits, usage = [_number(group / "memory.limit_in_bytes")], "memory.usage_in_bytes"
        limit = min((one for one in limits if one is not None and one < _NO_LIMIT_BYTES), default=None)
        used = _number(group / usage)
        if limit is not None and used is not None:
            counted = _table(group / "memory.stat")
            reclaimable = sum(counted.get(name, 0) for name in _RECLAIMABLE[version])
            yield max(0, limit - max(0, used - reclaimable)), limit


def _quotas(root: Path) -> Iterator[float]:
    """The quota of each control group around this process that has one, in cores."""
    for version, group in _groups(root, "cpu"):
        if version == 2:
            quota, _, period = _text(group / "cpu.max").partition(" ")
        else:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        # No quota is "max" in version 2 and -1 in version 1.
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


@functools.cache
def _groups(root: Path, controller: str) -> tuple[tuple[int, Path], ...]:
    """As ``_found_groups``, looked up once: every request asks for the free memory, and processes keep their groups."""
    return tuple(_found_groups(root, controller))


def _found_groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """The folders of the control groups that a controller may limit this process in, with their version, inner first.

    In a container the path that the kernel tells may be that of the host, while only the container's own part of the
    tree is mounted: then the folders on the way do not exist, and the mount itself is the container's group.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if not names:
            version, mounts = 2, list(_UNIFIED)
        elif controller in names.split(","):
            version, mounts = 1, [f"sys/fs/cgroup/{one}" for one in (names, controller)]
        else:
            continue
        mount = next((root / one for one in mounts if (root / one).is_dir()), None)
        if mount is None:
            continue
        group = mount / path.lstrip("/")
        inside = [group, *group.parents]
        for folder in inside[: inside.index(mount) + 1]:
            if folder.is_dir():
                yield version, folder


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdigit() else None


def _table(file: Path) -> dict[str, int]:
    """The whole numbers of a file with a name and a number on each line."""
    rows = (line.split() for line in _text(file).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}


def _text(file: Path) -> str:
    """Reads a file of the kernel; nothing where it is not there or may not be read."""
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
