"""Measurements that benches share: memory and its bandwidth, spread, and whether a run was quiet enough."""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mythos_edge.model.machine import cores
from mythos_edge.scripts.doctor import processor

# Well beyond any cache, so that it is memory that is read.
_STREAM_BYTES = 1 << 30
_STREAM_RUNS = 6
# Repetitions further apart than this share of their median say more of the machine than of the program.
NOISY_SHARE = 0.2


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of some repetitions."""

    median: float
    min: float
    max: float

    @property
    def share(self) -> float:
        """(max - min) / median."""
        return (self.max - self.min) / self.median if self.median else 0.0


def spread_of(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def stream_bandwidth(threads: int) -> float:
    """Bytes per second of reading memory with ``threads`` threads, the best of several runs."""
    pieces = np.array_split(np.ones(_STREAM_BYTES // 4, np.float32), threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_STREAM_RUNS):
            started = time.perf_counter()
            list(pool.map(np.sum, pieces))
            seconds.append(time.perf_counter() - started)
    return _STREAM_BYTES / min(seconds)


def machine() -> str:
    """The processor and the cores of this machine, as reports name it."""
    return f"{processor()}, {cores()} cores"


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def noise(bandwidths: Sequence[float], repetitions: Spread) -> str | None:
    """Why the figures should not be quoted, None when the machine was quiet enough."""
    drift = (max(bandwidths) - min(bandwidths)) / max(bandwidths)
    if repetitions.share > NOISY_SHARE:
        return f"repetitions are {repetitions.share:.0%} apart: the machine was too noisy, measure again"
    if drift > NOISY_SHARE:
        return f"memory bandwidth changed by {drift:.0%} during the run: the machine was too noisy, measure again"
    return None
