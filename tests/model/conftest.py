"""A bundle to open, damage and replace; what is in it stands in ``sample_bundle``."""

from pathlib import Path

import pytest
from sample_bundle import write_bundle


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The sample bundle on the disk, a fresh one for each test."""
    path = tmp_path / "some.bundle"
    write_bundle(path)
    return path
