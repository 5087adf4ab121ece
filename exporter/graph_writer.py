"""Writes nodes into ONNX graphs: results with names, constants once each, branches, and whole graphs copied in.

Constants and weights are initializers of the main graph, whatever subgraph uses them. Not here: which nodes.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

# Of larger constants the name has a hash.
_MOST_NUMBERS_IN_A_NAME = 8

Branch = tuple[str, Callable[["GraphWriter"], ir.Value]]


class GraphWriter:
    """Adds nodes to ``graph``, before ``anchor`` or at its end; constants and weights go to ``home``, the main graph.

    Names of results begin with ``prefix``, which must be one writer's own.
    """

    def __init__(
        self, graph: ir.Graph, prefix: str, home: ir.Graph | None = None, anchor: ir.Node | None = None
    ) -> None:
        self.graph = graph
        self._prefix, self._home, self._anchor = prefix, home or graph, anchor
        self._made: list[ir.Node] = []
        self._count = 0

    @classmethod
    def before(cls, node: ir.Node, home: ir.Graph) -> "GraphWriter":
        """A writer that adds nodes before ``node``, of ``home`` or a subgraph, and may ``replace`` it."""
        assert isinstance(node.graph, ir.Graph)
        prefix = str(node.outputs[0].name)
        # What stood here may have been replaced before, and its successor has its name.
        nodes = list(home.all_nodes())
        taken = [str(each.name) for each in nodes] + [str(value.name) for each in nodes for value in each.outputs]
        while any(name.startswith(prefix + "/") for name in taken):
            prefix += "+"
        return cls(node.graph, prefix, home, node)

    def add(self, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        """The one result of a new node."""
        return self.add_many(op_type, inputs, 1, domain, **attributes)[0]

    def add_many(
        self, op_type: str, inputs: Sequence[ir.Value | None], outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """The results of a new node; an attribute may be a graph."""
        made = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
        for value in made.outputs:
            self._count += 1
            value.name = f"{self._prefix}/{op_type.lower()}_{self._count}"
        made.name = str(made.outputs[0].name)
        if self._anchor is None:
            self.graph.append(made)
        else:
            self.graph.insert_before(self._anchor, made)
        self._made.append(made)
        return made.outputs

    def sizes(self, value: ir.Value | None, start: int, end: int | None = None) -> ir.Value:
        """Sizes of the axes ``start .. end`` (one axis without ``end``) as a vector."""
        return self.add("Shape", [value], start=start, end=start + 1 if end is None else end)

    def range_to(self, count: ir.Value) -> ir.Value:
        """The numbers from 0 to below the one in ``count (1,)``, as a vector."""
        return self.add("Range", [self.integer(0), self.add("Squeeze", [count]), self.integer(1)])

    def tensor(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """``tensor`` as an initializer of the main graph, one for each name."""
        if name not in self._home.initializers:
            shape = ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
            self._home.register_initializer(value)
        return self._home.initializers[name]

    def constant(self, numbers: ArrayLike) -> ir.Value:
        """``numbers`` as an initializer of the main graph, one for each content."""
        array = np.asarray(numbers)
        name = _name_of(array)
        return self.tensor(ir.tensor(array, name=name), name)

    def integer(self, number: int) -> ir.Value:
        """An int64 scalar."""
        return self.constant(np.int64(number))

    def integers(self, numbers: Sequence[int]) -> ir.Value:
        """An int64 vector."""
        return self.constant(np.array(numbers, np.int64))

    def number(self, number: float) -> ir.Value:
        """A float32 scalar."""
        return self.constant(np.float32(number))

    def subgraph(self, name: str) -> "GraphWriter":
        """A writer at the end of a new graph, which becomes an attribute of a node."""
        name = f"{self._prefix}/{name}"
        return GraphWriter(ir.Graph([], [], nodes=[], name=name), name, self._home)

    def either(
        self,
        condition: ir.Value,
        then: Branch,
        otherwise: Branch,
        shape: Sequence[int | None],
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> ir.Value:
        """The result, of ``shape``, of the branch that ``condition (1,)`` picks: each has a name and a writer."""
        graphs = []
        for name, write in (then, otherwise):
            inside = self.subgraph(name)
            output = write(inside)
            output.type, output.shape = ir.TensorType(dtype), ir.Shape(shape)
            inside.graph.outputs.append(output)
            graphs.append(inside.graph)
        chosen = self.add("If", [condition], then_branch=graphs[0], else_branch=graphs[1])
        chosen.type = ir.TensorType(dtype)
        return chosen

    def replace(self, value: ir.Value | None) -> None:
        """Puts ``value`` in the place of what the anchor makes, and removes the anchor.

        What this writer made, and an output of the graph, takes the name; the former also type and shape.
        """
        assert value is not None
        assert self._anchor is not None
        old = self._anchor.outputs[0]
        name, made, is_output = old.name, value.producer() in self._made, old.is_graph_output()
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self.graph.remove(self._anchor, safe=True)
        if made:
            value.type, value.shape = old.type, old.shape
        if made or is_output:
            value.name = name

    def copy_in(self, source: ir.Graph, inputs: Mapping[str, ir.Value], prefix: str) -> dict[str, ir.Value]:
        """Copies ``source`` to the end of the graph, and gives its outputs by name.

        Weights, which are in files, keep their names and exist once; names of all else begin with ``prefix``.
        """
        missing = {str(value.name) for value in source.inputs} - inputs.keys()
        assert not missing, f"{source.name} has inputs that nothing is given for: {', '.join(sorted(missing))}"
        copy = source.clone()
        outputs = {str(value.name): value for value in copy.outputs}
        for value in copy.inputs:
            ir.convenience.replace_all_uses_with(value, inputs[str(value.name)])
        for name, value in list(copy.initializers.items()):
            tensor = copy.initializers.pop(name).const_value
            assert tensor is not None, name
            in_file = isinstance(tensor, ir.ExternalTensor)
            known = self.tensor(tensor, name) if in_file else self.constant(tensor.numpy())
            ir.convenience.replace_all_uses_with(value, known)
        copy.outputs.clear()
        for node in list(copy):
            copy.remove(node)
            for value in node.outputs:
                value.name = f"{prefix}/{value.name}"
            node.name = f"{prefix}/{node.name}"
            self.graph.append(node)
        return {name: inputs.get(name, value) for name, value in outputs.items()}


def shape_of(value: ir.Value | None) -> list[int]:
    """The shape, with -1 for free axes."""
    assert value is not None
    assert value.shape is not None, value.name
    return [size if isinstance(size, int) else -1 for size in value.shape]


def _name_of(array: np.ndarray[Any, Any]) -> str:
    text = ",".join(map(str, array.reshape(-1).tolist()))
    if array.size > _MOST_NUMBERS_IN_A_NAME:
        text = hashlib.sha256(array.tobytes()).hexdigest()[:16]
    return f"const/{array.dtype}[{','.join(map(str, array.shape))}]/{text}"
