"""Graphs lowered for the CUDA provider, run on the CPU provider's kernels and held against the float64 oracle."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from single_ops import CUDA_KERNELS, TOLERANCE, Feeds, expert_feeds, experts_model, packed, run_saved

from mythos_edge.exporter.lowering.ort_cpu import lower_for_ort
from mythos_edge.exporter.lowering.ort_cuda import lower_for_ort_cuda
from mythos_edge.exporter.lowering.ort_kernels import MICROSOFT, Pack
from mythos_edge.exporter.rounding import Rounding
from mythos_edge.plugins import ops, reference

# float16 has 11 bits; an expert is two products and the weights a third rounding.
NARROW_TOLERANCE = 4 * 2.0**-11
LARGE = ("fc1", "fc2", "shared_gate_up", "shared_down")

SHAPES = [
    # rows, dim, experts, top-k, hidden, shared hidden, bias
    (1, 32, 4, 1, 16, 0, False),
    (1, 32, 7, 3, 16, 24, True),
    (9, 32, 7, 3, 16, 24, False),
    (33, 48, 5, 5, 16, 8, True),
    (6, 16, 16, 1, 16, 0, True),
]


def _kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


def _narrowed(feeds: Feeds, without: tuple[str, ...] = ()) -> dict[str, ir.TensorProtocol]:
    """The large matrices in float16; ``feeds`` then has what they stand for."""
    narrowed: dict[str, ir.TensorProtocol] = {}
    for name in LARGE:
        if name in feeds and name not in without:
            narrow = feeds[name].astype(np.float16)
            narrowed[name], feeds[name] = ir.tensor(narrow, name=name), narrow.astype(np.float32)
    return narrowed


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("shape", SHAPES)
def test_experts_in_float32(shape: tuple[int, ...], random: np.random.Generator, tmp_path: Path) -> None:
    feeds = expert_feeds(random, shape)
    wanted = reference.sparse_moe(**feeds, top_k=shape[3])
    lowered = lower_for_ort_cuda(experts_model(feeds, shape[3]))
    kinds = _kinds(lowered)
    assert (kinds.count("MoE"), kinds.count("Cast")) == (1, 0)
    assert kinds.count("TopK") == shape[6], "without a bias the kernel chooses by itself"
    assert np.abs(run_saved(lowered, feeds, tmp_path) - wanted).max() < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_experts_in_float16(shape: tuple[int, ...], random: np.random.Generator, tmp_path: Path) -> None:
    feeds = expert_feeds(random, shape)
    model = experts_model(feeds, shape[3])
    narrowed = _narrowed(feeds)
    wanted = reference.sparse_moe(**feeds, top_k=shape[3])
    lowered = lower_for_ort_cuda(model, narrowed)
    found = run_saved(lowered, feeds, tmp_path)
    assert found.dtype == np.float32
    assert 0 < _relative(found, wanted) < NARROW_TOLERANCE
    # No float32 matrix is left that would be loaded beside the narrow one.
    left = {str(value.name) for value in lowered.graph.initializers.values()}
    assert {f"{name}.fp16" for name in narrowed} <= left
    assert not left & set(LARGE)


@pytest.mark.parametrize("narrow", [False, True])
def test_experts_are_chosen_in_float32(narrow: bool, random: np.random.Generator, tmp_path: Path) -> None:
    """Biased logits that float16 cannot tell apart still choose the larger one, and do not weigh."""
    feeds = expert_feeds(random, (64, 32, 8, 2, 16, 0, False))
    # Two experts compete for the second place, 1e-4 apart around 1000; the first place is the last expert's.
    feeds["router"][:2] = feeds["router"][0]
    feeds["router_bias"][:] = [1000, 1000.0001, 0, 0, 0, 0, 0, 2000]
    model = experts_model(feeds, 2)
    narrowed = _narrowed(feeds) if narrow else None
    logits = feeds["x"] @ feeds["router"].T
    feeds["router_bias"] = np.array([0, 1, -1e6, -1e6, -1e6, -1e6, -1e6, 1e6], np.float32)
    wanted = reference.sparse_moe(**feeds, top_k=2)
    assert np.abs(logits).max() < 100
    found = run_saved(lower_for_ort_cuda(model, narrowed), feeds, tmp_path)
    assert _relative(found, wanted) < (NARROW_TOLERANCE if narrow else TOLERANCE)


def _packs(feeds: Feeds, rounding: Rounding) -> dict[str, Pack]:
    """The large matrices rounded, with scales that float16 holds; ``feeds`` then has what they stand for."""
    packs = {}
    for name in LARGE:
        if name in feeds:
            packs[name], feeds[name] = packed(feeds[name], rounding, scale=np.float16)
    return packs


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("rows", [1, 9])
def test_rounded_experts(bits: int, block: int, rows: int, random: np.random.Generator, tmp_path: Path) -> None:
    feeds = expert_feeds(random, (rows, 128, 7, 3, 128, 128, True))
    model = experts_model(feeds, 3)
    packs = _packs(feeds, Rounding(bits, block, "rtn"))
    wanted = reference.sparse_moe(**feeds, top_k=3)
    lowered = lower_for_ort_cuda(model, {}, packs)
    kinds = _kinds(lowered)
    assert (kinds.count("QMoE"), kinds.count("MatMulNBits"), kinds.count("MoE")) == (1, 2, 0)
    (experts,) = (node for node in lowered.graph.all_nodes() if node.op_type == "QMoE")
    assert experts.attributes["weights_prepacked"].as_int() == 0, "the CUDA kernel would take them for its own layout"
    # The CPU's kernel of QMoE rounds activations to 8 bits; that of CUDA does not.
    assert _relative(run_saved(lowered, feeds, tmp_path), wanted) < 0.02


def test_rounded_weights_need_float16(random: np.random.Generator) -> None:
    feeds = expert_feeds(random, (1, 128, 4, 2, 128, 0, False))
    model = experts_model(feeds, 2)
    with pytest.raises(AssertionError, match="float16"):
        lower_for_ort_cuda(model, None, _packs(feeds, Rounding(4, 64, "rtn")))


@pytest.mark.parametrize("form", ["fp32", "fp16", "int4", "int8"])
def test_only_ops_and_types_with_a_cuda_kernel(form: str, random: np.random.Generator) -> None:
    feeds = expert_feeds(random, (3, 128, 4, 2, 128, 64, True))
    model = experts_model(feeds, 2)
    packs = _packs(feeds, Rounding(int(form[3:]), 64, "rtn")) if form.startswith("int") else {}
    narrowed = None if form == "fp32" else _narrowed(feeds, tuple(packs))
    lowered = lower_for_ort_cuda(model, narrowed, packs)
    own = [node for node in lowered.graph.all_nodes() if node.domain == MICROSOFT]
    experts, products = {"fp32": ("MoE", 0), "fp16": ("MoE", 0)}.get(form, ("QMoE", 2))
    kinds = Counter(node.op_type for node in own)
    assert kinds == {experts: 1, "QuickGelu": 1} | ({"MatMulNBits": products} if products else {})
    element = "FLOAT" if form == "fp32" else "FLOAT16"
    assert all(element in CUDA_KERNELS[kind] for kind in kinds)
    assert not any(node.domain == ops.DOMAIN for node in lowered.graph.all_nodes())


ATTENTIONS = [
    # new rows, cached rows, heads
    (1, 0, 4),
    (5, 0, 4),
    (1, 9, 4),
    (5, 9, 2),
]


def _attention_model(spec: ops.OpSpec, feeds: Feeds, attributes: dict[str, Any], width: int) -> ir.Model:
    """One node for one sequence, with free axes as in a bundle; its cache is all filled, and it has no padding."""
    axes = {"q": [1, "chunk", *feeds["q"].shape[2:]], "rows": [1, "chunk", width], "past": [1, "context", width]}
    values = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        for name, shape in axes.items()
    ]
    node = ir.node(spec.name, [*values, None, None], attributes, domain=ops.DOMAIN)
    (output,) = node.outputs
    output.name, output.type, output.shape = (
        "mixed",
        ir.TensorType(ir.DataType.FLOAT),
        ir.Shape([1, "chunk", None, None]),
    )
    graph = ir.Graph(values, [output], nodes=[node], opset_imports={"": ops.OPSET, ops.DOMAIN: ops.VERSION}, name="one")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("lower", [lower_for_ort, lower_for_ort_cuda])
@pytest.mark.parametrize(("new", "cached", "heads"), ATTENTIONS)
@pytest.mark.parametrize(("latent", "window_size"), [(True, 0), (False, 0), (False, 1), (False, 3), (False, 6)])
def test_attention(
    lower: Callable[[ir.Model], ir.Model],
    latent: bool,
    window_size: int,
    new: int,
    cached: int,
    heads: int,
    random: np.random.Generator,
    tmp_path: Path,
) -> None:
    width, head_width = (20, 20) if latent else (2 * 2 * 6, 6)
    shapes = {"q": (1, new, heads, head_width), "rows": (1, new, width), "past": (1, cached, width)}
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    window = {"length": cached, "first": np.zeros(1, np.int64)}
    if latent:
        spec, attributes = ops.LATENT_ATTENTION, {"scale": 0.3, "value_dim": 13}
        wanted = reference.latent_attention(**feeds, **window, scale=0.3, value_dim=13)
    else:
        spec, attributes = ops.GROUPED_QUERY_ATTENTION, {"scale": 0.3, "kv_heads": 2, "window_size": window_size}
        wanted = reference.grouped_query_attention(**feeds, **window, **attributes)
    lowered = lower(_attention_model(spec, feeds, attributes, width))
    assert {node.op_type for node in lowered.graph.all_nodes() if node.domain == MICROSOFT} == {"FusedMatMul"}
    found = run_saved(lowered, feeds, tmp_path)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < TOLERANCE
