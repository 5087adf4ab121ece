"""The pictures of the page are of two finished answers, in light and in dark."""

import struct
import sys
from pathlib import Path

import pytest
from engines import needed

from mythos_edge.scripts.lab import draw_page
from mythos_edge.scripts.lab.browser import missing


def test_both_pictures_are_taken(text_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed(missing())
    options = ["--tokens", "8", "--pointed", "2", "--temperature", "0", "--second-depth", "1"]
    monkeypatch.setattr(sys, "argv", ["draw_page", str(text_bundle), "-o", str(tmp_path / "page.png"), *options])
    draw_page.main()
    light, dark = (tmp_path / name for name in ("page.png", "page-dark.png"))
    for picture in (light, dark):
        assert struct.unpack(">II", picture.read_bytes()[16:24]) == (2800, 1440)
    assert light.read_bytes() != dark.read_bytes()
