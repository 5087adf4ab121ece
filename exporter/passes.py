"""Graph passes on a traced stage that a target's lowering builds on.

``for_one_sequence``    requires a traced stage; ensures a batch of one, ``positions`` as an input, constant shapes
``for_many_sequences``  requires the former; ensures rows of up to ``jobs`` sequences side by side, each with its cache
"""

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
            _insert_window(graph, node)
    unused = [value for value in graph.inputs if value.name in ("length", "first")]
    kept = [value for value in graph.inputs if value not in unused]
    _fold(made)
    graph.inputs.clear()
    graph.inputs.extend([*kept, positions])
    assert not any(value.uses() for value in unused), "length or first is needed after all"
    return made


def for_many_sequences(model: ir.Model, jobs: int) -> ir.Model:
    """A copy in which the chunk holds the rows of ``jobs`` sequences, one after the other.

    ``row_counts (jobs,)`` says how many rows each has (0 for none); instead of ``past`` there are ``past@0`` ..., each
    with a context of its own. Everything but attention works row by row and stays as it is.
    """
    made = model.clone()
    graph = made.graph
    counts = ir.Value(name="row_counts", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([jobs]))
    graph.inputs.append(counts)
    for node in [node for node in graph if node.op_type in _ATTENTIONS]:
        _attend_apart(graph, node, counts, jobs)
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
            node.replace_input_with(1, _constant(graph, f"{node.outputs[0].name}.shape", sizes))


def _insert_window(graph: ir.Graph, node: ir.Node) -> None:
    """Gives an attention node its ``length``, the columns of its cache, and no padding."""
    past = node.inputs[2]
    assert past is not None
    size = ir.node("Shape", [past], {"start": 1, "end": 2})
    length = ir.node("Squeeze", [size.outputs[0]])
    for made, suffix in ((size, "columns"), (length, "length")):
        made.outputs[0].name = made.name = f"{node.outputs[0].name}.{suffix}"
        graph.insert_before(node, made)
    node.replace_input_with(3, length.outputs[0])
    node.replace_input_with(4, _constant(graph, "no_padding", [0]))


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(numbers, dtype=ir.DataType.INT64)
        shape = ir.Shape([len(numbers)])
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _fold(model: ir.Model) -> None:
    ir.passes.Sequential(passes.RemoveUnusedNodesPass(), passes.CommonSubexpressionEliminationPass())(model)
    fold_constants(model)
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.RemoveUnusedNodesPass(),
    )(model)


def _attend_apart(graph: ir.Graph, node: ir.Node, counts: ir.Value, jobs: int) -> None:
    """Replaces an attention node by one for each sequence over its own cache."""
    q, rows, past = node.inputs[:3]
    assert q is not None
    assert rows is not None
    assert past is not None
    name = str(node.outputs[0].name)
    split = {}
    for label, value in (("q", q), ("rows", rows)):
        cut = ir.node("Split", [value, counts], {"axis": 1}, num_outputs=jobs, name=f"{name}.{label}")
        for job, part in enumerate(cut.outputs):
            part.name, part.type = f"{name}.{label}@{job}", ir.TensorType(ir.DataType.FLOAT)
            assert value.shape is not None
            part.shape = ir.Shape([1, f"rows_{job}", *list(value.shape)[2:]])
        graph.insert_before(node, cut)
        split[label] = cut.outputs
    attended = []
    assert past.shape is not None
    for job in range(jobs):
        own = ir.Value(name=f"{past.name}@{job}", type=past.type, shape=ir.Shape([1, f"context_{job}", past.shape[2]]))
        graph.inputs.append(own)
        inputs = [split["q"][job], split["rows"][job], own, *node.inputs[3:]]
        one = ir.node(node.op_type, inputs, node.attributes, domain=node.domain, name=f"{name}@{job}")
        one.outputs[0].name, one.outputs[0].type = one.name, ir.TensorType(ir.DataType.FLOAT)
        graph.insert_before(node, one)
        _insert_window(graph, one)
        attended.append(one.outputs[0])
    joined = ir.node("Concat", attended, {"axis": 1}, name=f"{name}.joined")
    joined.outputs[0].name, joined.outputs[0].type = joined.name, node.outputs[0].type
    joined.outputs[0].shape = node.outputs[0].shape
    graph.insert_before(node, joined)
    ir.convenience.replace_all_uses_with(node.outputs[0], joined.outputs[0])
    graph.remove(node, safe=True)
    graph.inputs.remove(past)
