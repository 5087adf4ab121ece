"""The profile of a loop step names the kernels that it is made of."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FIXTURES

from mythos_edge.scripts.lab import profile_step


@pytest.mark.parametrize(("rows", "kernel"), [(1, "Pad"), (3, "Where")])
def test_a_step_is_profiled(
    rows: int, kernel: str, exported: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """One row is padded to whole cached rows, several are masked."""
    bundle = exported(FIXTURES / "ouro-small")
    assert profile_step.main([str(bundle), "--context", "9", "--rows", str(rows), "-r", "3"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert (report["target"], report["context"], report["rows"]) == ("ort-cpu", 9, rows)
    assert report["us"].keys() == report["nodes"].keys() >= {"FusedMatMul", "RotaryEmbedding", kernel}
    assert "If" not in report["us"]
    assert report["nodes"]["FusedMatMul"] == 4 * 2
    assert len(table) == 2 + len(report["us"])
