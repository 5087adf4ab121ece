"""A GPU's copies made small."""

import pytest

from mythos_edge.scripts.lab import gpu_bench


@pytest.fixture
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(gpu_bench.copy_bandwidth, "__defaults__", (1 << 16,))
