"""How two ONNX graphs differ: inputs and outputs, nodes by op type, constants, and what is connected to what.

Names of nodes and of values between them mean nothing, nor does the order of nodes. Weights that lie in other files
are known by name, type and shape alone.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

# Comes with onnx, which is made of its messages; it has no types.
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]

from mythos_edge.model.bounded_files import open_regular, require_file
from mythos_edge.model.errors import BundleError, one_line
from mythos_edge.model.foreign_files import foreign_kind

# No protobuf message is longer.
_MOST_GRAPH_BYTES = 1 << 31
# By name of a value: a digest of all that it is computed from.
Digests = dict[str, bytes]


@dataclass(frozen=True)
class GraphDifference:
    """The difference of graph ``b`` from ``a``.

    ``inputs`` and ``outputs`` give for each name that differs the type and shape in ``a`` and ``b``, None where it has
    no such. ``added`` and ``removed`` count nodes by op type, those in bodies and functions too; ``changed`` those of
    which there are as many but with other attributes, weights or constants. ``rewired``: the same nodes, connected in
    another way.
    """

    inputs: dict[str, tuple[str | None, str | None]]
    outputs: dict[str, tuple[str | None, str | None]]
    added: dict[str, int]
    removed: dict[str, int]
    changed: dict[str, int]
    rewired: bool

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def to_dict(self) -> dict[str, Any]:
        ends = {
            side: {name: {"a": a, "b": b} for name, (a, b) in getattr(self, side).items()}
            for side in ("inputs", "outputs")
        }
        return {**vars(self), **ends}


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph at ``path``, whoever made it, without the weights in other files. Raises BundleError."""
    try:
        require_file(path, _MOST_GRAPH_BYTES, "a graph")
        # Whatever its name ends in, which onnx goes by where it is not told.
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error
    except DecodeError as error:
        with open_regular(path) as file:
            known = foreign_kind(file.read(512))
        if known is not None:
            raise BundleError(f"{path}: is {known}") from error
        raise BundleError(f"{path}: not an ONNX file, or damaged: {one_line(error)}") from error
    if not _is_text(model):
        raise BundleError(f"{path}: not an ONNX file, or damaged: it has names that are no UTF-8: export it again")
    return model


def _is_text(message: Any) -> bool:
    """Whether all names in a message are text: protobuf gives bytes for those that are no UTF-8."""
    for field, value in message.ListFields():
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        values = [value] if isinstance(value, str | bytes | Message) else value  # one, or several
        if not all(_is_text(one) if isinstance(one, Message) else isinstance(one, str) for one in values):
            return False
    return True


def graph_difference(a: onnx.ModelProto, b: onnx.ModelProto) -> GraphDifference:
    """The difference of ``b`` from ``a``, false where they compute the same."""
    first, second = _Read(a), _Read(b)
    gone, new = first.nodes - second.nodes, second.nodes - first.nodes
    less, more = _by_op(gone), _by_op(new)
    changed = {op: min(less[op], more[op]) for op in sorted(less.keys() & more.keys())}
    added = {op: more[op] - changed.get(op, 0) for op in sorted(more) if more[op] > changed.get(op, 0)}
    removed = {op: less[op] - changed.get(op, 0) for op in sorted(less) if less[op] > changed.get(op, 0)}
    inputs, outputs = (
        {name: (of_a.get(name), of_b.get(name)) for name in {**of_a, **of_b} if of_a.get(name) != of_b.get(name)}
        for of_a, of_b in ((first.inputs, second.inputs), (first.outputs, second.outputs))
    )
    rewired = not (gone or new or inputs or outputs) and first.computed != second.computed
    return GraphDifference(inputs, outputs, added, removed, changed, rewired)


def _by_op(nodes: Mapping[tuple[str, bytes], int]) -> Counter[str]:
    found: Counter[str] = Counter()
    for (op, _), count in nodes.items():
        found[op] += count
    return found


