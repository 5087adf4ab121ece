"""Targets for ONNX Runtime's CUDA provider: added whole, and on the CPU's kernels near to what they were made from."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from built import build_cuda
from conftest import ROOT
from single_ops import CUDA_KERNELS

from mythos_edge.exporter.lowering.ort_kernels import MICROSOFT
from mythos_edge.model.bundle import open_bundle, verify_hashes
from mythos_edge.model.errors import BuildError
from mythos_edge.model.stages import STAGES
from mythos_edge.model.stored_checkpoint import Checkpoint
from mythos_edge.model.target_options import ON_SHAPES
from mythos_edge.plugins import ops
from mythos_edge.runtime.backends.ort_cpu import OrtCpuBackend
from mythos_edge.runtime.backends.ort_session import ort_session
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import addition

# Seen over a stub of the CUDA libraries.
_ON_THE_CPU = {"Concat", "Greater", "Reshape", "Squeeze", "Sub"}
FORMS = [("fp32", "none"), ("fp16", "none"), ("fp16", "int8"), ("fp16", "int4")]


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "demo.bundle"))


def _on_cpu(path: Path, target: str) -> Session:
    """The target's graphs on the CPU provider, whose kernels of the same ops stand in for those of a GPU."""
    opened = open_bundle(path)
    return Session(opened, OrtCpuBackend(opened, target))


def _name(dtype: str, weights: str) -> str:
    return f"ort-cuda-{dtype}" if weights == "none" else f"ort-cuda-{dtype}-{weights}"


@pytest.mark.parametrize(("dtype", "weights"), FORMS)
def test_a_target_is_added_and_computes_the_same(bundle: Path, dtype: str, weights: str) -> None:
    made = build_cuda(bundle, dtype=dtype, weights=weights)
    name = _name(dtype, weights)
    assert list(made.manifest.targets) == ["ort-cpu", name]
    verify_hashes(made)
    files = {str(file.relative_to(bundle)) for file in bundle.rglob("*") if file.is_file()}
    assert files == {*made.manifest.files, "manifest.json"}
    ids = addition.random_columns(np.random.default_rng(2), 1, 30)
    with Session.open(bundle) as exact, _on_cpu(bundle, name) as lowered:
        # Several at once run other graphs.
        for given in (ids, np.repeat(ids, 3, axis=0)):
            wanted, found = (one.score(given, policy="full") for one in (exact, lowered))
            error = np.abs(found.logits - wanted.logits).max() / np.abs(wanted.logits).max()
            assert error < {"fp32": 1e-5, "fp16": 5e-3}[dtype] if weights == "none" else error < 0.5
            assert (found.logits.argmax(-1) == wanted.logits.argmax(-1)).mean() > 0.95
            assert error > 0 or dtype == "fp32"


