"""Attention of one sequence as products on ONNX Runtime's kernels, in float32: both kinds for CUDA, grouped for CPUs.

On a CPU keys and values are multiplied as they lie in the cache, (columns, heads, width), which FusedMatMul takes as a
batch of heads; elsewhere they are turned before. ``halved_caches`` spares them parting a cache.
A sequence begins with an empty cache. A product over none of its rows is an error of the CUDA library under some
versions, so that case has a branch of its own, in which nothing is empty; the host takes it without waiting.
"""

from collections.abc import Sequence
from typing import NamedTuple

import onnx_ir as ir

from mythos_edge.exporter.graph_writer import GraphWriter, shape_of
from mythos_edge.exporter.lowering.ort_kernels import HIDDEN_SCORE, MICROSOFT
from mythos_edge.plugins.torch_ops import extra_of

# The results of branches: (1, groups, rows, columns).
_BRANCHES = [1, None, None, None]


class _Rows(NamedTuple):
    """``keys`` and ``values``, each (1, groups, columns, width); as they lie, (columns, 1, groups, width)."""

    keys: ir.Value
    values: ir.Value
    as_they_lie: bool = False


def latent_attention(writer: GraphWriter, node: ir.Node) -> ir.Value:
    """The output (1, S, H, value_dim) of a LatentAttention node: all heads are rows of one group."""
    q, rows, past = node.inputs[:3]
    assert q is not None
    heads, width = shape_of(q)[2:]
    value_dim, scale = node.attributes["value_dim"].as_int(), node.attributes["scale"].as_float()
    q_rows = writer.add("Reshape", [q, writer.integers([1, 1, -1, width])])
    group = writer.integers([1])
    new, old = (_Rows(whole, whole) for whole in (writer.add("Unsqueeze", [value, group]) for value in (rows, past)))
    mixed = _attended(writer, q_rows, new, old, heads, scale)
    # The values are the leading channels of the rows; a product over all of them copies no cache.
    bounds = [writer.integers([number]) for number in (0, value_dim, 3)]
    return writer.add("Reshape", [writer.add("Slice", [mixed, *bounds]), writer.integers([1, -1, heads, value_dim])])


def grouped_query_attention(writer: GraphWriter, node: ir.Node, *, as_they_lie: bool = False) -> ir.Value:
    """The output (1, S, H, head_dim) of a GroupedQueryAttention node: the heads of a group are rows of one product."""
    q, rows, past = node.inputs[:3]
    assert q is not None
    heads, width = shape_of(q)[2:]
    groups, scale = node.attributes["kv_heads"].as_int(), node.attributes["scale"].as_float()
    share, window_size = heads // groups, extra_of(node)
    by_group = writer.add("Reshape", [q, writer.integers([1, -1, groups, share, width])])
    turned = writer.add("Transpose", [by_group], perm=[0, 2, 1, 3, 4])
    q_rows = writer.add("Reshape", [turned, writer.integers([1, groups, -1, width])])
    # With a window the runtime feeds no more columns than the first row sees.
    new_halves, old_halves = (writer.add_many("Split", [value], 2, axis=2, num_outputs=2) for value in (rows, past))
    new, old = (_keys_and_values(writer, halves, groups, width, as_they_lie) for halves in (new_halves, old_halves))
    mixed = _attended(writer, q_rows, new, old, share, scale, window_size)
    by_row = writer.add("Reshape", [mixed, writer.integers([1, groups, -1, share, width])])
    back = writer.add("Transpose", [by_row], perm=[0, 2, 1, 3, 4])
    return writer.add("Reshape", [back, writer.integers([1, -1, heads, width])])


def _keys_and_values(
    writer: GraphWriter, halves: Sequence[ir.Value], groups: int, width: int, as_they_lie: bool
) -> _Rows:
    if as_they_lie:
        shape = writer.integers([-1, 1, groups, width])
        keys, values = (writer.add("Reshape", [half, shape]) for half in halves)
        return _Rows(keys, values, True)
    # 0 keeps the number of columns, which may be 0 itself.
    shape = writer.integers([1, 0, groups, width])
    keys, values = (
        writer.add("Transpose", [writer.add("Reshape", [half, shape])], perm=[0, 2, 1, 3]) for half in halves
    )
    return _Rows(keys, values)


