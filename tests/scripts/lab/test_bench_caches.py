"""``bench_caches`` on the demo model: every form has its figures, in a table and as JSON."""

import json
from pathlib import Path

import pytest

from mythos_edge.scripts.lab import bench_caches


def test_every_form_has_its_figures(demo_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_caches.main([str(demo_bundle), "--contexts", "9,40", "-n", "3"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 2 * 3
    figures = json.loads(last)["contexts"]["40"]
    sizes = [figures[form]["cache_mb"] for form in ("fp32", "fp16", "int8")]
    assert sizes[1] == sizes[0] / 2
    assert sizes[2] < 0.4 * sizes[0]
    assert figures["fp32"]["kl"] == 0
    assert 0 < figures["int8"]["kl"] < 1
