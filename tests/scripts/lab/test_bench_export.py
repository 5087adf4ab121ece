"""``bench_export`` on the demo's checkpoint: what is exported is there, and the last line is JSON."""

import json
import os
from pathlib import Path

import pytest

from mythos_edge.exporter.kept_graphs import VARIABLE
from mythos_edge.scripts.lab import bench_export


def test_the_demo_is_copied_and_exported_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = []

    def watched(verb: list[str]) -> tuple[float, int]:
        exported.append(Path(verb[1]).stat().st_size)
        for folder in (verb[verb.index("-o") + 1], os.environ[VARIABLE]):
            Path(folder).mkdir(exist_ok=True)
        return 1.0, 10**9

    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(bench_export, "_watched", watched)
    assert bench_export.main(["--shape", "demo", "--folder", str(tmp_path), "-r", "1"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert exported == [round(report["checkpoint_gb"] * 1e9)] * 2
    assert report["first_export_s"] == [1.0]
    assert list(tmp_path.iterdir()) == []
