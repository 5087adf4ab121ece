"""Every face of the custom ops against the float64 oracle: function body, eager torch, ONNX Runtime lowering."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from mythos_edge.model.layers import EagerOps, Window
from mythos_edge.plugins import ops, reference
from mythos_edge.plugins.ort_lowering import lower_for_ort
from mythos_edge.plugins.torch_ops import add_functions

Feeds = dict[str, np.ndarray]
# float32 sums of a few hundred products of size 1.
TOLERANCE = 2e-5

ATTENTION_SHAPES = [
    # batch, new, context, filled, heads, padding
    (1, 1, 0, 0, 1, (0,)),
    (1, 1, 9, 9, 4, (0,)),
    (1, 5, 9, 9, 4, (0,)),
    (2, 3, 9, 7, 4, (0, 2)),
    (3, 7, 11, 4, 2, (6, 0, 5)),
    (2, 6, 4, 0, 2, (5, 0)),
]


def _model(spec: ops.OpSpec, feeds: Feeds, attributes: dict[str, Any], constants: tuple[str, ...] = ()) -> ir.Model:
    """A model of one node; ``constants`` of the feeds are initializers."""
    values = {}
    for name, array in feeds.items():
        tensor = ir.tensor(array, name=name)
        constant = tensor if name in constants else None
        values[name] = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=constant
        )
    node = ir.node(spec.name, list(values.values()), attributes, domain=ops.DOMAIN)
    output = node.outputs[0]
    output.name, output.type = spec.output, ir.TensorType(ir.DataType.FLOAT)
    output.shape = ir.Shape([f"axis_{axis}" for axis in range(next(iter(feeds.values())).ndim)])
    graph = ir.Graph(
        [value for name, value in values.items() if name not in constants],
        node.outputs,
        nodes=[node],
        initializers=[values[name] for name in constants],
        opset_imports={"": ops.OPSET, ops.DOMAIN: ops.VERSION},
        name="one",
    )
    return ir.Model(graph, ir_version=10)


def _run(model: ir.Model, feeds: Feeds) -> np.ndarray:
    add_functions(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})[0]
    return result


def _attention_feeds(
    random: np.random.Generator, shape: tuple[Any, ...], width: int, head_width: int
) -> tuple[Feeds, Window]:
    batch, new, context, filled, heads, padding = shape
    feeds = {
        "q": random.standard_normal((batch, new, heads, head_width)).astype(np.float32),
        "rows": random.standard_normal((batch, new, width)).astype(np.float32),
        "past": random.standard_normal((batch, context, width)).astype(np.float32),
        "length": np.array(filled),
        "first": np.array(padding),
    }
    return feeds, Window(torch.tensor(filled), torch.tensor(padding))


@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_latent_attention(shape: tuple[Any, ...], random: np.random.Generator) -> None:
    attributes = {"scale": 0.3, "value_dim": 13}
    feeds, window = _attention_feeds(random, shape, 20, 20)
    wanted = reference.latent_attention(**feeds, **attributes)
    assert np.abs(_run(_model(ops.LATENT_ATTENTION, feeds, attributes), feeds) - wanted).max() < TOLERANCE
    q, rows, past = (torch.from_numpy(feeds[name]) for name in ("q", "rows", "past"))
    eager = EagerOps().latent_attention(q, rows, past, window, 13, 0.3)
    assert np.abs(eager.numpy() - wanted).max() < TOLERANCE


@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_grouped_query_attention(shape: tuple[Any, ...], random: np.random.Generator) -> None:
    kv_heads = max(1, shape[4] // 2)
    attributes = {"scale": 0.3, "kv_heads": kv_heads}
    feeds, window = _attention_feeds(random, shape, 2 * kv_heads * 6, 6)
    wanted = reference.grouped_query_attention(**feeds, **attributes)
    assert np.abs(_run(_model(ops.GROUPED_QUERY_ATTENTION, feeds, attributes), feeds) - wanted).max() < TOLERANCE
    q, rows, past = (torch.from_numpy(feeds[name]) for name in ("q", "rows", "past"))
    eager = EagerOps().grouped_query_attention(q, rows, past, window, kv_heads, 0.3)
    assert np.abs(eager.numpy() - wanted).max() < TOLERANCE


MOE_SHAPES = [
    # rows, dim, experts, top-k, hidden, shared hidden, bias
    (1, 8, 1, 1, 4, 0, False),
    (1, 24, 7, 3, 10, 14, True),
    (9, 24, 7, 3, 10, 14, False),
    (33, 17, 5, 5, 7, 9, True),
    (6, 16, 16, 1, 8, 0, True),
]


def _moe_feeds(random: np.random.Generator, shape: tuple[int, ...]) -> Feeds:
    rows, dim, experts, _, hidden, shared, biased = shape
    sizes = {
        "x": (rows, dim),
        "router": (experts, dim),
        "router_bias": (experts,),
        "fc1": (experts, 2 * hidden, dim),
        "fc2": (experts, dim, hidden),
    }
    if shared:
        sizes |= {"shared_gate_up": (2 * shared, dim), "shared_down": (dim, shared)}
    feeds = {name: (0.5 * random.standard_normal(size)).astype(np.float32) for name, size in sizes.items()}
    feeds["router_bias"] = 3 * feeds["router_bias"] * np.float32(biased)
    return feeds


@pytest.mark.parametrize("shape", MOE_SHAPES)
def test_sparse_moe(shape: tuple[int, ...], random: np.random.Generator) -> None:
    top_k, feeds = shape[3], _moe_feeds(random, shape)
    wanted = reference.sparse_moe(**feeds, top_k=top_k)
    weights = tuple(name for name in feeds if name != "x")
    model = _model(ops.SPARSE_MOE, feeds, {"top_k": top_k}, constants=weights)
    lowered = lower_for_ort(model)
    assert np.abs(_run(model, feeds) - wanted).max() < TOLERANCE
    assert [node.op_type for node in lowered.graph].count("MoE") == 1
    assert np.abs(_run(lowered, feeds) - wanted).max() < TOLERANCE
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    shared = (tensors.pop("shared_gate_up"), tensors.pop("shared_down")) if shape[5] else None
    eager = EagerOps().sparse_moe(**tensors, shared=shared, top_k=top_k)
    assert np.abs(eager.numpy() - wanted).max() < TOLERANCE


def test_sparse_moe_with_all_rows_at_one_expert(random: np.random.Generator) -> None:
    feeds = _moe_feeds(random, (12, 16, 6, 1, 8, 0, False))
    feeds["router_bias"][2] = 1e3
    wanted = reference.sparse_moe(**feeds, top_k=1)
    model = _model(ops.SPARSE_MOE, feeds, {"top_k": 1}, constants=("router_bias",))
    assert np.abs(_run(model, feeds) - wanted).max() < TOLERANCE
    assert np.abs(_run(lower_for_ort(model), feeds) - wanted).max() < TOLERANCE
