"""Attention of one sequence as products on ONNX Runtime's kernels, in float32: both kinds for CUDA, grouped for CPUs.

On a CPU keys and values are multiplied as they lie in the cache, (columns, heads, width), which FusedMatMul takes as a
batch of heads; elsewhere they are turned before.
A sequence begins with an empty cache. A product over none of its rows is an error of the CUDA library under some
versions, so that case has a branch of its own, in which nothing is empty; the host takes it without waiting.
"""

from collections.abc import Sequence
from typing import NamedTuple

import onnx_ir as ir

from mythos_edge.exporter.graph_writer import GraphWriter, shape_of
from mythos_edge.exporter.lowering.ort_kernels import HIDDEN_SCORE, MICROSOFT
from mythos_edge.plugins.torch_ops import extra_of

# More columns than any cache has, which Slice takes for all of them.
_BEYOND = (1 << 31) - 1
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
    if not as_they_lie:
        return attention_of_parts(writer, node, as_they_lie=False)
    # What a decoded token reads is mostly its cache, so that it must not be copied; a chunk has more to compute.
    rows, past = node.inputs[1:3]
    cached = writer.add("Greater", [writer.sizes(past, 1), writer.integers([0])])
    one_row = writer.add("Equal", [writer.sizes(rows, 1), writer.integers([1])])
    whole = ("decoded", lambda inside: _decoded(inside, node))
    parts = ("chunk", lambda inside: attention_of_parts(inside, node, as_they_lie=True))
    return writer.either(writer.add("And", [cached, one_row]), whole, parts, [1, None, *shape_of(node.inputs[0])[2:]])


def _decoded(writer: GraphWriter, node: ir.Node) -> ir.Value:
    """The output for one row and cached ones, whose keys and values are as many groups again of one product.

    Queries for the values are 0, and so are weights of the keys: nothing of a slot is copied to part it.
    """
    q, rows, past = node.inputs[:3]
    heads, width = shape_of(q)[2:]
    groups, scale = node.attributes["kv_heads"].as_int(), node.attributes["scale"].as_float()
    share, window_size = heads // groups, extra_of(node)
    by_group = writer.add("Reshape", [q, writer.integers([1, groups, share, width])])
    queries = writer.add("Pad", [by_group, writer.integers([0, 0, 0, 0, 0, groups, 0, 0])])
    shape = writer.integers([-1, 1, 2 * groups, width])
    old, new = (_Rows(whole, whole, True) for whole in (writer.add("Reshape", [one, shape]) for one in (past, rows)))
    parts = [_scores(writer, queries, one, scale) for one in (old, new)]
    if window_size:
        # The last cached column is the position before the row.
        last = writer.add("Sub", [_columns(writer, old), writer.integers([window_size])])
        reached = writer.add("Greater", [writer.range_to(_columns(writer, old)), last])
        parts[0] = writer.add("Where", [reached, parts[0], writer.number(HIDDEN_SCORE)])
    scores = _groups(writer, writer.add("Concat", parts, axis=3), 0, groups)
    weights = writer.add("Pad", [writer.add("Softmax", [scores], axis=-1), writer.integers([0, groups, *[0] * 6])])
    counts = writer.add("Concat", [_columns(writer, old), writer.integers([1])], axis=0)
    of_old, of_new = writer.add_many("Split", [weights, counts], 2, axis=3)
    mixed = writer.add("Add", [_mixed(writer, of_old, old), _mixed(writer, of_new, new)])
    return writer.add("Reshape", [_groups(writer, mixed, groups, groups), writer.integers([1, 1, heads, width])])


def _groups(writer: GraphWriter, value: ir.Value, start: int, count: int) -> ir.Value:
    """Some of the groups of ``value (1, groups, ...)``."""
    return writer.add("Slice", [value, *(writer.integers([number]) for number in (start, start + count, 1))])


def attention_of_parts(writer: GraphWriter, node: ir.Node, *, as_they_lie: bool) -> ir.Value:
    """The output of any rows for a GroupedQueryAttention node, of keys and values apart, which copies the cache."""
    q, rows, past = node.inputs[:3]
    assert q is not None
    heads, width = shape_of(q)[2:]
    groups, scale = node.attributes["kv_heads"].as_int(), node.attributes["scale"].as_float()
    share, window_size = heads // groups, extra_of(node)
    by_group = writer.add("Reshape", [q, writer.integers([1, -1, groups, share, width])])
    turned = writer.add("Transpose", [by_group], perm=[0, 2, 1, 3, 4])
    q_rows = writer.add("Reshape", [turned, writer.integers([1, groups, -1, width])])
    size = groups * width
    new_halves = writer.add_many("Split", [rows], 2, axis=2, num_outputs=2)
    old_halves = (
        [_last_columns(writer, past, window_size - 1, start, start + size) for start in (0, size)]
        if window_size
        else writer.add_many("Split", [past], 2, axis=2, num_outputs=2)
    )
    new, old = (_keys_and_values(writer, halves, groups, width, as_they_lie) for halves in (new_halves, old_halves))
    mixed = _attended(writer, q_rows, new, old, share, scale, window_size)
    by_row = writer.add("Reshape", [mixed, writer.integers([1, groups, -1, share, width])])
    back = writer.add("Transpose", [by_row], perm=[0, 2, 1, 3, 4])
    return writer.add("Reshape", [back, writer.integers([1, -1, heads, width])])


def _last_columns(writer: GraphWriter, past: ir.Value | None, count: int, start: int, stop: int) -> ir.Value:
    """Channels ``start:stop`` of the last ``count`` cached columns, or of as many as there are.

    No row of a chunk looks further back than its first one does.
    """
    first = -count if count else _BEYOND
    bounds = ([first, start], [_BEYOND, stop], [1, 2])
    return writer.add("Slice", [past, *(writer.integers(list(bound)) for bound in bounds)])


def _keys_and_values(
    writer: GraphWriter, halves: Sequence[ir.Value], groups: int, width: int, as_they_lie: bool
) -> _Rows:
    if as_they_lie:
        shape = writer.add("Concat", [writer.sizes(halves[0], 1), writer.integers([1, groups, width])], axis=0)
        keys, values = (writer.add("Reshape", [half, shape], allowzero=1) for half in halves)
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