@pytest.mark.parametrize("name", ["mla-small", "gqa-small"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_both_attentions_from_an_empty_cache_on(
    exported: Callable[..., Path], tmp_path: Path, name: str, dtype: str
) -> None:
    path = Path(shutil.copytree(exported(ROOT / "tests" / "fixtures" / name), tmp_path / "copy.bundle"))
    build_cuda(path, dtype=dtype)
    ids = np.arange(2, 26)[None]
    with Session.open(path) as exact, _on_cpu(path, f"ort-cuda-{dtype}") as lowered:
        wanted = exact.score(ids, policy="full").logits
        for prefill in (24, 5):
            found = lowered.score(ids, policy="full", prefill=prefill).logits
            error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
            # These networks are random and sensitive on purpose: eight loop steps multiply a rounding.
            assert error < {"fp32": 1e-4, "fp16": 0.1}[dtype]
        if dtype == "fp32":
            assert (lowered.score(ids).depth == exact.score(ids).depth).all()


@pytest.mark.parametrize(("dtype", "weights"), FORMS)
def test_only_ops_that_have_a_cuda_kernel(bundle: Path, dtype: str, weights: str) -> None:
    made = build_cuda(bundle, dtype=dtype, weights=weights)
    used = set()
    for file in made.manifest.targets[_name(dtype, weights)].graphs.values():
        model = ir.load(bundle / file)
        nodes = list(model.graph.all_nodes())
        assert not any(node.domain == ops.DOMAIN for node in nodes)
        used |= {node.op_type for node in nodes if node.domain == MICROSOFT}
    assert used <= set(CUDA_KERNELS)
    assert ("QMoE" if weights != "none" else "MoE") in used


def test_the_host_knows_who_has_rows(bundle: Path) -> None:
    """A branch on a value that the GPU computes would wait for it."""
    made = build_cuda(bundle, dtype="fp32")
    for stage in STAGES:
        graph = ir.load(bundle / made.manifest.targets["ort-cuda-fp32"].graphs[f"{stage}.many"]).graph
        (counts,) = (value for value in graph.inputs if value.name == "row_counts")
        assert {(use.node.op_type, use.idx) for use in counts.uses()} == {("Split", 1)}
        for node in graph.all_nodes():
            if node.op_type == "If":
                (condition,) = node.inputs
                compared = condition.producer()
                assert compared.op_type == "Greater"
                assert compared.inputs[0].producer().op_type == "Shape"


@pytest.mark.parametrize("name", ["mla-small", "gqa-small"])
def test_what_the_cpu_may_run_is_integers(exported: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """Of the ops that ONNX Runtime gives to the CPU: those named so have no other outputs, and the others have."""
    path = Path(shutil.copytree(exported(ROOT / "tests" / "fixtures" / name), tmp_path / "copy.bundle"))
    made = build_cuda(path, dtype="fp32")
    seen = set()
    for file in made.manifest.targets["ort-cuda-fp32"].graphs.values():
        model = ir.load(path / file)
        nodes = [node for node in model.graph if node.op_type in _ON_THE_CPU]
        model.graph.outputs.extend(value for node in nodes for value in node.outputs)
        ir.save(model, path / "with_outputs.onnx")
        # ONNX Runtime knows the type of everything.
        session = ort_session(path / "with_outputs.onnx")
        types = {output.name: output.type for output in session.get_outputs()}
        for node in nodes:
            integers = {types[str(value.name)] for value in node.outputs} <= {"tensor(int64)", "tensor(bool)"}
            assert str(node.name).startswith(ON_SHAPES) == integers, node
        seen |= {node.op_type for node in model.graph.all_nodes() if str(node.name).startswith(ON_SHAPES)}
    assert seen >= _ON_THE_CPU


def test_halting_router_and_caches_stay_float32(bundle: Path) -> None:
    made = build_cuda(bundle)
    graphs = made.manifest.targets["ort-cuda-fp16"].graphs
    for stage in STAGES:
        graph = ir.load(bundle / graphs[stage]).graph
        assert {value.dtype for value in (*graph.inputs, *graph.outputs)} <= {
            ir.DataType.FLOAT,
            ir.DataType.INT64,
        }
        narrow = {
            str(value.name).removesuffix(".fp16")
            for value in graph.initializers.values()
            if value.dtype == ir.DataType.FLOAT16
        }
        assert narrow
        assert not {name for name in narrow if "router" in name or "halt" in name or "norm" in name}


def test_half_the_bytes_and_caches_of_their_own(bundle: Path) -> None:
    before = open_bundle(bundle)
    build_cuda(bundle, dtype="fp32")
    made = build_cuda(bundle)
    wide, narrow = (made.manifest.targets[f"ort-cuda-{dtype}"] for dtype in ("fp32", "fp16"))
    assert wide.step_bytes == before.manifest.targets["ort-cpu"].step_bytes
    assert 0.5 * wide.step_bytes <= narrow.step_bytes < 0.53 * wide.step_bytes
    assert made.weights_identity("ort-cuda-fp32") == made.weights_identity("ort-cpu")
    assert made.weights_identity("ort-cuda-fp16") != made.weights_identity("ort-cpu")


def test_a_bundle_of_float16_shares_its_weights(exported: Callable[..., Path], tmp_path: Path) -> None:
    stored = exported(ROOT / "tests" / "fixtures" / "mla-small", dtype="fp16")
    path = Path(shutil.copytree(stored, tmp_path / "fp16.bundle"))
    made = build_cuda(path)
    assert not made.own_weights("ort-cuda-fp16")
    assert made.weights_identity("ort-cuda-fp16") == made.weights_identity("ort-cpu")
    ids = np.arange(2, 26)[None]
    with Session.open(path) as exact, _on_cpu(path, "ort-cuda-fp16") as lowered:
        wanted, found = (one.score(ids, policy="full").logits for one in (exact, lowered))
    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.1


def test_the_kind_is_in_the_manifest(bundle: Path) -> None:
    targets = build_cuda(bundle, dtype="fp32").manifest.targets
    assert {name: target.kind for name, target in targets.items()} == {
        "ort-cpu": "ort-cpu",
        "ort-cuda-fp32": "ort-cuda",
    }


def test_built_again_it_replaces_its_files(bundle: Path) -> None:
    first = build_cuda(bundle, weights="int4")
    assert set(first.own_weights("ort-cuda-fp16-int4")) == {
        "weights.ort-cuda-fp16-int4.safetensors",
        "weights.ort-cuda-fp16-int4.narrow.safetensors",
    }
    assert build_cuda(bundle, weights="int4").manifest.files == first.manifest.files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, "dtype is 'bf16', expected one of fp16, fp32"),
        (
            {"weights": "fp8"},
            "weights is 'fp8', expected one of none, int8, int4 for ort-cuda: fp8 is for TensorRT's targets",
        ),
        ({"dtype": "fp32", "weights": "int4"}, "no fp32 form: build int4 with --dtype fp16"),
        ({"block": 64}, "weights none rounds nothing: leave it out"),
        ({"weights": "int8", "block": 32}, "block is 32, expected one of 64, 128"),
        (
            {"weights": "int8", "block": 128},
            "rows of 64 values do not divide into blocks of 128, which the CUDA kernel wants: build with --block 64",
        ),
    ],
)
def test_bad_wishes_are_refused_in_one_line(bundle: Path, options: dict[str, Any], message: str) -> None:
    before = open_bundle(bundle).manifest
    with pytest.raises(BuildError) as caught:
        build_cuda(bundle, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert open_bundle(bundle).manifest == before


def test_a_weight_beyond_float16_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Checkpoint.read

    def huge(self: Any, name: str, start: int = 0, stop: int | None = None) -> Any:
        piece = read(self, name, start, stop)
        return piece * 0 - 1e5 if name == "step.block.ffn.fc1" else piece

    monkeypatch.setattr(Checkpoint, "read", huge)
    with pytest.raises(BuildError, match=r"step.block.ffn.fc1: a weight of 100000 does not fit fp16.*--dtype fp32"):
        build_cuda(bundle)
    assert list(open_bundle(bundle).manifest.targets) == ["ort-cpu"]
    assert not list(bundle.glob(".*"))
