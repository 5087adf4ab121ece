"""The profile of a loop step names the kernels that it is made of."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FIXTURES

from mythos_edge.scripts.lab import profile_step


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_is_profiled(rows: int, exported: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """One row sees all, several are masked."""
    bundle = exported(FIXTURES / "ouro-small")
    assert profile_step.main([str(bundle), "--context", "9", "--rows", str(rows), "-r", "3"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert (report["target"], report["context"], report["rows"]) == ("ort-cpu", 9, rows)
    assert report["us"].keys() == report["nodes"].keys() >= {"FusedMatMul", "RotaryEmbedding"}
    assert ("Range" in report["us"]) == (rows > 1)
    assert "If" not in report["us"]
    assert report["nodes"]["FusedMatMul"] == 4 * 2
    assert len(table) == 2 + len(report["us"])
