"""Targets of models whose layers are dense: the forms that their parts get, and what rounding costs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import build_cpu, build_cuda, build_engines
from looped_llamas import changed, golden_of, weights_of

from mythos_edge.exporter.calibration import collect_importance
from mythos_edge.exporter.targets import ort_cpu
from mythos_edge.model.bundle import open_bundle
from mythos_edge.runtime.backends.ort_cpu import OrtCpuBackend
from mythos_edge.runtime.session import Session

NAMES = ("ouro-small", "nanbeige-small")
PARTS = ("embedding", "attention", "mlp", "head")


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tame(name: str, tmp_path_factory: pytest.TempPathFactory, exported: Callable[..., Path]) -> Path:
    """A bundle of the golden model with layers that add a tenth: the golden is so lively that it stands no rounding."""
    ends = ("norm_2.weight",) if name.startswith("ouro") else ("o_proj.weight", "down_proj.weight")
    quiet = {key: 0.1 * value for key, value in weights_of(name).items() if key.endswith(ends)}
    return exported(changed(tmp_path_factory.mktemp("tame") / name, name, tensors=quiet))


@pytest.fixture
def bundle(tame: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tame, tmp_path / "own.bundle"))


def error_of(path: Path, target: str, name: str) -> float:
    """The share of the logits by which a target is off those of float32; a GPU's graphs run on the CPU's kernels."""
    ids, opened = golden_of(name)["ids"], open_bundle(path)
    with Session.open(path) as exact, Session(opened, OrtCpuBackend(opened, target)) as rounded:
        wanted = exact.score(ids).logits
        made = [rounded.score(ids, prefill=prefill).logits for prefill in (None, 7)]
    return max(float(np.linalg.norm(one - wanted) / np.linalg.norm(wanted)) for one in made)


@pytest.mark.parametrize(
    ("weights", "options", "forms", "most"),
    [
        ("fp32", {}, ("fp32", "fp32", "fp32", "fp32"), 1e-5),
        ("int8", {}, ("int8", "int8", "int8", "int8"), 0.05),
        ("int4", {}, ("int8", "int4", "int4", "int8"), 0.4),
        ("int4", {"dense": "int4"}, ("int4", "int4", "int4", "int4"), 0.4),
        ("int8", {"keep": ("head", "attention")}, ("int8", "fp32", "int8", "fp32"), 0.05),
    ],
)
def test_forms_on_the_cpu(
    weights: str,
    options: Any,
    forms: tuple[str, ...],
    most: float,
    bundle: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An int4 of a dense model is that of its loop, not of experts that it does not have."""
    monkeypatch.setattr(ort_cpu, "has_integer_dot_products", lambda: True)
    target = list(build_cpu(bundle, weights, **options).manifest.targets)[-1]
    assert open_bundle(bundle).manifest.targets[target].weights == dict(zip(PARTS, forms, strict=True))
    error = error_of(bundle, target, name)
    assert error < most
    assert (error > 1e-3) == (weights != "fp32")


def test_without_integer_products_all_is_in_the_form_that_was_asked_for(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_cpu, "has_integer_dot_products", lambda: False)
    assert set(build_cpu(bundle, "int4").manifest.targets["ort-cpu-int4"].weights.values()) == {"int4"}


def test_calibration_sees_every_matrix(bundle: Path, name: str) -> None:
    """But for the embedding, which nothing is multiplied with."""
    opened, ids = open_bundle(bundle), golden_of(name)["ids"]
    layers = opened.manifest.model.step_slots
    matrices = [
        f"layers.{index}.{part}" for index in range(layers) for part in ("attn.qkv", "attn.wo", "gate_up", "down")
    ]
    assert set(collect_importance(opened, ids).importance) == {*matrices, "head"}
    build_cpu(bundle, "int4", calibrate=ids)
    assert error_of(bundle, "ort-cpu-int4", name) < 0.4


@pytest.mark.parametrize(
    ("dtype", "weights", "most"),
    [("fp32", "none", 1e-5), ("fp16", "none", 0.005), ("fp16", "int8", 0.05), ("fp16", "int4", 0.4)],
)
def test_the_cuda_provider(dtype: str, weights: str, most: float, bundle: Path, name: str) -> None:
    target = list(build_cuda(bundle, dtype=dtype, weights=weights).manifest.targets)[-1]
    assert error_of(bundle, target, name) < most


@pytest.mark.parametrize("options", [{}, {"layout": "loop", "dtype": "bf16"}, {"weights": "int4"}])
def test_tensorrt_builds(options: Any, bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    built = build_engines(bundle, "rtx-sm89", max_context=64, **options)
    assert any(name.startswith("rtx-sm89") for name in built.bundle.manifest.targets)
