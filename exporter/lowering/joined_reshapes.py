"""One Reshape in the place of several in a row, and none where the shape stays.

``join_reshapes``  changes a lowered graph; ensures that no Reshape to a known shape follows another,
                   but of a value that is looked at or an output

A family's network and the lowering of an op each bring rows into the shape that they want. ONNX Runtime runs every
Reshape as a node of its own, which costs microseconds at each loop step.
"""

from collections.abc import Sequence

import onnx_ir as ir

from mythos_edge.exporter.graph_checks import graph_pass, no_node
from mythos_edge.model.observed import is_tap

# They leave all numbers in their order.
_RESHAPING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


def _shape_of(node: ir.Node) -> Sequence[int] | None:
    """The shape, with one -1 at most, that a Reshape gives whatever it is given; None of all else."""
    if (node.domain, node.op_type) != ("", "Reshape") or node.inputs[1] is None:
        return None
    known = node.inputs[1].const_value
    shape = [0] if known is None else known.numpy().tolist()
    return None if 0 in shape else shape


def _before(value: ir.Value | None) -> ir.Value | None:
    """The value that was reshaped to ``value``; None where none was, or ``value`` must stay to be looked at."""
    maker = None if value is None else value.producer()
    if maker is None or maker.domain != "" or maker.op_type not in _RESHAPING:
        return None
    assert value is not None
    return None if value.is_graph_output() or is_tap(str(value.name)) else maker.inputs[0]


def _follows_another(node: ir.Node) -> bool:
    return _shape_of(node) is not None and _before(node.inputs[0]) is not None


@graph_pass(ensures=[no_node(_follows_another, "reshapes what was just reshaped")])
def join_reshapes(model: ir.Model) -> None:
    """Joins them in place; nodes that nobody reads then are left to another pass."""
    for node in list(model.graph.all_nodes()):
        shape = _shape_of(node)
        if shape is None:
            continue
        source = node.inputs[0]
        assert source is not None
        while (before := _before(source)) is not None:
            source = before
        node.replace_input_with(0, source)
        if _has_shape(source, shape) and _before(node.outputs[0]) is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], source)


def _has_shape(value: ir.Value, shape: Sequence[int]) -> bool:
    """Whether a value has all sizes of ``shape``, in which -1 is as many as are left."""
    if value.shape is None or len(value.shape) != len(shape):
        return False
    free = [size == -1 and not isinstance(own, int) for own, size in zip(value.shape, shape, strict=True)]
    return all(same or own == size for same, own, size in zip(free, value.shape, shape, strict=True))
