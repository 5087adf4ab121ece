"""Fixtures of tests of verbs: a GPU's copies made small, and torch on one thread."""

from typing import Any

import pytest
import torch

from mythos_edge.scripts.lab import gpu_bench


@pytest.fixture
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(gpu_bench.copy_bandwidth, "__defaults__", (1 << 16,))


@pytest.fixture
def one_thread() -> Any:
    """Matrices as small as these are computed fastest without handing them to other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