def _attended(
    writer: GraphWriter, q_rows: ir.Value, new: _Rows, old: _Rows, share: int, scale: float, window_size: int = 0
) -> ir.Value:
    """Values (1, groups, S * share, width) mixed for ``q_rows`` of the same shape; ``share`` of them are a position.

    Each sees ``window_size`` positions, its own included; all if that is 0.
    """
    new_scores = _causal(writer, _scores(writer, q_rows, new, scale), new, share, window_size)

    def with_cache(inside: GraphWriter) -> ir.Value:
        old_scores = _scores(inside, q_rows, old, scale)
        if window_size:
            query, columns = _positions(inside, old_scores, share)
            # The last cached column is the position before the first row.
            ends = inside.add("Add", [columns, inside.integer(window_size)])
            reached = inside.add("Greater", [inside.add("Sub", [ends, _columns(inside, old)]), query])
            old_scores = inside.add("Where", [reached, old_scores, inside.number(HIDDEN_SCORE)])
        weights = inside.add("Softmax", [inside.add("Concat", [old_scores, new_scores], axis=3)], axis=-1)
        counts = inside.add("Concat", [_columns(inside, old), _columns(inside, new)], axis=0)
        old_weights, new_weights = inside.add_many("Split", [weights, counts], 2, axis=3)
        return inside.add("Add", [_mixed(inside, old_weights, old), _mixed(inside, new_weights, new)])

    def without(inside: GraphWriter) -> ir.Value:
        return _mixed(inside, inside.add("Softmax", [new_scores], axis=-1), new)

    has_cache = writer.add("Greater", [_columns(writer, old), writer.integers([0])])
    return writer.either(has_cache, ("cached", with_cache), ("alone", without), _BRANCHES)


def _scores(writer: GraphWriter, q_rows: ir.Value, rows: _Rows, scale: float) -> ir.Value:
    turned = {"transBatchB": 1} if rows.as_they_lie else {}
    return writer.add("FusedMatMul", [q_rows, rows.keys], MICROSOFT, transB=1, alpha=scale, **turned)


def _mixed(writer: GraphWriter, weights: ir.Value, rows: _Rows) -> ir.Value:
    if rows.as_they_lie:
        return writer.add("FusedMatMul", [weights, rows.values], MICROSOFT, transBatchB=1)
    return writer.add("MatMul", [weights, rows.values])


def _columns(writer: GraphWriter, rows: _Rows) -> ir.Value:
    return writer.sizes(rows.keys, 0 if rows.as_they_lie else 2)


def _positions(writer: GraphWriter, scores: ir.Value, share: int) -> tuple[ir.Value, ir.Value]:
    """Which row each of the queries (S * share, 1) is of, and the columns (C,), counted from 0 each."""
    queries, columns = (writer.range_to(writer.sizes(scores, axis)) for axis in (2, 3))
    row = writer.add("Div", [queries, writer.integer(share)])
    return writer.add("Unsqueeze", [row, writer.integers([1])]), columns


def _causal(writer: GraphWriter, scores: ir.Value, new: _Rows, share: int, window_size: int) -> ir.Value:
    """``scores (1, groups, S * share, S)`` of new rows among each other, without those of columns that are not seen."""

    def masked(inside: GraphWriter) -> ir.Value:
        query, columns = _positions(inside, scores, share)
        seen = inside.add("LessOrEqual", [columns, query])
        if window_size:
            ends = inside.add("Add", [columns, inside.integer(window_size)])
            seen = inside.add("And", [seen, inside.add("Greater", [ends, query])])
        return inside.add("Where", [seen, scores, inside.number(HIDDEN_SCORE)])

    def whole(inside: GraphWriter) -> ir.Value:
        return inside.add("Identity", [scores])

    are_several = writer.add("Greater", [_columns(writer, new), writer.integers([1])])
    return writer.either(are_several, ("rows", masked), ("one_row", whole), _BRANCHES)
