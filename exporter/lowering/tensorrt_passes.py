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

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from mythos_edge.exporter.weights import is_unwritten, unwritten
from mythos_edge.model.errors import BuildError
from mythos_edge.plugins import ops
from mythos_edge.plugins.kernels.variants import GROUP

CODES = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN}
# TensorRT takes these for int4; the first that divides a row is used.
_INT4_BLOCKS = (64, 32)
# TensorScatter, with which TensorRT updates a cache in place, is of this opset.
_NATIVE_OPSET = 24
_ATTENTIONS = (ops.LATENT_ATTENTION.name, ops.GROUPED_QUERY_ATTENTION.name)


def for_engine(model: ir.Model, positions: int) -> None:
    """See above; rows beyond the last of ``positions`` in the rope tables get the last."""
    graph = model.graph
    _Writer(graph).positions(positions)
    first = next(value for value in graph.inputs if value.name == "first")
    graph.inputs.remove(first)
    ir.convenience.replace_all_uses_with(first, _Writer(graph).constant("no_padding", [0]))
    for node in list(graph):
        if node.op_type == "Reshape":
            _fix_shape(graph, node)
        if _changes_nothing(node):
            _replace(graph, node, node.inputs[0])
        elif node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].is_initializer():
            _narrow_weight(graph, node)
    tidy(model)


def part_shared_experts(model: ir.Model) -> None:
    """See above."""
    for node in [node for node in model.graph if node.op_type == ops.SPARSE_MOE.name]:
        inputs = dict(zip(ops.SPARSE_MOE.inputs + ops.SPARSE_MOE.optional, node.inputs, strict=False))
        if "shared_down" not in inputs:
            continue
        output = node.outputs[0]
        routed = _Writer(model.graph, node, f"{output.name}.shared")
        attributes = {name: node.attributes[name].value for name in node.attributes}
        alone = routed.op(node.op_type, node.inputs[: len(ops.SPARSE_MOE.inputs)], domain=node.domain, **attributes)
        both = routed.op("Gemm", [inputs["x"], inputs["shared_gate_up"]], transB=1)
        gate, up = routed.many("Split", [both], 2, axis=-1, num_outputs=2)
        hidden = routed.op("Mul", [routed.op("Mul", [gate, routed.op("Sigmoid", [gate])]), up])
        shared = routed.op("Gemm", [hidden, inputs["shared_down"]], transB=1)
        for value in (alone, both, gate, up, hidden, shared):
            value.type = output.type
        alone.shape = output.shape
        _replace(model.graph, node, routed.op("Add", [alone, shared]))


def round_weights(model: ir.Model, weights: str, names: Collection[str]) -> None:
    """See above; only matrices in ``names`` are rounded, to ``weights``: int8, int4 or fp8.

    int8 and fp8 have one scale a row, int4 one for each block of a row. Experts are padded with zeros to what their
    kernels take; the matrix of a plain product whose rows do not divide into blocks of int4 is int8. Raises BuildError
    when the experts' input does not divide.
    """
    graph = model.graph
    made: dict[str, ir.Value] = {}
    for node in list(graph):
        if node.op_type == ops.SPARSE_MOE.name:
            _round_experts(graph, node, weights)
        elif node.op_type == "Gemm" and (matrix := node.inputs[1]) is not None and matrix.name in names:
            name = str(matrix.name)
            if name not in made:
                made[name] = _dequantized(graph, node, matrix, weights)
            node.replace_input_with(1, made[name])
    tidy(model)


def attend_natively(model: ir.Model, capacity: int) -> None:
    """See above; caches are ``(1, 1, capacity, W)``: TensorRT wants four axes and a fixed number of columns.

    The outputs ``rows`` become ``past_next``, the cache itself with the new rows in it.
    """
    graph = model.graph
    graph.opset_imports[""] = _NATIVE_OPSET
    for node in [node for node in graph if node.op_type in _ATTENTIONS]:
        q, rows, past = node.inputs[:3]
        assert q is not None
        assert rows is not None
        assert past is not None
        assert past.shape is not None
        past.shape = ir.Shape([1, 1, capacity, past.shape[2]])
        writer = _Writer(graph, node, str(node.outputs[0].name))
        cache = writer.scattered(past, rows)
        _replace(graph, node, writer.attended(node, q, cache, capacity))
        index = next(index for index, value in enumerate(graph.outputs) if value is rows)
        graph.outputs[index] = cache
        rows.name, cache.name = f"{past.name}_rows", f"{past.name}_next"
    tidy(model)


