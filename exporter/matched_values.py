"""Matches values of two graphs where names say nothing: by all that each is computed from, or all that is computed from
it.

Integers count for nothing, as tools fold shapes; nor do ops that change shapes alone. Weights are known by type and
shape. An edit in one place leaves what is before it known by the first, and what is behind it by the second.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

import onnx_ir as ir

_TRANSPARENT = {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast", "Expand"}
_WHOLE_NUMBERS = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}
_NOT_PLAIN = {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.TENSOR}
Digests = dict[ir.Value, bytes]


class Structure:
    """Values of a graph, and of the bodies of its loops, known by their place in its structure.

    ``roles`` name the values that two graphs are known to share, as inputs and outputs.
    """

    def __init__(self, graph: ir.Graph, bodies: Iterable[ir.Graph], roles: Mapping[ir.Value, str]) -> None:
        self._roles = roles
        nodes = [*graph, *(node for body in bodies for node in body)]
        self._made = [value for node in nodes if not _shapes_only(node) for value in node.outputs]
        self._before: Digests = {}
        self._behind: Digests = {}
        for node in nodes:
            self._read(node)
        for node in reversed(nodes):
            for value in node.outputs:
                self._follow(value)
        self._by_before, self._by_behind = (self._unique(known) for known in (self._before, self._behind))

    def like(self, other: "Structure", value: ir.Value) -> ir.Value | None:
        """The value here that is in the place of one of ``other``; None where none is, or several may be."""
        while (node := value.producer()) is not None and _shapes_only(node) and node.inputs[0] is not None:
            value = node.inputs[0]
        found = [
            here[known[value]]
            for here, there, known in (
                (self._by_before, other._by_before, other._before),
                (self._by_behind, other._by_behind, other._behind),
            )
            if value in known and known[value] in here and known[value] in there
        ]
        return found[0] if len(set(found)) == 1 else None

    def _unique(self, known: Digests) -> dict[bytes, ir.Value]:
        counts = Counter(known[value] for value in self._made if value in known)
        return {known[value]: value for value in self._made if counts[known.get(value, b"")] == 1}

    def _read(self, node: ir.Node) -> None:
        if _shapes_only(node) and node.inputs[0] is not None:
            self._before[node.outputs[0]] = self._of(node.inputs[0])
            return
        given = [b"" if value is None or _is_whole(value) else self._of(value) for value in node.inputs]
        for place, value in enumerate(node.outputs):
            self._before[value] = _digest(_itself(node), *given, str(place).encode())

    def _of(self, value: ir.Value) -> bytes:
        if value not in self._before:
            self._before[value] = _weight(value) or _digest(b"given", self._roles.get(value, "").encode())
        return self._before[value]

    def _follow(self, value: ir.Value) -> None:
        found = [_digest(b"role", self._roles[value].encode())] if value in self._roles else []
        for node, place in value.uses():
            if _shapes_only(node):
                found += [self._behind.get(node.outputs[0], b"")] if place == 0 else []
            elif not all(_is_whole(made) for made in node.outputs):
                weights = [_weight(given) for given in node.inputs if given is not None and not _is_whole(given)]
                following = [self._behind.get(made, b"") for made in node.outputs]
                found.append(_digest(_itself(node), str(place).encode(), *weights, *following))
        self._behind[value] = _digest(*sorted(found))


def _shapes_only(node: ir.Node) -> bool:
    return node.op_type in _TRANSPARENT and bool(node.inputs)


def _is_whole(value: ir.Value) -> bool:
    return value.dtype in _WHOLE_NUMBERS


def _weight(value: ir.Value) -> bytes:
    """Type and shape of a weight, which its name does not change; empty for what is none."""
    tensor = value.const_value
    return b"" if tensor is None else _digest(str(tensor.dtype).encode(), str(tensor.shape.numpy()).encode())


def _itself(node: ir.Node) -> bytes:
    told = [f"{one.name}={one.value}" for one in node.attributes.values() if one.type not in _NOT_PLAIN]
    return _digest(node.op_type.encode(), *(one.encode() for one in sorted(told)))


def _digest(*parts: bytes) -> bytes:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.digest()
