"""Keys and values of cached rows as inputs and outputs of their own, so that products read them where they lie.

``halve_caches``  requires a lowered stage that parts its caches, if at all, in keys and values alone; ensures
                  ``past_0.keys`` and ``past_0.values``, ``rows_0.keys`` and ``rows_0.values`` in the place of the whole

A half of each row is no piece of memory: ONNX Runtime would copy the whole cache at every call to part it. Stages of
latent attention, whose rows are one vector, stay as they are.
"""

from collections.abc import Sequence

import onnx_ir as ir

from mythos_edge.exporter.graph_checks import graph_pass, no_node
from mythos_edge.exporter.graph_writer import GraphWriter, shape_of
from mythos_edge.model.observed import is_tap
from mythos_edge.model.stages import HALVES, half_name


def _is_past(value: ir.Value | None) -> bool:
    return value is not None and value.is_graph_input() and str(value.name).startswith("past_")


def _parts(node: ir.Node) -> bool:
    """Whether a node parts rows into their keys and their values."""
    halves = node.op_type == "Split" and len(node.inputs) == 1 and len(node.outputs) == len(HALVES)
    return halves and node.attributes["axis"].as_int() == 2


def _parts_past(node: ir.Node) -> bool:
    return _parts(node) and _is_past(node.inputs[0])


@graph_pass(ensures=[no_node(_parts_past, "copies a cache to part it")])
def halve_caches(model: ir.Model) -> ir.Model:
    """A copy that takes and gives keys and values apart; the model itself where nothing parts its caches."""
    if not any(map(_parts_past, model.graph.all_nodes())):
        return model
    made = model.clone()
    graph = made.graph
    for past in [value for value in graph.inputs if _is_past(value)]:
        _halve_input(graph, past)
    for rows in [value for value in graph.outputs if str(value.name).startswith("rows_")]:
        _halve_output(graph, rows)
    return made


def _halves_of(value: ir.Value) -> list[ir.Value]:
    """Values for the halves of ``value``, named after them."""
    assert value.shape is not None
    *sizes, width = value.shape
    assert isinstance(width, int)
    shapes = [ir.Shape([*sizes, width // len(HALVES)]) for _ in HALVES]
    return [
        ir.Value(name=half_name(str(value.name), half), type=value.type, shape=shape)
        for half, shape in zip(HALVES, shapes, strict=True)
    ]


def _halve_input(graph: ir.Graph, past: ir.Value) -> None:
    halves = _halves_of(past)
    for node in [use.node for use in past.uses()]:
        assert _parts(node), f"{node.name} ({node.op_type}): reads the whole of {past.name}"
        _replace(node, halves)
    at = graph.inputs.index(past)
    graph.inputs[at : at + 1] = halves


def _halve_output(graph: ir.Graph, rows: ir.Value) -> None:
    """Gives the halves of new rows, and lets all other nodes read those: what they say is what is kept."""
    producer, readers = rows.producer(), list(rows.uses())
    assert producer is not None
    nodes = list(graph)
    following = nodes.index(producer) + 1
    writer = GraphWriter(graph, f"{rows.name}/halves", graph, nodes[following] if following < len(nodes) else None)
    named = _halves_of(rows)
    halves = _joined(rows, named)
    if not halves:
        halves = writer.add_many("Split", [rows], len(HALVES), axis=2, num_outputs=len(HALVES))
    for half, like in zip(halves, named, strict=True):
        half.name, half.type, half.shape = like.name, like.type, like.shape
    at = graph.outputs.index(rows)
    graph.outputs[at : at + 1] = halves
    others = [(node, index) for node, index in readers if not _parts(node)]
    for node in [node for node, _ in readers if _parts(node)]:
        _replace(node, halves)
    if others:
        # Rows of several sequences, which are cut by sequence first.
        whole = writer.add("Concat", halves, axis=2)
        whole.type, whole.shape = rows.type, rows.shape
        for node, index in others:
            node.replace_input_with(index, whole)
    rows.name = f"{rows.name}/whole"
    if not rows.uses():
        graph.remove(producer, safe=True)


def _joined(rows: ir.Value, halves: Sequence[ir.Value]) -> Sequence[ir.Value]:
    """The two values that ``rows`` were put together from, if they are the ``halves``; else none."""
    producer = rows.producer()
    if producer is None or producer.op_type != "Concat" or producer.attributes["axis"].as_int() not in (-1, 2):
        return ()
    found = [value for value in producer.inputs if value is not None and _can_be_named(value)]
    widths = [shape_of(value)[-1] for value in found]
    return found if widths == [shape_of(half)[-1] for half in halves] and len(set(found)) == len(found) else ()


def _can_be_named(value: ir.Value) -> bool:
    """Whether a value is a node's, of a known shape, and nobody looks for it under the name that it has."""
    is_known = value.producer() is not None and value.shape is not None
    return is_known and not value.is_graph_output() and not is_tap(str(value.name))


def _replace(node: ir.Node, halves: Sequence[ir.Value]) -> None:
    """Puts ``halves`` in the place of what a node makes that parts rows."""
    for old, half in zip(node.outputs, halves, strict=True):
        ir.convenience.replace_all_uses_with(old, half)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
