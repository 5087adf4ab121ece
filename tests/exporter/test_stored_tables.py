"""The weights file of a bundle that computes with the checkpoint's own rotary table."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import saved, stored_weights, write_config

from mythos_edge.exporter.weights import plan_weights, write_weights
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import CheckpointError


@pytest.mark.parametrize("real", [True, False])
def test_the_table_is_written_and_is_a_part_of_the_source(tmp_path: Path, real: bool) -> None:
    table = stored_weights()["freqs_cis_mla"]
    table = table.real.bfloat16() if real else torch.polar(table.abs(), table.angle() / 2)
    path = saved(tmp_path, stored_weights() | {"freqs_cis_mla": table})
    write_config(tmp_path)
    sources = []
    for choice in ("config", "stored"):
        with open_checkpoint(path, rope_table=choice) as checkpoint:
            plan = plan_weights(checkpoint.config, 12, "fp32")
            file = tmp_path / f"{choice}.safetensors"
            sources.append(write_weights(plan, checkpoint, file, lambda done: None).source)
    assert sources[0] != sources[1]
    written = load_file(tmp_path / "stored.safetensors")
    expected = torch.zeros(12, 2) if real else table[:12].imag
    assert torch.equal(written["rope.cos"], table[:12].real.float())
    assert torch.equal(written["rope.sin"], expected)
    assert not torch.equal(load_file(tmp_path / "config.safetensors")["rope.sin"], expected)


def test_a_row_that_is_not_finite_is_found_while_writing(tmp_path: Path) -> None:
    table = stored_weights()["freqs_cis_mla"].clone()
    table[9] = torch.nan  # not among the rows that are looked at when a checkpoint is opened
    write_config(tmp_path)
    path = saved(tmp_path, stored_weights() | {"freqs_cis_mla": table})
    with open_checkpoint(path, rope_table="stored") as checkpoint:
        plan = plan_weights(checkpoint.config, 12, "fp32")
        with pytest.raises(CheckpointError, match="freqs_cis_mla: holds NaN"):
            write_weights(plan, checkpoint, tmp_path / "made.safetensors", lambda done: None)
