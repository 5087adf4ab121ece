"""Lowering for ONNX Runtime's CPU provider: the same graph with the runtime's own fastest kernels.

Works on a stage for one sequence (``sequences.for_one_sequence``) or for many. In float32 the weights are not
touched, so every lowered graph shares the bundle's weights file; rounded matrices come from ``packs``.

    mythos::LatentAttention            products over the cached rows as they lie, scores joined instead of caches
    mythos::GroupedQueryAttention      stays: ONNX Runtime inlines its body
    mythos::SparseMoE                  one If an expert around plain products: com.microsoft::MoE leaves cores idle
    mythos::SparseMoE in blocks        com.microsoft::QMoE
    a product with a rounded matrix    com.microsoft::MatMulNBits; one scale a row: com.microsoft::QGemm of integers
    rows of a rounded embedding        com.microsoft::GatherBlockQuantized; one scale a row: Gather
"""

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mythos_edge.exporter.graph_checks import graph_pass, has_no, one_sequence
from mythos_edge.exporter.graph_writer import GraphWriter, shape_of
from mythos_edge.exporter.lowering.ort_kernels import (
    HIDDEN_SCORE,
    MICROSOFT,
    Pack,
    Rounded,
    blocked_product,
    integer_product,
    interleaved_swiglu,
    matrix_of,
    piece_of,
    rounded,
    swiglu,
)
from mythos_edge.plugins import ops

Packs = Mapping[str, Pack]


@graph_pass(requires=[one_sequence], ensures=[has_no(ops.LATENT_ATTENTION.name, ops.SPARSE_MOE.name)])
def lower_for_ort(model: ir.Model, packs: Packs | None = None) -> ir.Model:
    """A copy of ``model`` on ONNX Runtime's kernels; matrices named in ``packs`` are replaced by those.

    The selection bias must have its values: a bias of zeros needs no nodes.
    """
    return lowered_by(lambda graph: Lowering(graph, packs or {}), model)


def lowered_by(rules: Callable[[ir.Graph], "Lowering"], model: ir.Model) -> ir.Model:
    """A copy of ``model`` after the ``rules`` made for its graph."""
    lowered = model.clone()
    lowering = rules(lowered.graph)
    for node in list(lowered.graph.all_nodes()):
        lowering.lower(node)
    lowered.graph.opset_imports[MICROSOFT] = 1
    lowered.graph.name = f"{model.graph.name} for ONNX Runtime"
    RemoveUnusedNodesPass()(lowered)
    return lowered


Rule = Callable[[GraphWriter, ir.Node], ir.Value | None]


