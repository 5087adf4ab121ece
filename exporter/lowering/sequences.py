"""Graph passes on a traced stage that a target's lowering builds on.

``for_one_sequence``    requires a traced stage; ensures a batch of one, ``positions`` as an input, constant shapes
``for_many_sequences``  requires the former; ensures rows of up to ``jobs`` sequences side by side, each with its cache
``check_graph``         has onnx check what a lowering made; changes nothing
"""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.optimizer import fold_constants

from mythos_edge.plugins import ops

_ATTENTIONS = (ops.LATENT_ATTENTION.name, ops.GROUPED_QUERY_ATTENTION.name)


def for_one_sequence(model: ir.Model) -> ir.Model:
    """A copy for a batch of one without padding, whose every cached row is filled.

    ``length`` and ``first`` are replaced by ``positions (1, chunk)``, the position of each new row.
    """
    made = model.clone()
    graph = made.graph
    _fix_batch(graph)
    positions = ir.Value(name="positions", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1, "chunk"]))
    for node in graph:
        if node.op_type == "RotaryEmbedding":
            node.replace_input_with(3, positions)
        elif node.domain == ops.DOMAIN and node.op_type in _ATTENTIONS:
            # What the portable body would work out from length and first is known here: all columns are visible.
            _insert_window(graph, node, graph)
    unused = [value for value in graph.inputs if value.name in ("length", "first")]
    kept = [value for value in graph.inputs if value not in unused]
    _fold(made)
    graph.inputs.clear()
    graph.inputs.extend([*kept, positions])
    assert not any(value.uses() for value in unused), "length or first is needed after all"
    return made


def for_many_sequences(model: ir.Model, jobs: int) -> ir.Model:
    """A copy in which the chunk holds the rows of ``jobs`` sequences, one after the other.

    ``row_counts (jobs,)`` says how many rows each has (0 for none), ``positions`` is (chunk, 1); instead of ``past``
    there are ``past@0`` ..., each with a context of its own. Everything but attention works row by row and stays.
    """
    made = model.clone()
    graph = made.graph
    counts = ir.Value(name="row_counts", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([jobs]))
    graph.inputs.append(counts)
    used: list[ir.Value] = []
    for node in list(graph):
        if node.op_type in _ATTENTIONS:
            q, rows = (_split_rows(graph, node, value, counts, jobs) for value in node.inputs[:2])
            # The first says it for all.
            used = used or [_has_rows(graph, node, part, job) for job, part in enumerate(rows)]
            _attend_apart(graph, node, q, rows, used)
        elif node.op_type == "RotaryEmbedding":
            _rotate_each_row(graph, node)
    passes.RemoveUnusedNodesPass()(made)
    return made


def check_graph(model: ir.Model) -> None:
    """Raises onnx's ValidationError where ``model`` is no valid graph.

    Its weights in files count as inputs: they may not be in place yet, and onnx refuses files with two links.
    """
    copy = model.clone()
    for name, value in list(copy.graph.initializers.items()):
        if isinstance(value.const_value, ir.ExternalTensor):
            copy.graph.initializers.pop(name)
            value.const_value = None
            copy.graph.inputs.append(value)
    onnx.checker.check_model(ir.to_proto(copy))


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
            node.replace_input_with(1, _constant(graph, f"{node.outputs[0].name}.shape", sizes))


def _insert_window(graph: ir.Graph, node: ir.Node, home: ir.Graph) -> None:
    """Gives an attention node of ``graph`` its ``length``, the columns of its cache, and no padding."""
    past = node.inputs[2]
    assert past is not None
    size = ir.node("Shape", [past], {"start": 1, "end": 2})
    length = ir.node("Squeeze", [size.outputs[0]])
    for made, suffix in ((size, "columns"), (length, "length")):
        made.outputs[0].name = made.name = f"{node.outputs[0].name}.{suffix}"
        graph.insert_before(node, made)
    node.replace_input_with(3, length.outputs[0])
    node.replace_input_with(4, _constant(home, "no_padding", [0]))


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(numbers, dtype=ir.DataType.INT64)
        shape = ir.Shape([len(numbers)])
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _fold(model: ir.Model) -> None:
    ir.passes.Sequential(passes.RemoveUnusedNodesPass(), passes.CommonSubexpressionEliminationPass())(model)
    # A small weight that is stored narrow would become a constant without a name.
    fold_constants(model, should_fold=lambda node: False if node.op_type == "Cast" else None)
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.RemoveUnusedNodesPass(),
    )(model)


