"""Shared fixtures: bundles exported once a session from the golden checkpoints and the demo model."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mythos_edge.exporter.export import export_bundle
from mythos_edge.model.bundle import FileRecord, open_bundle, sha256_of, update_manifest
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.scripts import train_text

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
GOLDENS = ("mla-small", "gqa-small")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``exported(checkpoint, **options)``: the bundle of a checkpoint, made at the first request."""
    made: dict[tuple[object, ...], Path] = {}
    folder = tmp_path_factory.mktemp("bundles")

    def export(checkpoint: Path, **options: object) -> Path:
        key = (checkpoint, *sorted(options.items()))
        if key not in made:
            path = folder / f"{checkpoint.stem}-{len(made)}.bundle"
            with open_checkpoint(checkpoint) as opened:
                export_bundle(opened, path, **options)  # type: ignore[arg-type]
            made[key] = path
        return made[key]

    return export


@pytest.fixture(scope="session", params=GOLDENS)
def golden_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def golden_bundle(exported: Callable[..., Path], golden_name: str) -> Path:
    return exported(FIXTURES / golden_name)


@pytest.fixture(scope="session")
def mla_bundle(exported: Callable[..., Path]) -> Path:
    return exported(FIXTURES / "mla-small")


@pytest.fixture(scope="session")
def demo_bundle(exported: Callable[..., Path]) -> Path:
    return exported(ROOT / "scripts" / "assets" / "carry_adder.pt")


@pytest.fixture
def rounded_bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo bundle with a target ``rounded``: the block's matrices on a grid of 16 values per 32."""
    path = tmp_path / "rounded.bundle"
    shutil.copytree(demo_bundle, path)
    bundle = open_bundle(path)
    fp32 = bundle.target("ort-cpu")
    step = ir.load(path / fp32.graphs["step"])
    for name in (
        "attn.qkv_down",
        "attn.q_up",
        "attn.wo",
        "ffn.fc1",
        "ffn.fc2",
        "ffn.shared_gate_up",
        "ffn.shared_down",
    ):
        value = step.graph.initializers[f"step.block.{name}"]
        assert value.const_value is not None
        value.const_value = ir.tensor(_on_a_grid(value.const_value.numpy()), name=value.name)
    ir.save(step, path / "step.rounded.onnx")
    record = FileRecord((path / "step.rounded.onnx").stat().st_size, sha256_of(path / "step.rounded.onnx"))
    target = dataclasses.replace(
        fp32, graphs={**fp32.graphs, "step": "step.rounded.onnx"}, weights="int4", block=32, method="test"
    )
    update_manifest(
        bundle,
        targets={**bundle.manifest.targets, "rounded": target},
        files={**bundle.manifest.files, "step.rounded.onnx": record},
    )
    return path


def _on_a_grid(weights: np.ndarray) -> np.ndarray:
    size = weights.shape[-1]
    blocks = np.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -size % 32)]).reshape(*weights.shape[:-1], -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / 7
    rounded = np.round(blocks / np.where(scale == 0, 1, scale)) * scale
    return rounded.reshape(*weights.shape[:-1], -1)[..., :size].astype(np.float32)


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Checkpoint and tokenizer of the byte-level text model after a short training."""
    return train_text.train_text_model(tmp_path_factory.mktemp("text") / "made" / "here", steps=80)


@pytest.fixture(scope="session")
def text_bundle(exported: Callable[..., Path], text_model: tuple[Path, Path]) -> Path:
    checkpoint, tokenizer = text_model
    return exported(checkpoint, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def golden(golden_name: str) -> dict[str, np.ndarray]:
    """The reference's float64 logits and depths, and its own float32 error; see the fixture's golden.npz."""
    with np.load(FIXTURES / golden_name / "golden.npz") as file:
        return dict(file)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)