class Lowering:
    """Replaces nodes of ``graph`` one by one. ``rules`` says which and by what; None leaves a node as it is."""

    def __init__(self, graph: ir.Graph, packs: Packs) -> None:
        self._graph, self._packs = graph, packs
        # Products with the same rows share their rounding.
        self._rounded: dict[str, Rounded] = {}

    def rules(self) -> dict[tuple[str, str], Rule]:
        """The rule for each (domain, op)."""
        return {
            (ops.DOMAIN, ops.LATENT_ATTENTION.name): self._latent_attention,
            (ops.DOMAIN, ops.SPARSE_MOE.name): self._sparse_moe,
            ("", "Gemm"): self._product,
            ("", "Gather"): self._embedding,
        }

    def lower(self, node: ir.Node) -> None:
        """Replaces ``node`` if there is a rule for it."""
        rule = self.rules().get((node.domain, node.op_type))
        if rule is None:
            return
        writer = GraphWriter.before(node, self._graph)
        made = rule(writer, node)
        if made is not None:
            writer.replace(made)

    def _pack(self, matrix: ir.Value) -> Pack | None:
        return self._packs.get(stored_name(matrix))

    def _product(self, writer: GraphWriter, node: ir.Node) -> ir.Value | None:
        x, matrix = node.inputs[:2]
        if matrix is None or self._pack(matrix) is None:
            return None
        assert x is not None
        return self._multiplied(writer, x, matrix)

    def _multiplied(self, writer: GraphWriter, x: ir.Value, matrix: ir.Value) -> ir.Value:
        """``x @ matrix.T``, of the rounded matrix where there is one."""
        name, pack = stored_name(matrix), self._pack(matrix)
        if pack is None:
            return writer.add("Gemm", [x, matrix], transB=1)
        if pack.block:
            return blocked_product(writer, x, name, pack)
        values, scales = writer.tensor(pack.values, f"{name}.q"), writer.tensor(pack.scales, f"{name}.scale")
        return integer_product(writer, self._rounded_rows(writer, x), values, scales)

    def _rounded_rows(self, writer: GraphWriter, x: ir.Value) -> Rounded:
        name = str(x.name)
        if name not in self._rounded:
            self._rounded[name] = rounded(writer, x)
        return self._rounded[name]

    def _embedding(self, writer: GraphWriter, node: ir.Node) -> ir.Value | None:
        table, rows = node.inputs
        pack = None if table is None else self._pack(table)
        if table is None or pack is None:
            return None
        name = stored_name(table)
        scales = writer.tensor(pack.scales, f"{name}.scale")
        if not pack.block:
            codes = writer.add("Gather", [writer.tensor(pack.values, f"{name}.q"), rows])
            own = writer.add("Unsqueeze", [writer.add("Gather", [scales, rows]), writer.integers([-1])])
            return writer.add("Mul", [writer.add("Cast", [codes], to=ir.DataType.FLOAT), own])
        # The head's rounded matrix, seen as rows of packed values.
        height = pack.scales.shape.numpy()[0]
        flat = writer.tensor(pack.values, f"{name}.q")
        packed = writer.add("Reshape", [flat, writer.integers([height, -1])])
        whole = writer.add(
            "GatherBlockQuantized",
            [packed, rows, scales],
            MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            block_size=pack.block,
            bits=pack.bits,
        )
        if pack.columns % pack.block == 0:
            return whole
        return writer.add("Slice", [whole, *(writer.integers([number]) for number in (0, pack.columns, -1))])

    def _latent_attention(self, writer: GraphWriter, node: ir.Node) -> ir.Value:
        q, rows, past = node.inputs[:3]
        assert q is not None
        heads, width = shape_of(q)[2:]
        scale = node.attributes["scale"].as_float()
        flat = writer.add("Reshape", [q, writer.integers([1, -1, width])])
        # The cache stands left, which is the faster order for few rows: scores (1, columns, rows * heads).
        past_scores = writer.add("FusedMatMul", [past, flat], MICROSOFT, transB=1, alpha=scale)
        new_scores = writer.add("FusedMatMul", [rows, flat], MICROSOFT, transB=1, alpha=scale)
        joined = writer.add("Concat", [past_scores, self._causal(writer, new_scores, rows, heads)], axis=1)
        weights = writer.add("Softmax", [writer.add("Transpose", [joined], perm=[0, 2, 1])], axis=-1)
        sizes = [writer.sizes(value, 1) for value in (past, rows)]
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

    def _causal(self, writer: GraphWriter, scores: ir.Value, rows: ir.Value | None, heads: int) -> ir.Value:
        """``scores (1, S, S * heads)`` of new rows among each other, without those of later rows for earlier ones."""

        def masked(several: GraphWriter) -> ir.Value:
            # A key's row against each query's row; decoding has one row and needs none of this.
            _, key_count, query_count = several.add_many(
                "Split", [several.add("Shape", [scores])], 3, axis=0, num_outputs=3
            )
            keys, queries = (
                several.add("Range", [several.integer(0), several.add("Squeeze", [count]), several.integer(1)])
                for count in (key_count, query_count)
            )
            key = several.add("Unsqueeze", [keys, several.integers([1])])
            seen = several.add("LessOrEqual", [key, several.add("Div", [queries, several.integer(heads)])])
            return several.add("Where", [seen, scores, several.number(HIDDEN_SCORE)])

        are_several = writer.add("Greater", [writer.sizes(rows, 1), writer.integers([1])])
        whole = ("one_row", lambda one: one.add("Identity", [scores]))
        return writer.either(are_several, ("rows", masked), whole, [1, None, None])

    def _sparse_moe(self, writer: GraphWriter, node: ir.Node) -> ir.Value:
        inputs = dict(zip(ops.SPARSE_MOE.inputs + ops.SPARSE_MOE.optional, node.inputs, strict=False))
        x, fc1, fc2 = inputs["x"], inputs["fc1"], inputs["fc2"]
        assert x is not None
        assert fc1 is not None
        assert fc2 is not None
        top_k = node.attributes["top_k"].as_int()
        logits = writer.add("Gemm", [x, inputs["router"]], transB=1)
        y = self._routed_experts(writer, x, (logits, inputs["router_bias"]), (fc1, fc2), top_k)
        gate_up, down = inputs.get("shared_gate_up"), inputs.get("shared_down")
        if gate_up is None or down is None:
            return y
        return writer.add("Add", [y, self._shared_expert(writer, x, gate_up, down)])

    def _routed_experts(
        self,
        writer: GraphWriter,
        x: ir.Value,
        router: tuple[ir.Value, ir.Value | None],
        stacks: tuple[ir.Value, ir.Value],
        top_k: int,
    ) -> ir.Value:
        """``router`` is the logits and the bias by which experts are chosen but not weighed."""
        logits, bias = router
        chosen_by = logits
        if bias is not None and bias_matters(bias):
            chosen_by = writer.add("Add", [logits, bias])
        pack = self._pack(stacks[0])
        if pack is not None and pack.block:
            fc1, fc2 = stacks
            return self._blocked_experts(writer, x, (logits, chosen_by), (stored_name(fc1), stored_name(fc2)), top_k)
        return self._dispatched_experts(writer, x, (logits, chosen_by), stacks, top_k)

    def _shared_expert(self, writer: GraphWriter, x: ir.Value, gate_up: ir.Value, down: ir.Value) -> ir.Value:
        return self._multiplied(writer, swiglu(writer, self._multiplied(writer, x, gate_up)), down)

    def _blocked_experts(
        self,
        writer: GraphWriter,
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
        writer: GraphWriter,
        x: ir.Value,
        routing: tuple[ir.Value, ir.Value],
        stacks: tuple[ir.Value, ir.Value],
        top_k: int,
    ) -> ir.Value:
        """Rows sorted by expert, an If for each expert that computes its rows when it has any, and back in order.

        Each product runs on all cores and reads its weights once, whatever the number of rows.
        """
        logits, chosen_by = routing
        experts, _, dim = shape_of(stacks[0])
        scores, chosen = writer.add_many("TopK", [chosen_by, writer.integers([top_k])], 2)
        if chosen_by is not logits:
            scores = writer.add("GatherElements", [logits, chosen], axis=1)
        weights = writer.add("Softmax", [scores], axis=-1)
        flat = writer.add("Reshape", [chosen, writer.integers([-1])])
        count = writer.add("Shape", [flat])
        _, order = writer.add_many("TopK", [flat, count], 2, largest=0)
        _, place = writer.add_many("TopK", [order, count], 2, largest=0)
        row = writer.add("Div", [order, writer.integer(top_k)])
        each = writer.constant(np.arange(experts)[:, None])
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
        writer: GraphWriter,
        x: ir.Value,
        rows: ir.Value,
        wanted: ir.Value,
        stacks: tuple[ir.Value, ir.Value],
        expert: int,
    ) -> ir.Value:
        """The rows of ``x`` that chose this expert through it; no rows when there are none."""
        dim = shape_of(x)[-1]

        def some(inside: GraphWriter) -> ir.Value:
            if self._pack(stacks[0]) is not None:
                return self._expert_in_integers(writer, inside, x, rows, stacks, expert)
            gate_up, down = (matrix_of(writer, stack, expert) for stack in stacks)
            both = inside.add("Gemm", [inside.add("Gather", [x, rows]), gate_up], transB=1)
            return inside.add("Gemm", [interleaved_swiglu(inside, both), down], transB=1)

        def none(inside: GraphWriter) -> ir.Value:
            return inside.add("Identity", [inside.constant(np.zeros((0, dim), np.float32))])

        return writer.either(wanted, (f"expert_{expert}", some), (f"no_expert_{expert}", none), [None, dim])

    def _expert_in_integers(
        self,
        writer: GraphWriter,
        inside: GraphWriter,
        x: ir.Value,
        rows: ir.Value,
        stacks: tuple[ir.Value, ir.Value],
        expert: int,
    ) -> ir.Value:
        matrices = []
        for stack in stacks:
            pack = self._packs[stored_name(stack)]
            parts = ((pack.values, "q"), (pack.scales, "scale"))
            matrices.append(
                [writer.tensor(piece_of(part, expert), f"{stored_name(stack)}.{end}@{expert}") for part, end in parts]
            )
        whole = self._rounded_rows(writer, x)
        taken = Rounded(inside.add("Gather", [whole.codes, rows]), inside.add("Gather", [whole.scales, rows]))
        hidden = swiglu(inside, integer_product(inside, taken, *matrices[0]))
        return integer_product(inside, rounded(inside, hidden), *matrices[1])


def stored_name(matrix: ir.Value) -> str:
    """The name of a weight in the bundle; one that is stored narrow is used as its float32 copy."""
    return str(matrix.name).removesuffix(".fp32")


def bias_matters(bias: ir.Value) -> bool:
    """Whether any expert has a selection bias."""
    assert bias.const_value is not None, "lower after the weights are attached"
    return bool(np.any(bias.const_value.numpy()))
