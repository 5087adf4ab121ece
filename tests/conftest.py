"""Shared fixtures: bundles exported once a session from the golden checkpoints and the demo model."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
from built import build_cpu

from mythos_edge.exporter import kept_graphs, tracing
from mythos_edge.exporter.export import export_bundle
from mythos_edge.exporter.portable import inline_bundle
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.families.openmythos.config import VARIANTS
from mythos_edge.scripts.lab import train_text

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
GOLDENS = ("mla-small", "gqa-small")
# The shape of a model whose kernels are checked in no time.
SMALL = dataclasses.replace(
    VARIANTS["1b"],
    dim=128,
    n_heads=4,
    kv_lora_rank=32,
    qk_rope_head_dim=8,
    n_experts=8,
    n_experts_per_tok=2,
    expert_dim=96,
)


@pytest.fixture(scope="session", autouse=True)
def own_core() -> None:
    """A worker keeps to one core, its children too: with threads for all cores each, workers wait for each other."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests keep graphs in a folder of this run, children of theirs too: each shape is traced once, and none before."""
    base = tmp_path_factory.getbasetemp()
    # The workers of a run, which have folders of their own in its folder, share the graphs.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kept-graphs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kept_graphs.VARIABLE, str(folder))
        yield


@pytest.fixture(scope="session", autouse=True)
def unchecked_while_tracing() -> Iterator[None]:
    """Annotated shapes are checked where the model's maths runs on numbers; symbols of sizes are none."""
    trace = tracing._trace

    def unchecked(*arguments: Any) -> Any:
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            return trace(*arguments)
        finally:
            jaxtyping.config.update("jaxtyping_disable", False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "_trace", unchecked)
        yield


def copy_links(folder: Path) -> None:
    """Puts files in place of links: TensorRT follows those that lead out of a folder, onnx and ONNX Runtime do not."""
    for link in [file for file in folder.iterdir() if file.is_symlink()]:
        source = link.resolve()
        link.unlink()
        shutil.copy(source, link)


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
                export_bundle(opened, path, **options)
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
def portable_bundle(golden_bundle: Path, golden_name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the golden bundle with graphs of standard ops alone."""
    path = tmp_path_factory.mktemp("portable") / f"{golden_name}.bundle"
    shutil.copytree(golden_bundle, path)
    inline_bundle(path)
    return path


@pytest.fixture(scope="session")
def mla_bundle(exported: Callable[..., Path]) -> Path:
    return exported(FIXTURES / "mla-small")


@pytest.fixture(scope="session")
def demo_bundle(exported: Callable[..., Path]) -> Path:
    return exported(ROOT / "scripts" / "assets" / "carry_adder.pt")


@pytest.fixture
def rounded_bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the demo bundle, to be changed at will, with the target ``ort-cpu-int4``."""
    path = tmp_path / "rounded.bundle"
    shutil.copytree(demo_bundle, path)
    build_cpu(path, "int4")
    return path


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


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command line in this process, as a ``command_line.Ran``."""
    from command_line import Ran

    from mythos_edge.scripts import cli

    def call(*argv: object) -> Any:
        try:
            code = cli.main([str(word) for word in argv])
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call
