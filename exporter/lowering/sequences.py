"""Graph passes on a traced stage that the lowerings for ONNX Runtime build on: whose rows a chunk holds.

``for_one_sequence``    requires a traced stage; ensures a batch of one, ``positions`` as an input, constant shapes
``for_many_sequences``  requires the former; ensures rows of up to ``jobs`` sequences side by side, each with its cache
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.optimizer import fold_constants

from mythos_edge.exporter.graph_checks import graph_pass, has_inputs, has_no_inputs, one_sequence
from mythos_edge.exporter.graph_writer import GraphWriter, shape_of
from mythos_edge.model.stages import CONTEXT
from mythos_edge.plugins import ops

_ATTENTIONS = (ops.LATENT_ATTENTION.name, ops.GROUPED_QUERY_ATTENTION.name)


@graph_pass(
    requires=[has_inputs("length", "first")],
    ensures=[has_inputs("positions"), has_no_inputs("length", "first"), one_sequence],
)
def for_one_sequence(model: ir.Model) -> ir.Model:
    """A copy for a batch of one without padding, whose every cached row is filled.

    ``length`` and ``first`` are replaced by ``positions (1, chunk)``, the position of each new row.
    """
    made = model.clone()
    graph = made.graph
    _fix_batch(graph)
    _free_contexts(graph)
    positions = ir.Value(name="positions", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1, "chunk"]))
    for node in list(graph):
        if node.op_type == "RotaryEmbedding":
            node.replace_input_with(3, positions)
        elif node.domain == ops.DOMAIN and node.op_type in _ATTENTIONS:
            # What the portable body would work out from length and first is known here: all columns are visible.
            for index, value in enumerate(_window(GraphWriter.before(node, graph), node.inputs[2]), 3):
                node.replace_input_with(index, value)
    unused = [value for value in graph.inputs if value.name in ("length", "first")]
    kept = [value for value in graph.inputs if value not in unused]
    _fold(made)
    graph.inputs.clear()
    graph.inputs.extend([*kept, positions])
    assert not any(value.uses() for value in unused), "length or first is needed after all"
    return made


@graph_pass(
    requires=[has_inputs("positions"), has_no_inputs("length", "first", "row_counts"), one_sequence],
    ensures=[has_inputs("positions", "row_counts")],
)
def for_many_sequences(model: ir.Model, jobs: int) -> ir.Model:
    """A copy in which the chunk holds the rows of ``jobs`` sequences, one after the other.

    ``row_counts (jobs,)`` says how many rows each has (0 for none), ``positions`` is (chunk, 1); instead of ``past``
    there are ``past@0`` ..., each with a context of its own. Everything but attention works row by row and stays.
    """
    made = model.clone()
    graph = made.graph
    counts = ir.Value(name="row_counts", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([jobs]))
    graph.inputs.append(counts)
    for value in graph.inputs:
        if value.name == "positions":  # also where nothing reads them, as in families without a rotation
            value.shape = ir.Shape(["chunk", 1])
    used: list[ir.Value] = []
    for node in list(graph):
        if node.op_type in _ATTENTIONS:
            writer = GraphWriter.before(node, graph)
            q, rows = (_split_rows(writer, value, counts, jobs) for value in node.inputs[:2])
            # Of their shape, which the host knows where values are a GPU's; the first node says it for all.
            used = used or [writer.add("Greater", [writer.sizes(part, 1), writer.integers([0])]) for part in rows]
            _attend_apart(writer, node, q, rows, used)
        elif node.op_type == "RotaryEmbedding":
            _rotate_each_row(GraphWriter.before(node, graph), node)
    passes.RemoveUnusedNodesPass()(made)
    return made


def _fix_batch(graph: ir.Graph) -> None:
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            fixed = [1 if str(size) == "batch" else size for size in value.shape]
            value.shape = ir.Shape(fixed)
    for node in graph:
        shape = node.outputs[0].shape
        if node.op_type != "Reshape" or shape is None:
            continue
        sizes: list[int] = [size if isinstance(size, int) else -1 for size in shape]
        if sizes.count(-1) <= 1:
            node.replace_input_with(1, GraphWriter(graph, "").integers(sizes))


def _free_contexts(graph: ir.Graph) -> None:
    """Gives every cache a length of its own: a slot with a window has fewer columns than others.

    ONNX Runtime takes axes of one name for equal, and puts what it makes of them in the same memory.
    """
    for value in graph.inputs:
        if value.shape is not None and CONTEXT in map(str, value.shape):
            value.shape = ir.Shape([f"{value.name}_columns" if str(size) == CONTEXT else size for size in value.shape])


def _window(writer: GraphWriter, past: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """The ``length`` of an attention node, which is the columns of its cache, and no padding."""
    return writer.add("Squeeze", [writer.sizes(past, 1)]), writer.integers([0])


def _fold(model: ir.Model) -> None:
    ir.passes.Sequential(passes.RemoveUnusedNodesPass(), passes.CommonSubexpressionEliminationPass())(model)
    # A small weight would become a constant without a name, in graphs that are kept for other weights, too.
    fold_constants(model, should_fold=lambda node: False if node.op_type == "Cast" or _has_weight(node) else None)
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.RemoveUnusedNodesPass(),
    )(model)


def _has_weight(node: ir.Node) -> bool:
    return any(value is not None and isinstance(value.const_value, ir.ExternalTensor) for value in node.inputs)


def _rotate_each_row(writer: GraphWriter, node: ir.Node) -> None:
    """Makes every row a sequence of one for the rotation: its kernel takes no chunk beyond the longest context."""
    x = node.inputs[0]
    assert x is not None
    width = shape_of(x)[-1]
    apart = writer.add("Reshape", [x, writer.integers([-1, 1, width])])
    apart.type = x.type
    node.replace_input_with(0, apart)
    node.outputs[0].shape = ir.Shape(["chunk", 1, width])


def _attend_apart(
    writer: GraphWriter, node: ir.Node, q: Sequence[ir.Value], rows: Sequence[ir.Value], used: Sequence[ir.Value]
) -> None:
    """Replaces an attention node by one for each sequence: on its part of ``q`` and ``rows``, over its own cache.

    ``used`` says which sequences have rows.
    """
    past, output = node.inputs[2], node.outputs[0]
    assert past is not None
    assert past.shape is not None
    heads, width = shape_of(output)[2:]
    attended = []
    for job, has_rows in enumerate(used):
        own = ir.Value(
            name=f"{past.name}@{job}", type=past.type, shape=ir.Shape([1, f"{past.name}@{job}_columns", past.shape[2]])
        )
        writer.graph.inputs.append(own)
        given = (q[job], rows[job], own)

        def alone(inside: GraphWriter, given: tuple[ir.Value, ...] = given) -> ir.Value:
            inputs = [*given, *_window(inside, given[2]), *node.inputs[5:]]
            return inside.add(node.op_type, inputs, node.domain, **node.attributes)

        def nothing(inside: GraphWriter) -> ir.Value:
            return inside.add("Identity", [inside.constant(np.zeros((1, 0, heads, width), np.float32))])

        branches = ((f"rows@{job}", alone), (f"no_rows@{job}", nothing))
        attended.append(writer.either(has_rows, *branches, [1, None, heads, width]))
    writer.replace(writer.add("Concat", attended, axis=1))
    writer.graph.inputs.remove(past)


def _split_rows(writer: GraphWriter, value: ir.Value | None, counts: ir.Value, jobs: int) -> Sequence[ir.Value]:
    """``value (1, chunk, ...)`` cut into the rows of each sequence."""
    assert value is not None
    parts = writer.add_many("Split", [value, counts], jobs, axis=1)
    for job, part in enumerate(parts):
        part.type, part.shape = value.type, ir.Shape([1, f"rows_{job}", *list(value.shape or ())[2:]])
    return parts