def rotate_by_hand(model: ir.Model) -> None:
    """See above: a graph with a Loop and a RotaryEmbedding anywhere in it fails to build."""
    for node in [node for node in model.graph if node.op_type == "RotaryEmbedding"]:
        x, cos, sin, positions = node.inputs
        assert x is not None
        heads, size = node.attributes["num_heads"].as_int(), _shape(x)[-1]
        assert node.attributes["interleaved"].as_int() == 1
        writer = _Writer(model.graph, node, str(node.outputs[0].name))
        over = writer.constant("over_heads_and_pair", [2, 4])
        c, s = (writer.op("Unsqueeze", [writer.op("Gather", [table, positions]), over]) for table in (cos, sin))
        pairs = writer.constant(f"pairs_{size}", [0, 0, heads, size // heads // 2, 2])
        even, odd = writer.many("Split", [writer.op("Reshape", [x, pairs])], 2, axis=-1, num_outputs=2)
        turned = [
            writer.op("Sub", [writer.op("Mul", [even, c]), writer.op("Mul", [odd, s])]),
            writer.op("Add", [writer.op("Mul", [even, s]), writer.op("Mul", [odd, c])]),
        ]
        joined = writer.op("Concat", turned, axis=-1)
        _replace(model.graph, node, writer.op("Reshape", [joined, writer.constant(f"rows_{size}", [0, 0, size])]))
    tidy(model)


def use_body(model: ir.Model, op: str) -> None:
    """See above: TensorRT looks a plugin up by this attribute."""
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
    had, wanted = _sizes(data), _sizes(output)
    if not had:
        return
    if not wanted:
        assert len(had) == 1, output.name
        _replace(graph, node, data)
        return
    writer, front = _Writer(graph, node, str(output.name)), _Writer(graph).constant("front", [0])
    if _rows_axis(had) < _rows_axis(wanted):
        data, had = writer.op("Unsqueeze", [data, front]), [1, *had]
    rest = wanted[_rows_axis(wanted) + 1 :]
    if had[_rows_axis(had) + 1 :] != rest:
        shape = [0] * (_rows_axis(had) + 1) + [int(size) for size in rest]
        data = writer.op("Reshape", [data, writer.constant("shape_" + "_".join(map(str, shape)), shape)])
    if _rows_axis(had) > _rows_axis(wanted):
        data = writer.op("Squeeze", [data, front])
    _replace(graph, node, data)


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
    if not is_unwritten(weight):
        return
    assert all(user.op_type == "Cast" for user, _ in weight.uses()), weight.name
    dtype = ir.DataType(node.attributes["to"].as_int())
    weight.type, weight.const_value = ir.TensorType(dtype), unwritten(str(weight.name), dtype, _shape(weight))
    _replace(graph, node, weight)


def _round_experts(graph: ir.Graph, node: ir.Node, weights: str) -> None:
    x, router, bias, fc1, fc2 = node.inputs
    assert fc1 is not None
    assert fc2 is not None
    (experts, double, dim), hidden = _shape(fc1), _shape(fc2)[-1]
    assert double == 2 * hidden
    # The kernels take whole groups. An expert's hidden size may be padded with zeros, which add nothing; its input not.
    if dim % GROUP:
        raise BuildError(f"{fc1.name}: rows of {dim} values are no multiple of {GROUP}: build with --weights none")
    padded = hidden + -hidden % GROUP
    inputs = [x, router, bias]
    for stack, shape in ((fc1, (experts, 2 * padded, dim)), (fc2, (experts, dim, padded))):
        block = _block(shape[-1], weights)
        assert block is not None
        inputs += _codes_and_scale(graph, stack, weights, shape, (shape[-1] // block,))
    writer = _Writer(graph, node, str(node.outputs[0].name))
    attributes = {name: node.attributes[name].value for name in node.attributes}
    _replace(graph, node, writer.op(ops.QUANTIZED_SPARSE_MOE.name, inputs, domain=ops.DOMAIN, **attributes))


def _dequantized(graph: ir.Graph, node: ir.Node, matrix: ir.Value, weights: str) -> ir.Value:
    shape = _shape(matrix)
    block, kept = _block(shape[-1], weights), weights
    if block is None:
        block, kept = shape[-1], "int8"
    blocked = kept == "int4"
    inputs = _codes_and_scale(graph, matrix, kept, shape, (shape[-1] // block,) if blocked else ())
    writer = _Writer(graph, node, str(matrix.name))
    if blocked:
        value = writer.op("DequantizeLinear", inputs, axis=1, block_size=block)
    else:
        value = writer.op("DequantizeLinear", inputs, axis=0)
    value.type, value.shape = matrix.type, matrix.shape
    return value


def _block(row: int, weights: str) -> int | None:
    """Values of a row that share a scale; None when they do not divide."""
    return row if weights != "int4" else next((block for block in _INT4_BLOCKS if row % block == 0), None)


def _codes_and_scale(
    graph: ir.Graph, matrix: ir.Value, weights: str, shape: tuple[int, ...], blocks: tuple[int, ...]
) -> list[ir.Value]:
    assert matrix.dtype is not None
    made = []
    for part, dtype, size in (("codes", CODES[weights], shape), ("scale", matrix.dtype, (*shape[:-1], *blocks))):
        name = f"{matrix.name}.{part}"
        if name not in graph.initializers:
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(size))
            value.const_value = unwritten(name, dtype, size)
            graph.register_initializer(value)
        made.append(graph.initializers[name])
    return made


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in value.shape if isinstance(size, int))


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value | None) -> None:
    """``value`` in the place of what the node makes, under its name if it is an output of the graph."""
    old = node.outputs[0]
    assert value is not None
    if value.producer() is not None and value.shape is None:
        value.type, value.shape = old.type, old.shape
    is_output = any(output is old for output in graph.outputs)
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if is_output:
        value.name = old.name


class _Writer:
    """Nodes and constants added to a graph before ``node``, or at its start; their names start with ``name``."""

    def __init__(self, graph: ir.Graph, node: ir.Node | None = None, name: str = "engine") -> None:
        self._graph, self._node, self._name, self._count = graph, node, name, 0

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        return self.many(op_type, inputs, 1, domain, **attributes)[0]

    def many(
        self, op_type: str, inputs: Sequence[ir.Value | None], outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
        self._count += 1
        node.name = f"{self._name}/{op_type.lower()}_{self._count}"
        for index, value in enumerate(node.outputs):
            value.name = node.name if outputs == 1 else f"{node.name}_{index}"
        self._graph.insert_before(self._node or self._graph[0], node)
        return node.outputs

    def constant(self, name: str, numbers: object) -> ir.Value:
        if name not in self._graph.initializers:
            tensor = ir.tensor(np.asarray(numbers, np.int64), name=name)
            shape = ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
            self._graph.register_initializer(value)
        return self._graph.initializers[name]

    def positions(self, count: int) -> None:
        """Rotates every row by its position, ``length`` and on, but no further than the tables reach."""
        rotations = [node for node in self._graph if node.op_type == "RotaryEmbedding"]
        length = next(value for value in self._graph.inputs if value.name == "length")
        self._node = self._graph[0]
        axis = self.constant("front", [0])
        clipped = self.op(
            "Clip", [self._columns(length), self.constant("zero", 0), self.constant("last_position", count - 1)]
        )
        positions = self.op("Unsqueeze", [clipped, axis])
        positions.type, positions.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1, "chunk"])
        for node in rotations:
            node.replace_input_with(3, positions)

    def scattered(self, past: ir.Value, rows: ir.Value) -> ir.Value:
        """The cache with ``rows`` in it from column ``length`` on."""
        length = next(value for value in self._graph.inputs if value.name == "length")
        four = self.op("Unsqueeze", [rows, self.constant("second", [1])])
        start = self.op("Reshape", [length, self.constant("one_number", [1])])
        cache = self.op("TensorScatter", [past, four, start], axis=-2)
        cache.type, cache.shape = past.type, past.shape
        return cache

    def attended(self, node: ir.Node, q: ir.Value, cache: ir.Value, capacity: int) -> ir.Value:
        """What an attention node makes, by the op that every head's keys and values are given to."""
        length = next(value for value in self._graph.inputs if value.name == "length")
        own = self.op("Unsqueeze", [self._columns(length), self.constant("second", [1])])
        seen = self.op("LessOrEqual", [self.constant("columns", np.arange(capacity)[None, None, None]), own])
        keys = values = cache
        if node.op_type == ops.GROUPED_QUERY_ATTENTION.name:
            heads = [1, capacity, node.attributes["kv_heads"].as_int(), _shape(q)[-1]]
            split = self.many("Split", [cache], 2, axis=-1, num_outputs=2)
            shape = self.constant("cache_by_head", heads)
            keys, values = (
                self.op("Transpose", [self.op("Reshape", [half, shape])], perm=[0, 2, 1, 3]) for half in split
            )
        scale = node.attributes["scale"].as_float()
        rows = self.op("Transpose", [q], perm=[0, 2, 1, 3])
        mixed = self.op("Attention", [rows, keys, values, seen], scale=scale)
        mixed.type = q.type
        if node.op_type == ops.LATENT_ATTENTION.name:
            end = self.constant("value_end", [node.attributes["value_dim"].as_int()])
            mixed = self.op("Slice", [mixed, self.constant("front", [0]), end, self.constant("last_axis", [3])])
        return self.op("Transpose", [mixed], perm=[0, 2, 1, 3])

    def _columns(self, length: ir.Value) -> ir.Value:
        """The column of each new row (chunk)."""
        like = self._rows_given()
        count = self.op("Squeeze", [self.op("Shape", [like], start=1, end=2)])
        return self.op("Add", [self.op("Range", [self.constant("zero", 0), count, self.constant("one", 1)]), length])

    def _rows_given(self) -> ir.Value:
        """An input with a value for each new row; of a step not the state, which a Loop's body carries."""
        inputs = {str(value.name): value for value in self._graph.inputs}
        return next(inputs[name] for name in ("input_ids", "e", "out") if name in inputs)
