"""A model whose router finds all experts equally good: exported, run and compared, ties told and no failure."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from built import build_cpu
from command_line import CHECKPOINT, Ran
from safetensors.torch import load_file, save_file

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.manifest import MANIFEST_FILE

POSITIONS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with the router of a model that was never trained."""
    folder = tmp_path_factory.mktemp("tied")
    tensors = load_file(CHECKPOINT / "model.safetensors")
    for name in ("router.weight", "router_bias"):
        tensors[f"recurrent.block.ffn.{name}"].zero_()
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(CHECKPOINT / "config.json", folder)
    return folder


@pytest.fixture(scope="module")
def tied(checkpoint: Path, exported: Callable[..., Path]) -> Path:
    return exported(checkpoint)


def _with_sample(bundle: Path, path: Path, **changes: Any) -> Path:
    shutil.copytree(bundle, path)
    values = json.loads((path / MANIFEST_FILE).read_text())
    values["sample"] |= changes
    (path / MANIFEST_FILE).write_text(json.dumps(values))
    return path


def test_a_tie_of_the_sample_is_recorded_only_where_there_is_one(tied: Path, mla_bundle: Path) -> None:
    assert open_bundle(tied).manifest.sample.tie == "router"
    assert open_bundle(mla_bundle).manifest.sample.tie == ""


def test_equal_experts_are_chosen_alike_everywhere_and_told(
    tied: Path, checkpoint: Path, run: Callable[..., Ran]
) -> None:
    argv = ("validate", tied, "--against", checkpoint, "--positions", POSITIONS)
    report = run(*argv, "--json").json
    assert report["passed"] is True
    assert report["self_test_tie"] is None
    assert len(report["router_ties"]) == POSITIONS
    assert {tie["margin"] for tie in report["router_ties"]} == {0.0}
    for route in report["routes"].values():
        assert (route["compared"], route["router_ties"]) == (1.0, [])
    assert report["max_abs"] < 1e-3
    ran = run(*argv)
    assert ran.code == 0
    assert f"ties of the router: {POSITIONS} of {POSITIONS} positions" in ran.out
    assert "a bundle takes the lowest index, torch and others may take another" in ran.out


def test_a_kernel_that_chooses_other_experts_is_no_failure_of_the_self_test(
    tied: Path, mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    sample = open_bundle(tied).manifest.sample
    other = [number + 0.4 * max(map(abs, sample.top_logits)) for number in sample.top_logits]
    ran = run("validate", _with_sample(tied, tmp_path / "tied", top_logits=other))
    assert ran.code == 0, ran.out
    told = "a tie of the router: two experts are equally good, and another kernel may choose the other"
    assert f"not decisive: {told}" in ran.out
    ran = run("validate", tmp_path / "tied", "--json")
    assert (ran.json["passed"], ran.json["self_test_tie"]) == (True, "router")
    ran = run("validate", _with_sample(tied, tmp_path / "untied", top_logits=other, tie=""), "--json")
    assert (ran.code, ran.json["passed"], ran.json["self_test_tie"]) == (1, False, None)


@pytest.mark.parametrize("tie", ["router", "halting"])
def test_a_recorded_tie_does_not_switch_the_self_test_off(
    tie: str, tied: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    sample = open_bundle(tied).manifest.sample
    far = [number + 10 * max(map(abs, sample.top_logits)) for number in sample.top_logits]
    ran = run("validate", _with_sample(tied, tmp_path / "far", top_logits=far, tie=tie), "--json")
    assert (ran.code, ran.json["passed"], ran.json["self_test_tie"]) == (1, False, None)
    other = [3 - depth for depth in sample.depth]
    ran = run("validate", _with_sample(tied, tmp_path / "depths", depth=other, tie="router"), "--json")
    assert (ran.code, ran.json["passed"], ran.json["self_test_tie"]) == (1, False, None)


def test_another_model_is_not_excused_by_ties(tied: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    """Exact ties make no difference here, so nothing is left out of the comparison."""
    tensors = load_file(CHECKPOINT / "model.safetensors")
    for name in ("router.weight", "router_bias"):
        tensors[f"recurrent.block.ffn.{name}"].zero_()
    tensors["recurrent.block.ffn.router_bias"] += torch.linspace(1, 0, 8)
    tensors["norm.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(CHECKPOINT / "config.json", tmp_path)
    ran = run("validate", tied, "--against", tmp_path, "--positions", POSITIONS, "--json")
    assert (ran.code, ran.json["passed"], ran.json["router_ties"]) == (1, False, [])


def test_targets_whose_kernels_choose_other_experts_are_told(
    tied: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    path = Path(shutil.copytree(tied, tmp_path / "rounded"))
    build_cpu(path, "int8", block=32)
    argv = ("validate", path, "--against", "fp32", "--target", "ort-cpu-int8", "--positions", POSITIONS)
    ran = run(*argv, "--json")
    assert (ran.code, ran.json["after_router_ties"], ran.json["failures"]) == (0, POSITIONS, [])
    assert f"exact ties of the router: {POSITIONS} positions" in run(*argv).out
