"""ONNX Runtime CPU face of the custom ops: the same graph with the runtime's own fastest kernels.

Works on a stage for one sequence (``exporter.passes.for_one_sequence``) or for many. In float32 the weights are not
touched, so every lowered graph shares the bundle's weights file; rounded matrices come from ``packs``.

    mythos::LatentAttention            products over the cached rows as they lie, scores joined instead of caches
    mythos::GroupedQueryAttention      stays: ONNX Runtime inlines its body
    mythos::SparseMoE in float32       one If an expert around plain products: com.microsoft::MoE leaves cores idle
    mythos::SparseMoE rounded          com.microsoft::QMoE
    a product with a rounded matrix    com.microsoft::MatMulNBits
    rows of a rounded embedding        com.microsoft::GatherBlockQuantized
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mythos_edge.plugins import ops

MICROSOFT = "com.microsoft"
# Int8 products of int8-rounded activations with the rounded weights; the other levels were 40 times slower.
_ACCURACY_LEVEL = 4
_HIDDEN_SCORE = -3.4028234e38


@dataclass(frozen=True)
class Pack:
    """A matrix (or a stack of matrices) rounded in blocks of ``block`` values along its rows, one scale each.

    ``values`` uint8: (N, blocks, block * bits / 8), or (E, N, K * bits / 8) for stacked experts; zero is the middle of
    the range. ``scales`` float32 (N, blocks) or (E, N, blocks). ``columns`` is K, the length of a row.
    """

    bits: int
    block: int
    columns: int
    values: ir.TensorProtocol
    scales: ir.TensorProtocol


Packs = Mapping[str, Pack]


def lower_for_ort(model: ir.Model, packs: Packs | None = None) -> ir.Model:
    """A copy of ``model`` on ONNX Runtime's kernels; matrices named in ``packs`` are replaced by those.

    The selection bias must have its values: a bias of zeros needs no nodes.
    """
    lowered = model.clone()
    lowering = _Lowering(lowered.graph, packs or {})
    for node in list(lowered.graph):
        lowering.lower(node)
    lowered.graph.opset_imports[MICROSOFT] = 1
    lowered.graph.name = f"{model.graph.name} for ONNX Runtime"
    RemoveUnusedNodesPass()(lowered)
    return lowered


class _Lowering:
    """Replaces nodes of ``graph`` one by one."""

    def __init__(self, graph: ir.Graph, packs: Packs) -> None:
        self._graph, self._packs = graph, packs

    def lower(self, node: ir.Node) -> None:
        rules = {
            (ops.DOMAIN, ops.LATENT_ATTENTION.name): self._latent_attention,
            (ops.DOMAIN, ops.SPARSE_MOE.name): self._sparse_moe,
            ("", "Gemm"): self._product,
            ("", "Gather"): self._embedding,
        }
        rule = rules.get((node.domain, node.op_type))
        made = None if rule is None else rule(_Writer(self._graph, self._graph, str(node.outputs[0].name), node), node)
        if made is None:
            return
        old = node.outputs[0]
        name = old.name
        ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
        made.name, made.type, made.shape = name, old.type, old.shape
        self._graph.remove(node, safe=True)

    def _product(self, writer: "_Writer", node: ir.Node) -> ir.Value | None:
        x, matrix = node.inputs[:2]
        if matrix is None or str(matrix.name) not in self._packs:
            return None
        assert x is not None
        return writer.product(x, matrix, self._packs)

    def _embedding(self, writer: "_Writer", node: ir.Node) -> ir.Value | None:
        table, rows = node.inputs
        if table is None or str(table.name) not in self._packs:
            return None
        pack = self._packs[str(table.name)]
        # The head's rounded matrix, seen as rows of packed values.
        height = pack.scales.shape.numpy()[0]
        flat = writer.tensor(pack.values, f"{table.name}.q")
        packed = writer.add("Reshape", [flat, writer.integers([height, -1])])
        return writer.add(
            "GatherBlockQuantized",
            [packed, rows, writer.tensor(pack.scales, f"{table.name}.scale")],
            MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            block_size=pack.block,
            bits=pack.bits,
        )

    def _latent_attention(self, writer: "_Writer", node: ir.Node) -> ir.Value:
        q, rows, past = node.inputs[:3]
        assert q is not None
        heads, width = _sizes(q)[2:]
        scale = node.attributes["scale"].as_float()
        flat = writer.add("Reshape", [q, writer.integers([1, -1, width])])
        # The cache stands left, which is the faster order for few rows: scores (1, columns, rows * heads).
        past_scores = writer.add("FusedMatMul", [past, flat], MICROSOFT, transB=1, alpha=scale)
        new_scores = writer.add("FusedMatMul", [rows, flat], MICROSOFT, transB=1, alpha=scale)
        joined = writer.add("Concat", [past_scores, self._causal(writer, new_scores, rows, heads)], axis=1)
        weights = writer.add("Softmax", [writer.add("Transpose", [joined], perm=[0, 2, 1])], axis=-1)
        sizes = [writer.add("Shape", [value], start=1, end=2) for value in (past, rows)]
        counts = writer.add("Concat", sizes, axis=0)
        past_weights, new_weights = writer.add_many("Split", [weights, counts], 2, axis=2)
        past_mixed = writer.add("MatMul", [past_weights, past])
        mixed = writer.add("Add", [past_mixed, writer.add("MatMul", [new_weights, rows])])
        values = writer.add(
            "Slice",
            [
                mixed,
                writer.integers([0]),
                writer.integers([node.attributes["value_dim"].as_int()]),
                writer.integers([2]),
            ],
        )
        return writer.add("Reshape", [values, writer.integers([1, -1, heads, node.attributes["value_dim"].as_int()])])

    def _causal(self, writer: "_Writer", scores: ir.Value, rows: ir.Value | None, heads: int) -> ir.Value:
        """``scores (1, S, S * heads)`` of new rows among each other, without those of later rows for earlier ones."""
        branches: dict[str, Any] = {}
        several = writer.add("Greater", [writer.add("Shape", [rows], start=1, end=2), writer.integers([1])])
        for name in ("then_branch", "else_branch"):
            inside = writer.branch(name)
            if name == "else_branch":
                made = inside.add("Identity", [scores])
            else:
                # A key's row against each query's row; decoding has one row and needs none of this.
                size = inside.add("Shape", [scores])
                counts = inside.add_many("Split", [size], 3, axis=0, num_outputs=3)
                one = inside.integer(1)
                keys, queries = (
                    inside.add("Range", [inside.integer(0), inside.add("Squeeze", [counts[axis]]), one])
                    for axis in (1, 2)
                )
                key = inside.add("Unsqueeze", [keys, inside.integers([1])])
                seen = inside.add("LessOrEqual", [key, inside.add("Div", [queries, inside.integer(heads)])])
                made = inside.add("Where", [seen, scores, inside.number(_HIDDEN_SCORE)])
            made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([1, None, None])
            branches[name] = inside.closed(made)
        return writer.add("If", [several], **branches)

    def _sparse_moe(self, writer: "_Writer", node: ir.Node) -> ir.Value:
        inputs = dict(zip(ops.SPARSE_MOE.inputs + ops.SPARSE_MOE.optional, node.inputs, strict=False))
        x, fc1, fc2 = inputs["x"], inputs["fc1"], inputs["fc2"]
        assert x is not None
        assert fc1 is not None
        assert fc2 is not None
        top_k = node.attributes["top_k"].as_int()
        logits = writer.add("Gemm", [x, inputs["router"]], transB=1)
        bias = inputs["router_bias"]
        chosen_by = logits
        if bias is not None and _bias_matters(bias):
            chosen_by = writer.add("Add", [logits, bias])
        if str(fc1.name) in self._packs:
            y = self._rounded_experts(writer, x, (logits, chosen_by), (str(fc1.name), str(fc2.name)), top_k)
        else:
            y = self._dispatched_experts(writer, x, (logits, chosen_by), (fc1, fc2), top_k)
        if "shared_down" not in inputs:
            return y
        gate_up, down = inputs["shared_gate_up"], inputs["shared_down"]
        assert gate_up is not None
        assert down is not None
        gate, up = writer.add_many("Split", [writer.product(x, gate_up, self._packs)], 2, axis=-1, num_outputs=2)
        hidden = writer.add("Mul", [writer.silu(gate), up])
        return writer.add("Add", [y, writer.product(hidden, down, self._packs)])

    def _rounded_experts(
        self,
        writer: "_Writer",
        x: ir.Value,
        routing: tuple[ir.Value, ir.Value],
        names: tuple[str, str],
        top_k: int,
    ) -> ir.Value:
        logits, chosen_by = routing
        weights: list[ir.Value | None] = []
        for name in names:
            pack = self._packs[name]
            weights += [writer.tensor(pack.values, f"{name}.q"), writer.tensor(pack.scales, f"{name}.scale"), None]
        # Chosen by the biased logits, weighed by the unbiased scores, which the kernel renormalises.
        inputs = [x, chosen_by, *weights, *[None] * 6, writer.add("Softmax", [logits], axis=-1)]
        pack = self._packs[names[0]]
        return writer.add(
            "QMoE",
            inputs,
            MICROSOFT,
            k=top_k,
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=1.0,
            activation_beta=0.0,
            normalize_routing_weights=1,
            expert_weight_bits=pack.bits,
            block_size=pack.block,
        )

    def _dispatched_experts(
        self,
        writer: "_Writer",
        x: ir.Value,
        routing: tuple[ir.Value, ir.Value],
        stacks: tuple[ir.Value, ir.Value],
        top_k: int,
    ) -> ir.Value:
        """Rows sorted by expert, an If for each expert that computes its rows when it has any, and back in order.

        Each product runs on all cores and reads its weights once, whatever the number of rows.
        """
        logits, chosen_by = routing
        experts, _, dim = _sizes(stacks[0])
        scores, chosen = writer.add_many("TopK", [chosen_by, writer.integers([top_k])], 2)
        if chosen_by is not logits:
            scores = writer.add("GatherElements", [logits, chosen], axis=1)
        weights = writer.add("Softmax", [scores], axis=-1)
        flat = writer.add("Reshape", [chosen, writer.integers([-1])])
        count = writer.add("Shape", [flat])
        _, order = writer.add_many("TopK", [flat, count], 2, largest=0)
        _, place = writer.add_many("TopK", [order, count], 2, largest=0)
        row = writer.add("Div", [order, writer.integer(top_k)])
        each = writer.constant(f"experts_{experts}", np.arange(experts)[:, None])
        hits = writer.add("Cast", [writer.add("Equal", [each, flat])], to=ir.DataType.INT64)
        counts = writer.add("ReduceSum", [hits, writer.integers([1])], keepdims=0)
        rows = writer.add_many("Split", [row, counts], experts, axis=0)
        used = writer.add("Cast", [counts], to=ir.DataType.BOOL)
        wanted = writer.add_many("Split", [used], experts, axis=0, num_outputs=experts)
        made = [self._one_expert(writer, x, rows[expert], wanted[expert], stacks, expert) for expert in range(experts)]
        sorted_rows = writer.add("Concat", made, axis=0)
        by_row = writer.add("Reshape", [writer.add("Gather", [sorted_rows, place]), writer.integers([-1, top_k, dim])])
        weighed = writer.add("MatMul", [writer.add("Unsqueeze", [weights, writer.integers([1])]), by_row])
        return writer.add("Squeeze", [weighed, writer.integers([1])])

    def _one_expert(
        self,
        writer: "_Writer",
        x: ir.Value,
        rows: ir.Value,
        wanted: ir.Value,
        stacks: tuple[ir.Value, ir.Value],
        expert: int,
    ) -> ir.Value:
        gate_up, down = (writer.matrix_of(stack, expert) for stack in stacks)
        dim = _sizes(x)[-1]
        branches: dict[str, Any] = {}
        for name in ("then_branch", "else_branch"):
            inside = writer.branch(f"expert_{expert}/{name}")
            if name == "then_branch":
                both = inside.add("Gemm", [inside.add("Gather", [x, rows]), gate_up], transB=1)
                gate, up = (inside.every_second(both, first) for first in (0, 1))
                made = inside.add("Gemm", [inside.add("Mul", [inside.silu(gate), up]), down], transB=1)
            else:
                made = inside.add("Identity", [inside.constant("no_rows", np.zeros((0, dim), np.float32))])
            made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, dim])
            branches[name] = inside.closed(made)
        return writer.add("If", [wanted], **branches)


def _bias_matters(bias: ir.Value) -> bool:
    assert bias.const_value is not None, "lower after the weights are attached"
    return bool(np.any(bias.const_value.numpy()))


def _sizes(value: ir.Value) -> list[int]:
    """The shape, with -1 for free axes."""
    assert value.shape is not None
    return [size if isinstance(size, int) else -1 for size in value.shape]


class _Writer:
    """Writes nodes into ``graph``, before ``anchor`` or at the end; constants and weights go to ``home``."""

    def __init__(self, graph: ir.Graph, home: ir.Graph, prefix: str, anchor: ir.Node | None = None) -> None:
        self._graph, self._home, self._prefix, self._anchor = graph, home, prefix, anchor
        self._count = 0

    def branch(self, name: str) -> "_Writer":
        """A writer of a new subgraph; ``closed`` gives it."""
        name = f"{self._prefix}/{name}"
        return _Writer(ir.Graph([], [], nodes=[], name=name), self._home, name)

    def closed(self, output: ir.Value) -> ir.Graph:
        self._graph.outputs.append(output)
        return self._graph

    def add(self, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        return self.add_many(op_type, inputs, 1, domain, **attributes)[0]

    def add_many(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        made = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
        for value in made.outputs:
            self._count += 1
            value.name = f"{self._prefix}/{op_type.lower()}_{self._count}"
        made.name = str(made.outputs[0].name)
        if self._anchor is None:
            self._graph.append(made)
        else:
            self._graph.insert_before(self._anchor, made)
        return made.outputs

    def product(self, x: ir.Value, matrix: ir.Value, packs: Packs) -> ir.Value:
        """``x @ matrix.T``, of the rounded matrix where there is one."""
        pack = packs.get(str(matrix.name))
        if pack is None:
            return self.add("Gemm", [x, matrix], transB=1)
        values = [self.tensor(pack.values, f"{matrix.name}.q"), self.tensor(pack.scales, f"{matrix.name}.scale")]
        return self.add(
            "MatMulNBits",
            [x, *values],
            MICROSOFT,
            K=pack.columns,
            N=pack.scales.shape.numpy()[0],
            bits=pack.bits,
            block_size=pack.block,
            accuracy_level=_ACCURACY_LEVEL,
        )

    def silu(self, x: ir.Value) -> ir.Value:
        # QuickGelu with alpha 1 is x * sigmoid(x); SiLU as such has no CPU kernel.
        return self.add("QuickGelu", [x], MICROSOFT, alpha=1.0)

    def every_second(self, x: ir.Value, first: int) -> ir.Value:
        """Columns ``first``, ``first + 2``, ... of ``x (N, 2F)``."""
        to_end = np.iinfo(np.int64).max
        bounds = [self.integers([number]) for number in (first, to_end, 1, 2)]
        return self.add("Slice", [x, *bounds])

    def matrix_of(self, stack: ir.Value, index: int) -> ir.Value:
        """One matrix of a stack of weights, as a piece of the same file."""
        cast = stack.producer()
        stored = stack if cast is None else cast.inputs[0]
        assert stored is not None
        whole = stored.const_value
        assert isinstance(whole, ir.ExternalTensor)
        assert whole.offset is not None
        assert whole.length is not None
        count, *shape = whole.shape.numpy()
        length = whole.length // count
        name = f"{stored.name}@{index}"
        tensor = ir.ExternalTensor(
            whole.location,
            whole.offset + index * length,
            length,
            whole.dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=whole.base_dir,
        )
        matrix = self.tensor(tensor, name)
        return matrix if cast is None else self.add("Cast", [matrix], to=ir.DataType.FLOAT)

    def tensor(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """``tensor`` as an initializer of the main graph, one for each name."""
        if name not in self._home.initializers:
            shape = ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
            self._home.register_initializer(value)
        return self._home.initializers[name]

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        return self.tensor(ir.tensor(array, name=f"const/{name}"), f"const/{name}")

    def integer(self, number: int) -> ir.Value:
        return self.constant(f"int_{number}", np.array(number))

    def integers(self, numbers: list[int]) -> ir.Value:
        return self.constant("ints_" + "_".join(map(str, numbers)), np.array(numbers))

    def number(self, number: float) -> ir.Value:
        return self.constant(f"float_{number}", np.array(number, np.float32))
