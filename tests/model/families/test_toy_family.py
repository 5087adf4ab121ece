"""The proof that a family is declared once: a toy one is exported, run, described and refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Ran, refused
from safetensors.torch import save_file
from toy_family import SHAPES, Toy

from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.families.table import FAMILIES
from mythos_edge.model.layout import load_network
from mythos_edge.runtime.session import Session


def test_a_toy_family_is_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]) -> None:
    monkeypatch.setitem(FAMILIES, "toy", Toy())
    torch.manual_seed(1)
    tensors, toy, bundle = (
        {name: 0.3 * torch.randn(shape) for name, shape in SHAPES.items()},
        tmp_path / "t.safetensors",
        tmp_path / "b",
    )
    save_file(tensors, toy)
    assert run("export", toy, "-o", bundle).code == 0
    assert "4 loop steps of 8 values" in run("inspect", bundle).out
    ids = np.arange(1, 49).reshape(2, 24) % 25
    with Session.open(bundle) as session, open_checkpoint(toy) as checkpoint, torch.no_grad():
        wanted, found = load_network(checkpoint)(torch.tensor(ids)), session.score(ids, prefill=7)
    assert 1 == found.depth.min() < found.depth.max() == 4
    assert (found.depth == wanted.depth.numpy()).all()
    np.testing.assert_allclose(found.logits, wanted.logits.numpy(), atol=1e-5)
    save_file(tensors | {"embed": torch.zeros(3, 8)}, toy)
    refused(run("export", toy, "-o", tmp_path / "c"), "'embed': (3, 8)", "save the whole toy")
