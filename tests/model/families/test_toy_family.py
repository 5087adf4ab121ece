"""The proof that a family is declared once: a toy one is exported, run, described and refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from built import build_cpu, build_cuda
from command_line import Ran, refused
from safetensors.torch import save_file
from torch import Tensor, nn
from toy_family import SHAPES, Toy, ToyNetwork

from mythos_edge.exporter.calibration import collect_importance
from mythos_edge.exporter.kept_graphs import VARIABLE
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import BuildError
from mythos_edge.model.families.table import FAMILIES
from mythos_edge.model.layout import load_network
from mythos_edge.runtime.backends.ort_cpu import OrtCpuBackend
from mythos_edge.runtime.session import Session

IDS = np.arange(1, 49).reshape(2, 24) % 25


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of the family, which is known as long as the test runs, and its tensors."""
    monkeypatch.setitem(FAMILIES, "toy", Toy())
    torch.manual_seed(2)
    tensors = {name: 0.3 * torch.randn(shape) for name, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors", tensors


@pytest.fixture
def bundle(toy: tuple[Path, dict[str, Tensor]], tmp_path: Path, run: Callable[..., Ran]) -> Path:
    assert run("export", toy[0], "-o", tmp_path / "b").code == 0
    return tmp_path / "b"


def test_a_toy_family_is_a_family(
    toy: tuple[Path, dict[str, Tensor]], bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    path, tensors = toy
    assert "4 loop steps of 8 values" in run("inspect", bundle).out
    with Session.open(bundle) as session, open_checkpoint(path) as checkpoint, torch.no_grad():
        wanted, found = load_network(checkpoint)(torch.tensor(IDS)), session.score(IDS, prefill=7)
    assert 1 == found.depth.min() < found.depth.max() == 4
    assert (found.depth == wanted.depth.numpy()).all()
    np.testing.assert_allclose(found.logits, wanted.logits.numpy(), atol=1e-5)
    save_file(tensors | {"embed": torch.zeros(3, 8)}, path)
    refused(run("export", path, "-o", tmp_path / "c"), "'embed': (3, 8)", "save the whole toy")


def test_its_matrices_are_rounded_by_the_parts_it_names(bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    refused(run("build", bundle, "--weights", "int8", "--keep", "experts"), "expected head, prelude, attention, coda")
    assert run("build", bundle, "--weights", "int8", "--block", 32, "--keep", "head").code == 0
    argv = ("validate", bundle, "--against", "fp32", "--target", "ort-cpu-int8", "--ids", tmp_path / "ids.npy")
    ran = run(*argv, "--json")
    assert ran.json["passed"], ran.json
    assert ran.json["weights"] == {"head": "fp32", "prelude": "int8", "attention": "int8", "coda": "int8"}
    assert {step["common_experts"] for step in ran.json["quality"]["loop_steps"]} == {None}
    assert all(step["h_error_mean"] > 0 for step in ran.json["quality"]["loop_steps"])
    assert "|                 - |" in run(*argv).out


def test_its_matrices_are_calibrated(bundle: Path) -> None:
    assert set(collect_importance(open_bundle(bundle), IDS).importance) == set(SHAPES)
    made = build_cpu(bundle, "int4", dense="int4", calibrate=IDS)
    assert made.target("ort-cpu-int4-dense-int4").weights["attention"] == "int4"


def test_a_model_without_experts_is_rounded_for_cuda(bundle: Path) -> None:
    build_cuda(bundle, weights="int8")
    opened = open_bundle(bundle)
    # The CPU's kernels of the same ops stand in for those of a GPU.
    with Session.open(bundle) as exact, Session(opened, OrtCpuBackend(opened, "ort-cuda-fp16-int8")) as rounded:
        wanted, found = (one.score(IDS, policy="full").logits for one in (exact, rounded))
    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.05


@pytest.mark.parametrize("build", [lambda path: build_cpu(path, "int8"), build_cuda], ids=["int8", "fp16"])
def test_a_matrix_that_no_kernel_takes_is_named(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[[Path], object], run: Callable[..., Ran]
) -> None:
    """Not rounded without a word: here the rows are those of a batch, which is another product."""

    def attend(self: ToyNetwork, part: int, x: Tensor, past: Tensor, window: object) -> tuple[Tensor, Tensor]:
        rows = nn.functional.linear(x, self.mix[part])
        return x + self.ops.grouped_query_attention(x.unsqueeze(2), rows, past, window, 1, 0.3).squeeze(2), rows

    monkeypatch.setattr(ToyNetwork, "attend", attend)
    monkeypatch.setenv(VARIABLE, "off")
    assert run("export", bundle.parent / "t.safetensors", "-o", bundle, "--force").code == 0
    with pytest.raises(BuildError, match=r"mix\.0: prelude.* reads it as it is stored, .*: multiply flat rows"):
        build(bundle)
