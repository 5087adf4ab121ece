"""Every face of the custom ops against the float64 oracle: function body, eager torch, ONNX Runtime lowering."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from single_ops import TOLERANCE, Feeds, expert_feeds, experts_model, model_of, packed, run_saved

from mythos_edge.exporter.lowering.ort_cpu import lower_for_ort
from mythos_edge.exporter.rounding import Rounding
from mythos_edge.model.eager_ops import EagerOps
from mythos_edge.model.network import Window
from mythos_edge.plugins import ops, reference
from mythos_edge.plugins.torch_ops import add_functions

ATTENTION_SHAPES = [
    # batch, new, context, filled, heads, padding
    (1, 1, 0, 0, 1, (0,)),
    (1, 1, 9, 9, 4, (0,)),
    (1, 5, 9, 9, 4, (0,)),
    (2, 3, 9, 7, 4, (0, 2)),
    (3, 7, 11, 4, 2, (6, 0, 5)),
    (2, 6, 4, 0, 2, (5, 0)),
]


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
    assert np.abs(_run(model_of(ops.LATENT_ATTENTION, feeds, attributes), feeds) - wanted).max() < TOLERANCE
    q, rows, past = (torch.from_numpy(feeds[name]) for name in ("q", "rows", "past"))
    eager = EagerOps().latent_attention(q, rows, past, window, 13, 0.3)
    assert np.abs(eager.numpy() - wanted).max() < TOLERANCE


@pytest.mark.parametrize("window_size", [0, 1, 3, 8])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_grouped_query_attention(shape: tuple[Any, ...], window_size: int, random: np.random.Generator) -> None:
    kv_heads = max(1, shape[4] // 2)
    attributes = {"scale": 0.3, "kv_heads": kv_heads, "window_size": window_size}
    feeds, window = _attention_feeds(random, shape, 2 * kv_heads * 6, 6)
    wanted = reference.grouped_query_attention(**feeds, **attributes)
    assert np.abs(_run(model_of(ops.GROUPED_QUERY_ATTENTION, feeds, attributes), feeds) - wanted).max() < TOLERANCE
    q, rows, past = (torch.from_numpy(feeds[name]) for name in ("q", "rows", "past"))
    eager = EagerOps().grouped_query_attention(q, rows, past, window, kv_heads, 0.3, window_size)
    assert np.abs(eager.numpy() - wanted).max() < TOLERANCE


def test_only_graphs_with_windows_pay_for_them() -> None:
    """A node without the attribute, as older versions wrote it, sees all; a graph may hold both kinds."""
    feeds, _ = _attention_feeds(np.random.default_rng(0), (1, 3, 5, 5, 2, (0,)), 2 * 6, 6)
    plain = model_of(ops.GROUPED_QUERY_ATTENTION, feeds, {"scale": 0.3, "kv_heads": 1})
    same = model_of(ops.GROUPED_QUERY_ATTENTION, feeds, {"scale": 0.3, "kv_heads": 1, "window_size": 0})
    bounded = model_of(ops.GROUPED_QUERY_ATTENTION, feeds, {"scale": 0.3, "kv_heads": 1, "window_size": 2})
    assert np.array_equal(_run(plain, feeds), _run(same, feeds))
    assert np.abs(_run(bounded, feeds) - _run(plain, feeds)).max() > 0.01
    counts = [len(list(next(iter(model.functions.values())))) for model in (plain, same, bounded)]
    assert counts[0] == counts[1] < counts[2]


MOE_SHAPES = [
    # rows, dim, experts, top-k, hidden, shared hidden, bias
    (1, 8, 1, 1, 4, 0, False),
    (1, 24, 7, 3, 10, 14, True),
    (9, 24, 7, 3, 10, 14, False),
    (33, 17, 5, 5, 7, 9, True),
    (6, 16, 16, 1, 8, 0, True),
]


def _moe_model(feeds: Feeds, top_k: int, folder: Path) -> ir.Model:
    """The op with its weights in a file, as in a bundle."""
    return ir.external_data.unload_from_model(
        experts_model(feeds, top_k), folder, "weights.bin", size_threshold_bytes=0
    )


@pytest.mark.parametrize("shape", MOE_SHAPES)
def test_sparse_moe(shape: tuple[int, ...], random: np.random.Generator, tmp_path: Path) -> None:
    top_k, feeds = shape[3], expert_feeds(random, shape)
    wanted = reference.sparse_moe(**feeds, top_k=top_k)
    model = _moe_model(feeds, top_k, tmp_path)
    lowered = lower_for_ort(model)
    add_functions(model)
    assert np.abs(run_saved(model, feeds, tmp_path) - wanted).max() < TOLERANCE
    assert [node.op_type for node in lowered.graph].count("If") == shape[2]
    assert np.abs(run_saved(lowered, feeds, tmp_path) - wanted).max() < TOLERANCE
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    shared = (tensors.pop("shared_gate_up"), tensors.pop("shared_down")) if shape[5] else None
    eager = EagerOps().sparse_moe(**tensors, shared=shared, top_k=top_k)
    assert np.abs(eager.numpy() - wanted).max() < TOLERANCE


@pytest.mark.parametrize("shape", [shape for shape in MOE_SHAPES if not shape[5]])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("codes", [ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN])
def test_quantized_sparse_moe(
    shape: tuple[int, ...], blocks: int, codes: ir.DataType, random: np.random.Generator, tmp_path: Path
) -> None:
    feeds = expert_feeds(random, shape)
    for name in ("fc1", "fc2"):
        stack = feeds.pop(name)
        feeds[f"{name}_codes"] = random.integers(-7, 8, stack.shape).astype(codes.numpy())
        feeds[f"{name}_scale"] = random.uniform(0.05, 0.15, (*stack.shape[:2], blocks)).astype(np.float32)
    feeds = {name: feeds[name] for name in ops.QUANTIZED_SPARSE_MOE.inputs}
    wanted = reference.quantized_sparse_moe(**feeds, top_k=shape[3])
    weights = tuple(name for name in feeds if name != "x")
    model = model_of(ops.QUANTIZED_SPARSE_MOE, feeds, {"top_k": shape[3]}, constants=weights)
    add_functions(model)
    assert np.abs(run_saved(model, feeds, tmp_path) - wanted).max() < TOLERANCE * max(1.0, np.abs(wanted).max())


def test_a_body_of_16_bit_values_computes_in_float32(random: np.random.Generator) -> None:
    attributes = {"scale": 0.3, "value_dim": 13}
    feeds, _ = _attention_feeds(random, (2, 3, 9, 7, 4, (0, 2)), 20, 20)
    narrow = {name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in feeds.items()}
    wanted = reference.latent_attention(**narrow, **attributes)
    model = model_of(ops.LATENT_ATTENTION, narrow, attributes)
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    # Half a unit in the last place of values below 4, and nothing more.
    assert np.abs(_run(model, narrow) - wanted).max() < 2**-9 / 2 + TOLERANCE


def test_sparse_moe_with_all_rows_at_one_expert(random: np.random.Generator, tmp_path: Path) -> None:
    feeds = expert_feeds(random, (12, 16, 6, 1, 8, 0, False))
    feeds["router_bias"][2] = 1e3
    wanted = reference.sparse_moe(**feeds, top_k=1)
    lowered = lower_for_ort(_moe_model(feeds, 1, tmp_path))
    assert np.abs(run_saved(lowered, feeds, tmp_path) - wanted).max() < TOLERANCE


def test_a_chosen_expert_with_a_very_low_score_still_counts(random: np.random.Generator, tmp_path: Path) -> None:
    feeds = expert_feeds(random, (5, 16, 6, 3, 8, 0, True))
    feeds["router"] *= 200  # logits of some hundreds, most of them far below zero
    feeds["router_bias"][:2] = 1e4
    wanted = reference.sparse_moe(**feeds, top_k=3)
    lowered = lower_for_ort(_moe_model(feeds, 3, tmp_path))
    assert np.abs(run_saved(lowered, feeds, tmp_path) - wanted).max() < TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize("shape", [shape for shape in ATTENTION_SHAPES if shape[0] == 1])
def test_lowered_latent_attention(shape: tuple[Any, ...], random: np.random.Generator, tmp_path: Path) -> None:
    attributes = {"scale": 0.3, "value_dim": 13}
    feeds, _ = _attention_feeds(random, shape, 20, 20)
    wanted = reference.latent_attention(**feeds, **attributes)
    lowered = lower_for_ort(model_of(ops.LATENT_ATTENTION, feeds, attributes))
    assert not any(node.domain == ops.DOMAIN for node in lowered.graph)
    assert np.abs(run_saved(lowered, feeds, tmp_path) - wanted).max() < TOLERANCE


ROUNDINGS = [(bits, block, method) for bits in (4, 8) for block in (32, 64, 128) for method in ("rtn", "search")]


@pytest.mark.parametrize(("bits", "block", "method"), ROUNDINGS)
def test_rounded_sparse_moe(bits: int, block: int, method: str, random: np.random.Generator, tmp_path: Path) -> None:
    """The kernels read the packed weights as they are meant, and route as the oracle does."""
    feeds = expert_feeds(random, (9, 128, 7, 3, 128, 144, True))
    model = _moe_model(feeds, 3, tmp_path)
    names = ("fc1", "fc2", "shared_gate_up", "shared_down")
    packs = {}
    for name in names:
        packs[name], feeds[name] = packed(feeds[name], Rounding(bits, block, method))
    wanted = reference.sparse_moe(**feeds, top_k=3)
    lowered = lower_for_ort(model, packs)
    kinds = [node.op_type for node in lowered.graph]
    assert (kinds.count("QMoE"), kinds.count("MatMulNBits"), kinds.count("If")) == (1, 2, 0)
    error = np.linalg.norm(run_saved(lowered, feeds, tmp_path) - wanted) / np.linalg.norm(wanted)
    # The kernels round activations to 8 bits too, twice in a row: up to 0.6 % each, more after SiLU.
    assert error < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_in_plain_torch_is_that_of_the_onnx_op(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 5, 3, 8), (9, 4), (9, 4)))
    positions = torch.randint(0, 9, (2, 5), generator=generator)
    turned = torch.onnx.ops.rotary_embedding(x.flatten(2), cos, sin, positions, interleaved=True, num_heads=3)
    assert torch.equal(EagerOps().rotate(x, cos, sin, positions), turned.view(x.shape))
