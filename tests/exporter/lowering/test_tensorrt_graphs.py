"""The graphs TensorRT gets, looked at: types, contract, plugins, links, and the bytes that are read."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from lowered_models import CHECKPOINTS, CONTEXT, ROWS, Lower

from mythos_edge.exporter.graph_checks import check_graph
from mythos_edge.exporter.lowering import tensorrt_passes
from mythos_edge.exporter.lowering.tensorrt import EngineOptions, lower_for_tensorrt
from mythos_edge.exporter.lowering.tensorrt_weights import ENGINE_WEIGHTS_FILE
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.errors import BuildError
from mythos_edge.model.manifest import WEIGHTS_FILE
from mythos_edge.runtime.backends.ort_session import ort_session

FLOATS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
KINDS = [(dtype, layout) for dtype in ("fp32", "fp16", "bf16") for layout in ("step", "loop")]


@pytest.mark.parametrize(("dtype", "layout"), KINDS)
def test_types(lower: Lower, golden_name: str, dtype: str, layout: str) -> None:
    """Every tensor has the type it should; float32 appears in 16-bit graphs only where depth is decided."""
    lowered = lower(golden_name, dtype, layout)
    for path in lowered.graphs.values():
        model = ir.load(path)
        check_graph(model)
        nodes = list(model.graph.all_nodes())
        values = [value for node in nodes for value in node.outputs]
        values += [*model.graph.inputs, *model.graph.initializers.values()]
        kinds = {value.dtype for value in values if value.dtype is not None}
        allowed = {FLOATS[dtype], ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL}
        assert kinds <= allowed
        if dtype == "fp32":
            continue
        wide = [
            node for node in nodes if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT
        ]
        # The loop table's step, h for halting, and the logits at the very end; nothing of a block.
        names = {str(node.outputs[0].name).rpartition("/")[2] for node in wide}
        per_stage = {"prelude": 0, "step": 2, "coda": 1, "model": 3}[path.stem]
        assert len(names) == len(wide) == per_stage
        for value in model.graph.initializers.values():
            if value.dtype == ir.DataType.FLOAT and isinstance(value.const_value, ir.ExternalTensor):
                assert str(value.name).startswith(("step.table.", "step.halt_"))


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("layout", ["step", "loop"])
def test_a_cast_to_float32_in_the_hot_path_is_found(lower: Lower, weights: str, layout: str) -> None:
    """Products, their scales and the experts are of the compute dtype; each product reads codes at once."""
    lowered = lower("mla-small", "fp16", layout, weights)
    for path in lowered.graphs.values():
        model = ir.load(path)
        check_graph(model)
        for node in model.graph.all_nodes():
            if node.op_type in ("Gemm", "MatMul", "RMSNormalization", "Attention", "QuantizedSparseMoE"):
                codes = {ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.BOOL}
                given = {value.dtype for value in node.inputs if value is not None and value.dtype is not None}
                assert given - codes == {ir.DataType.FLOAT16}, node.name
            if node.op_type == "DequantizeLinear":
                assert [user.op_type for user, _ in node.outputs[0].uses()] == ["Gemm"]


def test_inputs_and_outputs_are_those_of_the_contract(lower: Lower) -> None:
    half, long = "tensor(float16)", "tensor(int64)"
    cache = [1, 1, CONTEXT + ROWS, 40]
    step = ort_session(lower("mla-small", "fp16").graphs["step"])
    state = {
        "h": (half, [1, "chunk", 96]),
        "out": (half, [1, "chunk", 96]),
        "halt_mass": ("tensor(float)", [1, "chunk"]),
    }
    state["depth"] = (long, [1, "chunk"])
    assert {given.name: (given.type, given.shape) for given in step.get_inputs()} == {
        **state,
        "e": (half, [1, "chunk", 96]),
        "step_index": (long, [1, "chunk"]),
        "threshold": ("tensor(float)", []),
        "min_depth": (long, []),
        "length": (long, []),
        "past_0": (half, cache),
    }
    made = {f"{name}_next": kind for name, kind in state.items()} | {"past_0_next": (half, cache)}
    assert {output.name: (output.type, output.shape) for output in step.get_outputs()} == made
    coda = ort_session(lower("mla-small", "fp32").graphs["coda"])
    assert {given.name: given.shape for given in coda.get_inputs()} == {
        "out": [1, "chunk", 96],
        "logit_rows": ["logit_count"],
        "length": [],
        "past_0": [1, "context", 40],
        "past_1": [1, "context", 40],
    }
    assert {output.name: output.shape for output in coda.get_outputs()} == {
        "logits": [1, "logit_count", 331],
        "rows_0": [1, "chunk", 40],
        "rows_1": [1, "chunk", 40],
    }


@pytest.mark.parametrize(
    ("name", "dtype", "layout", "plugins", "ops"),
    [
        ("mla-small", "fp32", "step", {"prelude": 1, "step": 2, "coda": 2}, {"LatentAttention": 4, "SparseMoE": 1}),
        ("mla-small", "fp16", "step", {"prelude": 0, "step": 1, "coda": 0}, {"Attention": 4, "SparseMoE": 1}),
        ("mla-small", "fp16", "loop", {"model": 5}, {"LatentAttention": 4, "SparseMoE": 1}),
        (
            "gqa-small",
            "fp32",
            "step",
            {"prelude": 0, "step": 1, "coda": 0},
            {"GroupedQueryAttention": 3, "SparseMoE": 1},
        ),
        ("gqa-small", "bf16", "step", {"prelude": 0, "step": 1, "coda": 0}, {"Attention": 3, "SparseMoE": 1}),
        ("gqa-small", "bf16", "loop", {"model": 1}, {"GroupedQueryAttention": 3, "SparseMoE": 1}),
    ],
)
def test_what_becomes_a_plugin(
    lower: Lower, name: str, dtype: str, layout: str, plugins: dict[str, int], ops: dict[str, int]
) -> None:
    lowered = lower(name, dtype, layout)
    assert lowered.plugins == plugins
    found: Counter[str] = Counter()
    for path in lowered.graphs.values():
        for node in ir.load(path).graph.all_nodes():
            if node.domain == "mythos" or node.op_type == "Attention":
                found[node.op_type] += 1
                is_plugin = node.domain == "mythos" and node.op_type != "GroupedQueryAttention"
                assert ("plugin_namespace" in node.attributes) == is_plugin
                assert node.op_type != "SparseMoE" or len(node.inputs) == 5
    assert found == ops


def test_rules_of_the_loop(lower: Lower) -> None:
    """See notes of ``loop_graph``; and no RotaryEmbedding, beside which TensorRT builds no Loop."""
    graph = ir.load(lower("mla-small", "fp16", "loop").graphs["model"]).graph
    loop = next(node for node in graph if node.op_type == "Loop")
    body = loop.attributes["body"].as_graph()
    assert not list(body.inputs[1].uses())
    assert len(loop.outputs) == 4
    assert not any(node.op_type in ("RotaryEmbedding", "TensorScatter", "Attention") for node in graph.all_nodes())
    assert not any(0 in value.const_value.shape.numpy() for value in graph.initializers.values() if value.const_value)


def test_the_bundles_weights_are_linked_where_nothing_changes(
    lower: Lower, exported: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = exported(CHECKPOINTS["mla-small"])
    lower_for_tensorrt(open_bundle(bundle), tmp_path, EngineOptions("fp32", "step", "none", CONTEXT, ROWS))
    assert (tmp_path / WEIGHTS_FILE).samefile(bundle / WEIGHTS_FILE)
    assert not (tmp_path / ENGINE_WEIGHTS_FILE).exists()
    assert (bundle / WEIGHTS_FILE).stat().st_nlink == 1
    narrow = lower("mla-small", "fp16").graphs["step"].parent
    assert 0 < (narrow / ENGINE_WEIGHTS_FILE).stat().st_size < 0.6 * (bundle / WEIGHTS_FILE).stat().st_size


def test_bytes_read(lower: Lower, golden_name: str) -> None:
    """Half as many in fp16, about a quarter in int8; the same in either layout."""
    sizes = {
        key: (one.fixed_bytes, one.step_bytes)
        for key, one in {
            "fp32": lower(golden_name, "fp32"),
            "fp16": lower(golden_name, "fp16"),
            "loop": lower(golden_name, "fp16", "loop"),
            "int8": lower(golden_name, "fp32", "step", "int8"),
        }.items()
    }
    assert sizes["loop"] == sizes["fp16"]
    for wide, narrow, eighth in zip(sizes["fp32"], sizes["fp16"], sizes["int8"], strict=True):
        assert narrow == pytest.approx(wide / 2, rel=0.01)
        assert 0.25 * wide < eighth < 0.45 * wide


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_experts_whose_input_does_not_divide(weights: str, lower: Lower) -> None:
    model = ir.load(lower("mla-small", "fp32").graphs["step"])
    for name, shape in (("fc1", [8, 64, 100]), ("fc2", [8, 100, 32])):
        model.graph.initializers[f"step.block.ffn.{name}"].shape = ir.Shape(shape)
    with pytest.raises(BuildError, match=r"fc1: rows of 100 values are no multiple of 32: build with --weights none"):
        tensorrt_passes.round_weights(model, weights, set())


def test_a_weight_beyond_fp16_is_named(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(exported(CHECKPOINTS["mla-small"]))
    from mythos_edge.model.stored_checkpoint import Checkpoint

    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, *where: read(self, *where) + 1e6)
    with pytest.raises(BuildError, match=r"^embed: a weight of 1e\+06 does not fit fp16 .*: build with bf16$"):
        lower_for_tensorrt(bundle, tmp_path, EngineOptions("fp16", "loop", "none", CONTEXT, ROWS))
