"""Lowering for ONNX Runtime's CPU provider: the same graph with the runtime's own fastest kernels.

Works on a stage for one sequence (``sequences.for_one_sequence``) or for many. In float32 the weights are not
touched, so every lowered graph shares the bundle's weights file; rounded matrices come from ``packs``.

    mythos::LatentAttention            products over the cached rows as they lie, scores joined instead of caches
    mythos::GroupedQueryAttention      products over keys and values as they lie, each in a cache of its own
    mythos::SparseMoE                  one If an expert around plain products: com.microsoft::MoE leaves cores idle
    mythos::SparseMoE in blocks        com.microsoft::QMoE
    a product with a rounded matrix    com.microsoft::MatMulNBits; one scale a row: com.microsoft::QGemm of integers
    rows of a rounded embedding        com.microsoft::GatherBlockQuantized; one scale a row: Gather
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mythos_edge.exporter.graph_checks import graph_pass, has_no, one_sequence
from mythos_edge.exporter.graph_writer import GraphWriter, shape_of
from mythos_edge.exporter.lowering.halved_caches import halve_caches
from mythos_edge.exporter.lowering.joined_reshapes import join_reshapes
from mythos_edge.exporter.lowering.ort_attention import grouped_query_attention
from mythos_edge.exporter.lowering.ort_kernels import (
    FUSED_EXPERTS,
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
from mythos_edge.model.errors import BuildError
from mythos_edge.plugins import ops

Packs = Mapping[str, Pack]


@graph_pass(
    requires=[one_sequence],
    ensures=[has_no(ops.LATENT_ATTENTION.name, ops.GROUPED_QUERY_ATTENTION.name, ops.SPARSE_MOE.name)],
)
def lower_for_ort(model: ir.Model, packs: Packs | None = None) -> ir.Model:
    """A copy of ``model`` on ONNX Runtime's kernels; matrices named in ``packs`` are replaced by those.

    The selection bias must have its values: a bias of zeros needs no nodes.
    """
    return halve_caches(lowered_by(lambda graph: Lowering(graph, packs or {}), model))


def lowered_by(rules: Callable[[ir.Graph], "Lowering"], model: ir.Model) -> ir.Model:
    """A copy of ``model`` after the ``rules`` made for its graph, its Reshapes joined.

    Raises BuildError where the rules leave a matrix that they are to replace.
    """
    lowered = model.clone()
    lowering = rules(lowered.graph)
    for node in list(lowered.graph.all_nodes()):
        lowering.lower(node)
    join_reshapes(lowered)
    lowered.graph.opset_imports[MICROSOFT] = 1
    lowered.graph.name = f"{model.graph.name} for ONNX Runtime"
    RemoveUnusedNodesPass()(lowered)
    left = sorted(lowering.replaced & lowered.graph.initializers.keys())
    if left:
        raise BuildError(
            f"{left[0]}: {model.graph.name} reads it as it is stored, expected it rounded or narrowed: multiply flat "
            "rows (N, D) with it in the family's network, or say in its recipe that it is of no part and not narrow"
        )
    return lowered


Rule = Callable[[GraphWriter, ir.Node], ir.Value | None]


@dataclass(frozen=True)
class Experts:
    """Routed experts: rows ``x (N, D)``, ``logits (N, E)`` and the stacks of both matrices.

    With a selection ``bias`` experts are chosen by logits and bias, but weighed by logits.
    """

    x: ir.Value
    logits: ir.Value
    bias: ir.Value | None
    stacks: tuple[ir.Value, ir.Value]
    top_k: int

    def chosen(self, writer: GraphWriter) -> tuple[ir.Value, ir.Value]:
        """Logits (N, K) of the chosen experts of each row, and their indices."""
        if self.bias is None:
            scores, chosen = writer.add_many("TopK", [self.logits, writer.integers([self.top_k])], 2)
            return scores, chosen
        biased = writer.add("Add", [self.logits, self.bias])
        _, chosen = writer.add_many("TopK", [biased, writer.integers([self.top_k])], 2)
        return writer.add("GatherElements", [self.logits, chosen], axis=1), chosen


class Lowering:
    """Replaces nodes of ``graph`` one by one. ``rules`` says which and by what; None leaves a node as it is."""

    def __init__(self, graph: ir.Graph, packs: Packs) -> None:
        self._graph, self._packs = graph, packs
        # Products with the same rows share their rounding.
        self._rounded: dict[str, Rounded] = {}

    @property
    def replaced(self) -> Set[str]:
        """The matrices that no node reads afterwards as they are in the bundle."""
        return self._packs.keys()

    def rules(self) -> dict[tuple[str, str], Rule]:
        """The rule for each (domain, op)."""
        return {
            (ops.DOMAIN, ops.LATENT_ATTENTION.name): self._latent_attention,
            (ops.DOMAIN, ops.GROUPED_QUERY_ATTENTION.name): partial(grouped_query_attention, as_they_lie=True),
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
        value_dim, scale = node.attributes["value_dim"].as_int(), node.attributes["scale"].as_float()
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
        bounds = [writer.integers([number]) for number in (0, value_dim, 2)]
        return writer.add(
            "Reshape", [writer.add("Slice", [mixed, *bounds]), writer.integers([1, -1, heads, value_dim])]
        )

    def _causal(self, writer: GraphWriter, scores: ir.Value, rows: ir.Value | None, heads: int) -> ir.Value:
        """``scores (1, S, S * heads)`` of new rows among each other, without those of later rows for earlier ones."""

        def masked(several: GraphWriter) -> ir.Value:
            # A key's row against each query's row; decoding has one row and needs none of this.
            _, key_count, query_count = several.add_many(
                "Split", [several.add("Shape", [scores])], 3, axis=0, num_outputs=3
            )
            keys, queries = several.range_to(key_count), several.range_to(query_count)
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
        logits, bias = writer.add("Gemm", [x, inputs["router"]], transB=1), inputs["router_bias"]
        assert bias is None or bias.const_value is not None, "lower after the weights are attached"
        if bias is not None and bias.const_value is not None and not np.any(bias.const_value.numpy()):
            bias = None
        y = self._routed(writer, Experts(x, logits, bias, (fc1, fc2), node.attributes["top_k"].as_int()))
        gate_up, down = inputs.get("shared_gate_up"), inputs.get("shared_down")
        if gate_up is None or down is None:
            return y
        return writer.add("Add", [y, self._shared_expert(writer, x, gate_up, down)])

    def _shared_expert(self, writer: GraphWriter, x: ir.Value, gate_up: ir.Value, down: ir.Value) -> ir.Value:
        return self._multiplied(writer, swiglu(writer, self._multiplied(writer, x, gate_up)), down)

    def _routed(self, writer: GraphWriter, experts: Experts) -> ir.Value:
        pack = self._pack(experts.stacks[0])
        return (self._blocked if pack is not None and pack.block else self._dispatched)(writer, experts)

    def _blocked(self, writer: GraphWriter, experts: Experts) -> ir.Value:
        weights: list[ir.Value | None] = []
        for name in map(stored_name, experts.stacks):
            pack = self._packs[name]
            weights += [writer.tensor(pack.values, f"{name}.q"), writer.tensor(pack.scales, f"{name}.scale"), None]
        chosen_by = experts.logits
        if experts.bias is not None:
            chosen_by = writer.add("Add", [experts.logits, experts.bias])
        # Chosen by the biased logits, weighed by the unbiased scores, which the kernel renormalises.
        inputs = [experts.x, chosen_by, *weights, *[None] * 6, writer.add("Softmax", [experts.logits], axis=-1)]
        sizes = {"k": experts.top_k, "expert_weight_bits": pack.bits, "block_size": pack.block}
        return writer.add("QMoE", inputs, MICROSOFT, **FUSED_EXPERTS, **sizes)

    def _dispatched(self, writer: GraphWriter, experts: Experts) -> ir.Value:
        """Rows sorted by expert, an If for each expert that computes its rows when it has any, and back in order.

        Each product runs on all cores and reads its weights once, whatever the number of rows.
        """
        count, _, dim = shape_of(experts.stacks[0])
        scores, chosen = experts.chosen(writer)
        weights = writer.add("Softmax", [scores], axis=-1)
        flat = writer.add("Reshape", [chosen, writer.integers([-1])])
        pairs = writer.add("Shape", [flat])
        _, order = writer.add_many("TopK", [flat, pairs], 2, largest=0)
        _, place = writer.add_many("TopK", [order, pairs], 2, largest=0)
        row = writer.add("Div", [order, writer.integer(experts.top_k)])
        each = writer.constant(np.arange(count)[:, None])
        hits = writer.add("Cast", [writer.add("Equal", [each, flat])], to=ir.DataType.INT64)
        counts = writer.add("ReduceSum", [hits, writer.integers([1])], keepdims=0)
        rows = writer.add_many("Split", [row, counts], count, axis=0)
        used = writer.add("Cast", [counts], to=ir.DataType.BOOL)
        wanted = writer.add_many("Split", [used], count, axis=0, num_outputs=count)
        made = [self._one_expert(writer, experts, index, rows[index], wanted[index]) for index in range(count)]
        ordered = writer.add("Gather", [writer.add("Concat", made, axis=0), place])
        by_row = writer.add("Reshape", [ordered, writer.integers([-1, experts.top_k, dim])])
        weighed = writer.add("MatMul", [writer.add("Unsqueeze", [weights, writer.integers([1])]), by_row])
        return writer.add("Squeeze", [weighed, writer.integers([1])])

    def _one_expert(
        self, writer: GraphWriter, experts: Experts, index: int, rows: ir.Value, wanted: ir.Value
    ) -> ir.Value:
        """The rows of ``x`` that chose this expert through it; no rows when there are none."""
        x, dim = experts.x, shape_of(experts.x)[-1]

        def floats(inside: GraphWriter) -> ir.Value:
            gate_up, down = (matrix_of(writer, stack, index) for stack in experts.stacks)
            both = inside.add("Gemm", [inside.add("Gather", [x, rows]), gate_up], transB=1)
            return inside.add("Gemm", [interleaved_swiglu(inside, both), down], transB=1)

        def integers(inside: GraphWriter) -> ir.Value:
            gate_up, down = (self._piece(writer, stored_name(stack), index) for stack in experts.stacks)
            whole = self._rounded_rows(writer, x)
            taken = Rounded(inside.add("Gather", [whole.codes, rows]), inside.add("Gather", [whole.largest, rows]))
            hidden = swiglu(inside, integer_product(inside, taken, *gate_up))
            return integer_product(inside, rounded(inside, hidden), *down)

        def none(inside: GraphWriter) -> ir.Value:
            return inside.add("Identity", [inside.constant(np.zeros((0, dim), np.float32))])

        some = floats if self._pack(experts.stacks[0]) is None else integers
        return writer.either(wanted, (f"expert_{index}", some), (f"no_expert_{index}", none), [None, dim])

    def _piece(self, writer: GraphWriter, name: str, index: int) -> tuple[ir.Value, ir.Value]:
        """Values and scales of one matrix of a rounded stack."""
        pack = self._packs[name]
        values = writer.tensor(piece_of(pack.values, index), f"{name}.q@{index}")
        return values, writer.tensor(piece_of(pack.scales, index), f"{name}.scale@{index}")


def stored_name(matrix: ir.Value) -> str:
    """The name of a weight in the bundle; one that is stored narrow is used as its float32 copy."""
    return str(matrix.name).removesuffix(".fp32")
