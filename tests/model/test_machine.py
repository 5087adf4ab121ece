"""The memory and cores that a process may use, with and without control groups of both versions."""

import os
from pathlib import Path

import pytest

from mythos_edge.model.machine import Memory, cores, free_memory_bytes, memory, processors

GB = 1_000_000_000
MEMINFO = "MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\nHugePages_Total:       0\n"
FREE = 8_000_000 * 1024
# What version 1 says where there is no limit.
NO_LIMIT = str((1 << 63) - 4096)


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def _machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def _version_2(own: str, limits: dict[str, str]) -> dict[str, str]:
    files = {f"sys/fs/cgroup{name}": f"{text}\n" for name, text in limits.items()}
    return {"proc/self/cgroup": f"0::{own}\n", **files}


def _version_1(own: str, limits: dict[str, str]) -> dict[str, str]:
    files = {f"sys/fs/cgroup/{name}": f"{text}\n" for name, text in limits.items()}
    return {"proc/self/cgroup": f"12:cpu,cpuacct:{own}\n5:memory:{own}\n1:name=systemd:/\n0::/\n", **files}


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    root = _machine(tmp_path, {})
    assert memory(root) == Memory(FREE, None, None)
    assert free_memory_bytes(root) == FREE
    assert processors(root).quota is None
    assert cores(root) == 8
    (root / "proc/meminfo").write_text("MemTotal:       16000000 kB\n")
    assert free_memory_bytes(root) is None
    (root / "proc/meminfo").unlink()
    assert free_memory_bytes(root) is None


def test_files_that_the_kernel_can_give_back_are_free(tmp_path: Path) -> None:
    stat = f"anon {GB}\nfile {GB}\nactive_file {GB // 2}\ninactive_file {GB // 4}\nslab_reclaimable {GB // 4}"
    limits = {"/memory.max": str(4 * GB), "/memory.current": str(3 * GB), "/memory.stat": stat}
    assert memory(_machine(tmp_path, _version_2("/", limits))) == Memory(FREE, 2 * GB, 4 * GB)


@pytest.mark.parametrize(
    ("limits", "free"),
    [
        ({"/a/b/memory.max": "max", "/a/b/memory.current": "5"}, FREE),
        ({"/a/b/memory.max": "1000", "/a/b/memory.current": "400"}, 600),
        ({"/a/b/memory.max": "1000", "/a/b/memory.current": "4000"}, 0),
        ({"/a/b/memory.max": "max", "/a/b/memory.high": "1000", "/a/b/memory.current": "400"}, 600),
        # The limit may be set further out, where siblings use some of it, too.
        ({"/a/b/memory.max": "max", "/a/b/memory.current": "1", "/a/memory.max": "99", "/a/memory.current": "90"}, 9),
        ({"/a/b/memory.max": "90", "/a/b/memory.current": "1", "/a/memory.max": "99", "/a/memory.current": "90"}, 9),
        ({"/a/b/memory.max": str(99 * GB), "/a/b/memory.current": "0"}, FREE),
        ({"/a/b/memory.max": "nonsense", "/a/b/memory.current": "5"}, FREE),
        # In a container that sees the host's path but only its own part of the tree.
        ({"/memory.max": "1000", "/memory.current": "400"}, 600),
    ],
)  # fmt: skip
def test_memory_within_version_2(limits: dict[str, str], free: int, tmp_path: Path) -> None:
    assert free_memory_bytes(_machine(tmp_path, _version_2("/a/b", limits))) == free


def test_memory_within_version_1(tmp_path: Path) -> None:
    limits = {
        "memory/memory.limit_in_bytes": NO_LIMIT,
        "memory/memory.usage_in_bytes": "5000",
        "memory/docker/x/memory.limit_in_bytes": "3000",
        "memory/docker/x/memory.usage_in_bytes": "2000",
        "memory/docker/x/memory.stat": "cache 700\ninactive_file 1\ntotal_inactive_file 300\ntotal_active_file 400",
    }
    root = _machine(tmp_path, _version_1("/docker/x", limits))
    assert memory(root) == Memory(FREE, 1700, 3000)
    (root / "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes").write_text(NO_LIMIT)
    assert memory(root) == Memory(FREE, None, None)


@pytest.mark.parametrize(
    ("files", "quota", "usable"),
    [
        (_version_2("/", {"/cpu.max": "max 100000"}), None, 8),
        (_version_2("/", {"/cpu.max": "200000 100000"}), 2.0, 2),
        (_version_2("/", {"/cpu.max": "150000 100000"}), 1.5, 2),
        (_version_2("/", {"/cpu.max": "10000 100000"}), 0.1, 1),
        (_version_2("/", {"/cpu.max": "9900000 100000"}), 99.0, 8),
        (_version_2("/a/b", {"/a/b/cpu.max": "max 100000", "/a/cpu.max": "300000 100000"}), 3.0, 3),
        (_version_1("/x", {"cpu,cpuacct/x/cpu.cfs_quota_us": "-1"}), None, 8),
        (
            _version_1("/x", {"cpu,cpuacct/x/cpu.cfs_quota_us": "50000", "cpu,cpuacct/x/cpu.cfs_period_us": "20000"}),
            2.5,
            3,
        ),
        # Debian's containers have the folder of one controller alone.
        (_version_1("/x", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}), 4.0, 4),
        # Version 2 beside version 1, without any controller.
        (_version_1("/x", {"unified/cgroup.procs": "1"}), None, 8),
    ],
)
def test_threads_within_a_quota(files: dict[str, str], quota: float | None, usable: int, tmp_path: Path) -> None:
    root = _machine(tmp_path, files)
    assert processors(root).quota == quota
    assert cores(root) == usable


def test_this_machine_says_something_sensible() -> None:
    free = free_memory_bytes()
    assert free is None or free > 1_000_000
    assert cores() >= 1