def _has_rows(graph: ir.Graph, node: ir.Node, rows: ir.Value, job: int) -> ir.Value:
    """Whether a sequence has any rows: of their shape, which the host knows where values are a GPU's."""
    number = ir.node("Shape", [rows], {"start": 1, "end": 2}, name=f"row_count@{job}")
    some = ir.node("Greater", [number.outputs[0], _constant(graph, "none", [0])], name=f"has_rows@{job}")
    for made in (number, some):
        made.outputs[0].name = made.name
    graph.insert_before(node, [number, some])
    return some.outputs[0]


def _rotate_each_row(graph: ir.Graph, node: ir.Node) -> None:
    """Makes every row a sequence of one for the rotation: its kernel takes no chunk beyond the longest context."""
    x, positions = node.inputs[0], node.inputs[3]
    assert x is not None
    assert x.shape is not None
    assert positions is not None
    positions.shape = ir.Shape(["chunk", 1])
    width = x.shape[-1]
    assert isinstance(width, int)
    apart = ir.node("Reshape", [x, _constant(graph, f"rows_of_{width}", [-1, 1, width])], name=f"{x.name}.rows")
    apart.outputs[0].name, apart.outputs[0].type = apart.name, x.type
    graph.insert_before(node, apart)
    node.replace_input_with(0, apart.outputs[0])
    node.outputs[0].shape = ir.Shape(["chunk", 1, width])


def _attend_apart(
    graph: ir.Graph, node: ir.Node, q: Sequence[ir.Value], rows: Sequence[ir.Value], used: Sequence[ir.Value]
) -> None:
    """Replaces an attention node by one for each sequence: on its part of ``q`` and ``rows``, over its own cache.

    ``used`` says which sequences have rows.
    """
    past = node.inputs[2]
    assert past is not None
    name, output = str(node.outputs[0].name), node.outputs[0]
    attended = []
    for job, has_rows in enumerate(used):
        assert past.shape is not None
        own = ir.Value(name=f"{past.name}@{job}", type=past.type, shape=ir.Shape([1, f"context_{job}", past.shape[2]]))
        graph.inputs.append(own)
        inputs = [q[job], rows[job], own, *node.inputs[3:]]
        one = ir.node(node.op_type, inputs, node.attributes, domain=node.domain, name=f"{name}@{job}")
        then = ir.Graph([], one.outputs, nodes=[one], name=f"{name}@{job}/rows")
        _insert_window(then, one, graph)
        nothing = ir.node("Identity", [_no_rows(graph, output)], name=f"{name}@{job}/nothing")
        otherwise = ir.Graph([], nothing.outputs, nodes=[nothing], name=f"{name}@{job}/no_rows")
        for made in (one, nothing):
            made.outputs[0].name, made.outputs[0].type = f"{made.name}.made", output.type
            made.outputs[0].shape = ir.Shape([1, None, *list(output.shape or ())[2:]])
        branches = [ir.AttrGraph("then_branch", then), ir.AttrGraph("else_branch", otherwise)]
        choice = ir.Node("", "If", [has_rows], branches, name=f"{name}@{job}/if")
        choice.outputs[0].name, choice.outputs[0].type = choice.name, output.type
        graph.insert_before(node, choice)
        attended.append(choice.outputs[0])
    joined = ir.node("Concat", attended, {"axis": 1}, name=f"{name}.joined")
    joined.outputs[0].name, joined.outputs[0].type, joined.outputs[0].shape = joined.name, output.type, output.shape
    graph.insert_before(node, joined)
    ir.convenience.replace_all_uses_with(output, joined.outputs[0])
    graph.remove(node, safe=True)
    graph.inputs.remove(past)


def _split_rows(
    graph: ir.Graph, node: ir.Node, value: ir.Value | None, counts: ir.Value, jobs: int
) -> Sequence[ir.Value]:
    """``value (1, chunk, ...)`` cut into the rows of each sequence."""
    assert value is not None
    cut = ir.node("Split", [value, counts], {"axis": 1}, num_outputs=jobs, name=f"{node.outputs[0].name}.{value.name}")
    for job, part in enumerate(cut.outputs):
        part.name, part.type = f"{cut.name}@{job}", value.type
        part.shape = ir.Shape([1, f"rows_{job}", *list(value.shape or ())[2:]])
    graph.insert_before(node, cut)
    return cut.outputs


def _no_rows(graph: ir.Graph, like: ir.Value) -> ir.Value:
    """No rows of the shape of ``like (1, chunk, heads, width)``."""
    assert like.shape is not None
    shape = [1, 0, *(int(size) for size in list(like.shape)[2:] if isinstance(size, int))]
    name = "no_rows_" + "_".join(map(str, shape))
    if name not in graph.initializers:
        tensor = ir.tensor(np.zeros(shape, np.float32), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]