class _Read:
    """A graph as far as it means something.

    ``nodes`` counts them by op type and a digest of what each is by itself, ``computed`` has digests of what the
    outputs, and the functions, are computed from.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes: Counter[tuple[str, bytes]] = Counter()
        self.inputs = {value.name: _described(value) for value in model.graph.input}
        self.outputs = {value.name: _described(value) for value in model.graph.output}
        self.computed = self._graph(model.graph, {}, {})
        for function in model.functions:
            given = {name: _digest("parameter", name) for name in function.input}
            known = self._walk(function.node, given, given)
            name = f"{function.domain}::{function.name}"
            self.computed[name] = _digest(*(known.get(output, b"") for output in function.output))

    def _graph(self, graph: onnx.GraphProto, outer: Digests, outer_given: Digests) -> Digests:
        """Digests of the outputs of a graph, by name. A body sees the values ``outer``, of which no node makes those
        that are ``outer_given``."""
        weights = {tensor.name: _tensor_digest(tensor) for tensor in graph.initializer}
        given = {**outer_given, **{value.name: _digest("input", value.name) for value in graph.input}, **weights}
        known = self._walk(graph.node, {**outer, **given}, given)
        return {value.name: known.get(value.name, b"") for value in graph.output}

    def _walk(self, nodes: Iterable[onnx.NodeProto], known: Digests, given: Digests) -> Digests:
        """Counts the nodes; what is ``known`` with all that they make. Bodies see all of it, and what is ``given``."""
        known = dict(known)
        for node in nodes:
            attributes = [self._attribute(attribute, known, given) for attribute in sorted(node.attribute, key=_name)]
            op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            # Nothing of what other nodes make, so that one more node changes no other.
            outside = [given.get(name, b"") if name else b"absent" for name in node.input]
            itself = _digest(op, *(own for own, _ in attributes), *outside, len(node.output))
            self.nodes[op, itself] += 1
            whole = _digest(itself, *(body for _, body in attributes), *(known.get(name, b"") for name in node.input))
            known.update({name: _digest(whole, place) for place, name in enumerate(node.output) if name})
        return known

    def _attribute(self, attribute: onnx.AttributeProto, known: Digests, given: Digests) -> tuple[bytes, bytes]:
        """Digests of an attribute by itself, and of the bodies in it, whose nodes are counted by themselves."""
        bodies = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
        if bodies:
            made = [_digest(*self._graph(body, known, given).values()) for body in bodies]
            return _digest(attribute.name, len(bodies)), _digest(*made)
        if attribute.HasField("t"):
            return _digest(attribute.name, _tensor_digest(attribute.t)), b""
        return _digest(_serialized(attribute, "doc_string")), b""


def _name(attribute: onnx.AttributeProto) -> str:
    return str(attribute.name)


def _tensor_digest(tensor: onnx.TensorProto) -> bytes:
    if tensor.external_data:
        return _digest("weight", tensor.name, tensor.data_type, *tensor.dims)
    return _digest("constant", _serialized(tensor, "name", "doc_string"))


def _serialized(message: Any, *without: str) -> bytes:
    """A message of ONNX as bytes, without what means nothing."""
    copied = type(message)()
    copied.CopyFrom(message)
    for field in without:
        copied.ClearField(field)
    data: bytes = copied.SerializeToString(deterministic=True)
    return data


def _described(value: onnx.ValueInfoProto) -> str:
    """Type and shape of an input or output, as in ``float32 [batch, chunk, 64]``."""
    kind = value.type.tensor_type
    if not kind.elem_type:
        return str(value.type.WhichOneof("value"))
    known = kind.elem_type in onnx.TensorProto.DataType.values()
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name if known else f"type {kind.elem_type}"
    shape = ", ".join(dim.dim_param or str(dim.dim_value) for dim in kind.shape.dim)
    return f"{dtype} [{shape}]"


def _digest(*parts: object) -> bytes:
    hashed = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.digest()
