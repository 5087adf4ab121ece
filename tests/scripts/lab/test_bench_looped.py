"""``bench_looped`` on small models: the reference is the same model, drafts count, and bad arguments are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.layout import load_network
from mythos_edge.scripts.lab import bench_looped
from mythos_edge.scripts.lab.random_checkpoints import write_checkpoint

_SMALL = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
SMALL = {name: replace(shape, **_SMALL, num_key_value_heads=2) for name, shape in bench_looped.SHAPES.items()}


@pytest.mark.parametrize("name", SMALL)
def test_the_reference_is_the_same_model(name: str, tmp_path: Path) -> None:
    write_checkpoint(SMALL[name], tmp_path / "made", "bf16")
    ids = torch.randint(0, 40, (1, 7), generator=torch.Generator().manual_seed(0))
    reference = bench_looped.reference_of(SMALL[name], tmp_path / "made")
    with open_checkpoint(tmp_path / "made") as opened, torch.inference_mode():
        wanted = load_network(opened)(ids).logits[0]
        logits, cache = reference(ids[:, :5], None)
        torch.testing.assert_close(logits, wanted[4], rtol=1e-4, atol=1e-4)
        for place in (5, 6):
            logits, cache = reference(ids[:, place : place + 1], cache)
            torch.testing.assert_close(logits, wanted[place], rtol=1e-4, atol=1e-4)


def test_the_last_line_is_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_looped, "SHAPES", SMALL)
    monkeypatch.setattr(bench_looped.measuring, "stream_bandwidth", lambda threads: 1e10)
    arguments = ["--shape", "ouro", "--weights", "fp32", "-p", "5", "-n", "6", "-r", "1", "--draft-depths", "3"]
    assert bench_looped.main([*arguments, "--folder", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    runs = json.loads(out.splitlines()[-1])["runs"]
    deep, drafts = "fp32, full depth", "fp32, full depth, drafts at depth 3"
    assert list(runs) == ["torch eager", deep, "fp32, mean depth 2", drafts]
    assert runs[deep]["equal_tokens"]
    assert runs[drafts]["equal_tokens"]
    assert runs[deep]["mean_depth"] == 4 > runs["fp32, mean depth 2"]["mean_depth"]
    assert 0 <= runs[drafts]["drafts_accepted"] <= 1
    assert runs[deep]["drafts_accepted"] is None
    assert "other tokens" not in err
    assert list(tmp_path.iterdir()) == []


def test_drafts_are_shallower_than_the_model() -> None:
    assert bench_looped._parsed(["--shape", "nanbeige"]).draft_depths == [1]
    assert bench_looped._parsed(["--shape", "dory"]).draft_depths == [1, 2]
    assert bench_looped._parsed(["--draft-depths", ""]).draft_depths == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "nanbeige", "--draft-depths", "2"], "expected numbers of 1 to 1"),
        (["--draft-depths", "1,x"], "expected numbers of 1 to 3"),
        (["-n", "1"], "expected 2 or more"),
        (["-p", "1020"], "at most 1024 with the prompt"),
        (["--shape", "gpt"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_looped.main(arguments)
    assert message in capsys.readouterr().err
