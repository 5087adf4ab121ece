"""Graph passes that make of a traced stage the graph TensorRT gets; weights have names and shapes, but no values.

``for_engine``           requires a stage traced for one sequence; ensures no ``first`` among its inputs, ``positions``
                         from ``length``, constant shapes, every weight in the dtype it is used in
``part_shared_experts``  ensures that no SparseMoE has shared experts: they are plain products and a sum
``round_weights``        ensures codes and scales in place of the large matrices: QuantizedSparseMoE, and
                         DequantizeLinear before a product
``attend_natively``      requires ``for_engine``; ensures TensorScatter into a cache of fixed capacity and Attention
``rotate_by_hand``       ensures products and sums in place of RotaryEmbedding
``use_body``             ensures that TensorRT computes an op by its function body

All change the model they are given. A rounded weight ``x`` becomes the initializers ``x.codes`` and ``x.scale``.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from mythos_edge.exporter.graph_checks import (
    graph_pass,
    has_inputs,
    has_no,
    has_no_inputs,
    no_node,
    one_sequence,
)
from mythos_edge.exporter.graph_writer import GraphWriter, shape_of
from mythos_edge.exporter.weights import is_unwritten, unwritten
from mythos_edge.model.errors import BuildError
from mythos_edge.plugins import ops
from mythos_edge.plugins.kernels.variants import GROUP
from mythos_edge.plugins.torch_ops import extra_of

CODES = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN}
# TensorRT takes these for int4; the first that divides a row is used.
_INT4_BLOCKS = (64, 32)
# TensorScatter, with which TensorRT updates a cache in place, is of this opset.
_NATIVE_OPSET = 24
_ATTENTIONS = (ops.LATENT_ATTENTION.name, ops.GROUPED_QUERY_ATTENTION.name)


def _is_shared(node: ir.Node) -> bool:
    return node.op_type == ops.SPARSE_MOE.name and len(node.inputs) > len(ops.SPARSE_MOE.inputs)


def _is_cast_weight(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.inputs[0] is not None and is_unwritten(node.inputs[0])


_ROUTED_ALONE = no_node(_is_shared, "shared experts, which part_shared_experts parts")
_FIRST_OF_ALL = [has_inputs("length"), has_no_inputs("first"), one_sequence]


@graph_pass(
    requires=[has_inputs("length", "first"), one_sequence],
    ensures=[*_FIRST_OF_ALL, no_node(_is_cast_weight, "a weight that is only used cast")],
)
def for_engine(model: ir.Model, positions: int) -> None:
    """Takes padding out, gives rows positions from ``length``, and fixes shapes and the dtypes of weights.

    Rows beyond the last of ``positions`` in the rope tables get the last.
    """
    graph = model.graph
    start = GraphWriter(graph, "engine", anchor=graph[0])
    _rotate_by_position(start, positions)
    first = next(value for value in graph.inputs if value.name == "first")
    graph.inputs.remove(first)
    ir.convenience.replace_all_uses_with(first, start.integers([0]))
    for node in list(graph):
        if node.op_type == "Reshape":
            _fix_shape(graph, node)
        if _changes_nothing(node):
            GraphWriter.before(node, graph).replace(node.inputs[0])
        elif _is_cast_weight(node):
            _narrow_weight(graph, node)
    tidy(model)


@graph_pass(ensures=[_ROUTED_ALONE])
def part_shared_experts(model: ir.Model) -> None:
    """Makes the shared experts of SparseMoE plain products and a sum."""
    for node in filter(_is_shared, list(model.graph)):
        inputs = dict(zip(ops.SPARSE_MOE.inputs + ops.SPARSE_MOE.optional, node.inputs, strict=False))
        output, writer = node.outputs[0], GraphWriter.before(node, model.graph)
        alone = writer.add(node.op_type, node.inputs[: len(ops.SPARSE_MOE.inputs)], node.domain, **node.attributes)
        both = writer.add("Gemm", [inputs["x"], inputs["shared_gate_up"]], transB=1)
        gate, up = writer.add_many("Split", [both], 2, axis=-1, num_outputs=2)
        hidden = writer.add("Mul", [writer.add("Mul", [gate, writer.add("Sigmoid", [gate])]), up])
        shared = writer.add("Gemm", [hidden, inputs["shared_down"]], transB=1)
        for value in (alone, both, gate, up, hidden, shared):
            value.type = output.type
        alone.shape = output.shape
        writer.replace(writer.add("Add", [alone, shared]))


@graph_pass(requires=[_ROUTED_ALONE], ensures=[has_no(ops.SPARSE_MOE.name)])
def round_weights(model: ir.Model, weights: str, names: Collection[str]) -> None:
    """Puts codes and scales in the place of the matrices in ``names``, in ``weights``: int8, int4 or fp8.

    int8 and fp8 have one scale a row, int4 one for each block of a row. Experts are padded with zeros to what their
    kernels take; the matrix of a plain product whose rows do not divide into blocks of int4 is int8. Raises BuildError
    when the experts' input does not divide.
    """
    graph = model.graph
    made: dict[str, ir.Value] = {}
    for node in list(graph):
        if node.op_type == ops.SPARSE_MOE.name:
            _round_experts(GraphWriter.before(node, graph), node, weights)
        elif node.op_type == "Gemm" and (matrix := node.inputs[1]) is not None and matrix.name in names:
            name = str(matrix.name)
            if name not in made:
                made[name] = _dequantized(GraphWriter.before(node, graph), matrix, weights)
            node.replace_input_with(1, made[name])
    tidy(model)


@graph_pass(requires=_FIRST_OF_ALL, ensures=[has_no(*_ATTENTIONS)])
def attend_natively(model: ir.Model, capacity: int) -> None:
    """Makes attention TensorRT's own, over caches ``(1, 1, capacity, W)``.

    TensorRT wants four axes and a fixed number of columns. The outputs ``rows`` become ``past_next``, the cache itself
    with the new rows in it.
    """
    graph = model.graph
    graph.opset_imports[""] = _NATIVE_OPSET
    for node in [node for node in graph if node.op_type in _ATTENTIONS]:
        q, rows, past = node.inputs[:3]
        assert q is not None
        assert rows is not None
        assert past is not None
        past.shape = ir.Shape([1, 1, capacity, shape_of(past)[2]])
        writer = GraphWriter.before(node, graph)
        cache = _scattered(writer, past, rows)
        writer.replace(_attended(writer, node, q, cache, capacity))
        index = next(index for index, value in enumerate(graph.outputs) if value is rows)
        graph.outputs[index] = cache
        rows.name, cache.name = f"{past.name}_rows", f"{past.name}_next"
    tidy(model)


def _takes_halves(node: ir.Node) -> bool:
    return node.op_type == "RotaryEmbedding" and node.attributes["interleaved"].as_int() != 1


@graph_pass(
    requires=[no_node(_takes_halves, "pairs that do not stand side by side")], ensures=[has_no("RotaryEmbedding")]
)
def rotate_by_hand(model: ir.Model) -> None:
    """Makes rotations products and sums: a graph with a Loop and a RotaryEmbedding anywhere in it fails to build."""
    for node in [node for node in model.graph if node.op_type == "RotaryEmbedding"]:
        x, cos, sin, positions = node.inputs
        heads, size = node.attributes["num_heads"].as_int(), shape_of(x)[-1]
        writer = GraphWriter.before(node, model.graph)
        over = writer.integers([2, 4])
        c, s = (writer.add("Unsqueeze", [writer.add("Gather", [table, positions]), over]) for table in (cos, sin))
        pairs = writer.integers([0, 0, heads, size // heads // 2, 2])
        even, odd = writer.add_many("Split", [writer.add("Reshape", [x, pairs])], 2, axis=-1, num_outputs=2)
        turned = [
            writer.add("Sub", [writer.add("Mul", [even, c]), writer.add("Mul", [odd, s])]),
            writer.add("Add", [writer.add("Mul", [even, s]), writer.add("Mul", [odd, c])]),
        ]
        joined = writer.add("Concat", turned, axis=-1)
        writer.replace(writer.add("Reshape", [joined, writer.integers([0, 0, size])]))
    tidy(model)


def use_body(model: ir.Model, op: str) -> None:
    """Makes TensorRT compute an op by its function body: it looks a plugin up by the attribute that goes."""
    for node in model.graph.all_nodes():
        if node.domain == ops.DOMAIN and node.op_type == op:
            node.attributes.pop("plugin_namespace", None)


def plugin_nodes(model: ir.Model) -> int:
    """Nodes that have to become plugins, loop bodies included."""
    return sum("plugin_namespace" in node.attributes for node in model.graph.all_nodes())


def tidy(model: ir.Model) -> None:
    ir.passes.Sequential(passes.RemoveUnusedNodesPass(), passes.CommonSubexpressionEliminationPass())(model)


def _fix_shape(graph: ir.Graph, node: ir.Node) -> None:
    """Writes a Reshape so that no size has to be worked out: the rows of a chunk keep their axis, 0 copies its size.

    In a Loop's body TensorRT gives up after a few sizes of -1 that depend on one another. A batch of one before the
    rows comes and goes by Squeeze and Unsqueeze.
    """
    data, output = node.inputs[0], node.outputs[0]
    assert data is not None
    output.type = data.type
    writer = GraphWriter.before(node, graph)
    had, wanted = _sizes(data), _sizes(output)
    if not had:
        return
    if not wanted:
        assert len(had) == 1, output.name
        writer.replace(data)
        return
    front = writer.integers([0])
    if _rows_axis(had) < _rows_axis(wanted):
        data, had = writer.add("Unsqueeze", [data, front]), [1, *had]
    rest = wanted[_rows_axis(wanted) + 1 :]
    if had[_rows_axis(had) + 1 :] != rest:
        shape = [0] * (_rows_axis(had) + 1) + [int(size) for size in rest]
        data = writer.add("Reshape", [data, writer.integers(shape)])
    if _rows_axis(had) > _rows_axis(wanted):
        data = writer.add("Squeeze", [data, front])
    writer.replace(data)


def _sizes(value: ir.Value) -> list[int | str]:
    """Sizes of a value with rows, free ones as strings; none of other values."""
    if value.shape is None:
        return []
    sizes = [size if isinstance(size, int) else str(size) for size in value.shape]
    return sizes if any(isinstance(size, str) for size in sizes) else []


def _rows_axis(sizes: list[int | str]) -> int:
    return next(axis for axis, size in enumerate(sizes) if isinstance(size, str))


def _changes_nothing(node: ir.Node) -> bool:
    """Whether a node is a Slice of everything or a Cast to the type a value has."""
    if node.op_type == "Cast":
        return node.inputs[0] is not None and node.inputs[0].dtype == node.attributes["to"].as_int()
    if node.op_type != "Slice":
        return False
    bounds = [value.const_value.numpy() for value in node.inputs[1:] if value is not None and value.const_value]
    if len(bounds) != 4:
        return False
    starts, ends, _, steps = bounds
    return not starts.any() and bool((ends == np.iinfo(np.int64).max).all()) and bool((steps == 1).all())


def _narrow_weight(graph: ir.Graph, node: ir.Node) -> None:
    """A weight that is only used cast is stored cast."""
    weight = node.inputs[0]
    assert weight is not None
    assert all(user.op_type == "Cast" for user, _ in weight.uses()), weight.name
    dtype = ir.DataType(node.attributes["to"].as_int())
    weight.type, weight.const_value = ir.TensorType(dtype), unwritten(str(weight.name), dtype, shape_of(weight))
    GraphWriter.before(node, graph).replace(weight)


def _round_experts(writer: GraphWriter, node: ir.Node, weights: str) -> None:
    x, router, bias, fc1, fc2 = node.inputs
    assert fc1 is not None
    assert fc2 is not None
    (experts, double, dim), hidden = shape_of(fc1), shape_of(fc2)[-1]
    assert double == 2 * hidden
    # The kernels take whole groups. An expert's hidden size may be padded with zeros, which add nothing; its input not.
    if dim % GROUP:
        raise BuildError(f"{fc1.name}: rows of {dim} values are no multiple of {GROUP}: build with --weights none")
    padded = hidden + -hidden % GROUP
    inputs = [x, router, bias]
    for stack, shape in ((fc1, (experts, 2 * padded, dim)), (fc2, (experts, dim, padded))):
        block = _block(shape[-1], weights)
        assert block is not None
        inputs += _codes_and_scale(writer, stack, weights, shape, (shape[-1] // block,))
    writer.replace(writer.add(ops.QUANTIZED_SPARSE_MOE.name, inputs, ops.DOMAIN, **node.attributes))


def _dequantized(writer: GraphWriter, matrix: ir.Value, weights: str) -> ir.Value:
    shape = tuple(shape_of(matrix))
    block, kept = _block(shape[-1], weights), weights
    if block is None:
        block, kept = shape[-1], "int8"
    if kept == "int4":
        inputs = _codes_and_scale(writer, matrix, kept, shape, (shape[-1] // block,))
        value = writer.add("DequantizeLinear", inputs, axis=1, block_size=block)
    else:
        value = writer.add("DequantizeLinear", _codes_and_scale(writer, matrix, kept, shape, ()), axis=0)
    value.type, value.shape = matrix.type, matrix.shape
    return value


def _block(row: int, weights: str) -> int | None:
    """Values of a row that share a scale; None when they do not divide."""
    return row if weights != "int4" else next((block for block in _INT4_BLOCKS if row % block == 0), None)


def _codes_and_scale(
    writer: GraphWriter, matrix: ir.Value, weights: str, shape: tuple[int, ...], blocks: tuple[int, ...]
) -> list[ir.Value]:
    assert matrix.dtype is not None
    parts = (("codes", CODES[weights], shape), ("scale", matrix.dtype, (*shape[:-1], *blocks)))
    names = [(f"{matrix.name}.{part}", dtype, size) for part, dtype, size in parts]
    return [writer.tensor(unwritten(name, dtype, size), name) for name, dtype, size in names]


def _rotate_by_position(writer: GraphWriter, count: int) -> None:
    """Rotates every row by its position, ``length`` and on, but no further than the ``count`` rows of the tables."""
    last = writer.integer(count - 1)
    clipped = writer.add("Clip", [_columns(writer), writer.integer(0), last])
    positions = writer.add("Unsqueeze", [clipped, writer.integers([0])])
    positions.type, positions.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1, "chunk"])
    for node in writer.graph:
        if node.op_type == "RotaryEmbedding":
            node.replace_input_with(3, positions)


def _scattered(writer: GraphWriter, past: ir.Value, rows: ir.Value) -> ir.Value:
    """The cache with ``rows`` in it from column ``length`` on."""
    four = writer.add("Unsqueeze", [rows, writer.integers([1])])
    start = writer.add("Reshape", [_input(writer, "length"), writer.integers([1])])
    cache = writer.add("TensorScatter", [past, four, start], axis=-2)
    cache.type, cache.shape = past.type, past.shape
    return cache


def _attended(writer: GraphWriter, node: ir.Node, q: ir.Value, cache: ir.Value, capacity: int) -> ir.Value:
    """The result of an attention node, by the op that every head's keys and values are given to."""
    own = writer.add("Unsqueeze", [_columns(writer), writer.integers([1])])
    columns = writer.constant(np.arange(capacity)[None, None, None])
    seen = writer.add("LessOrEqual", [columns, own])
    if window_size := extra_of(node):
        ends = writer.add("Add", [columns, writer.integer(window_size)])
        seen = writer.add("And", [seen, writer.add("Greater", [ends, own])])
    keys = values = cache
    if node.op_type == ops.GROUPED_QUERY_ATTENTION.name:
        shape = writer.integers([1, capacity, node.attributes["kv_heads"].as_int(), shape_of(q)[-1]])
        halves = writer.add_many("Split", [cache], 2, axis=-1, num_outputs=2)
        keys, values = (
            writer.add("Transpose", [writer.add("Reshape", [half, shape])], perm=[0, 2, 1, 3]) for half in halves
        )
    rows = writer.add("Transpose", [q], perm=[0, 2, 1, 3])
    mixed = writer.add("Attention", [rows, keys, values, seen], scale=node.attributes["scale"].as_float())
    mixed.type = q.type
    if node.op_type == ops.LATENT_ATTENTION.name:
        bounds = [writer.integers([number]) for number in (0, node.attributes["value_dim"].as_int(), 3)]
        mixed = writer.add("Slice", [mixed, *bounds])
    return writer.add("Transpose", [mixed], perm=[0, 2, 1, 3])


def _columns(writer: GraphWriter) -> ir.Value:
    """The column of each new row (chunk)."""
    # An input with a value for each new row; of a step not the state, which a Loop's body carries.
    like = _input(writer, "input_ids", "e", "out")
    return writer.add("Add", [writer.range_to(writer.sizes(like, 1)), _input(writer, "length")])


def _input(writer: GraphWriter, *names: str) -> ir.Value:
    """The first of ``names`` that is an input."""
    inputs = {str(value.name): value for value in writer.graph.inputs}
    return next(inputs[name] for name in names if name in inputs)
