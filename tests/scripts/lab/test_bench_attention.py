"""Attentions over a cache: each variant gives what the oracle does, else the bench says which does not."""

import json

import numpy as np
import pytest

from mythos_edge.plugins import reference
from mythos_edge.scripts.lab import bench_attention

SIZES = ["--head-dim", "8", "--heads", "4", "--context", "5,9", "--rows", "1,3", "-r", "2"]


@pytest.mark.parametrize(("kv_heads", "left_out"), [("4", []), ("2", ["MultiHeadAttention"])])
def test_attentions_are_compared(kv_heads: str, left_out: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_attention.main([*SIZES, "--kv-heads", kv_heads]) == 0
    said = capsys.readouterr().out.splitlines()
    report = json.loads(said[-1])
    assert set(report["ms"]) == set(bench_attention.VARIANTS)
    for name, cases in report["ms"].items():
        assert [pair is None for pair in cases] == [name in left_out] * 4
        assert all(0 < least <= median for least, median in filter(None, cases))
    assert len(said) == 2 + len(report["ms"]) + 1


def test_a_wrong_attention_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.grouped_query_attention
    monkeypatch.setattr(
        reference, "grouped_query_attention", lambda *given, **more: right(*given, **more) + np.float32(1e-3)
    )
    with pytest.raises(AssertionError, match="products"):
        bench_attention.main([*SIZES, "--kv-heads", "4"])
