"""The writer of nodes: where they stand, what they are called, and that a constant exists once."""

import numpy as np
import onnx_ir as ir
import pytest

from mythos_edge.exporter.graph_checks import check_graph
from mythos_edge.exporter.graph_writer import GraphWriter


def _value(name: str, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def _model(nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=nodes, name="main", opset_imports={"": 23})
    return ir.Model(graph, ir_version=10)


def _sum_model() -> ir.Model:
    x = _value("x", ["rows", 4])
    node = ir.node("Add", [x, x], name="sum")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", x.type, x.shape
    return _model([node], [x], list(node.outputs))


def test_constants_are_one_for_each_content() -> None:
    graph = _sum_model().graph
    writer = GraphWriter(graph, "here")
    inside = writer.subgraph("branch")
    assert writer.integers([1, 2]) is inside.constant(np.array([1, 2]))
    apart = [
        writer.integer(1),
        writer.integers([1]),
        writer.number(1),
        writer.constant(np.ones((1, 1), np.int64)),
        writer.constant(np.int8(1)),
        writer.constant(True),
        writer.constant(np.zeros((0, 4), np.float32)),
        writer.constant(np.zeros((0, 5), np.float32)),
        writer.constant(np.arange(100)),
        writer.constant(np.arange(1, 101)),
        writer.number(1 / 127),
        writer.number(-0.0),
        writer.number(0.0),
    ]
    assert len({id(value) for value in apart}) == len(apart)
    assert len(graph.initializers) == len(apart) + 1
    assert not inside.graph.initializers


def test_what_replaces_a_node_takes_its_place_and_name() -> None:
    model = _sum_model()
    writer = GraphWriter.before(model.graph[0], model.graph)
    doubled = writer.add("Mul", [model.graph.inputs[0], writer.number(2)])
    writer.replace(doubled)
    assert [node.op_type for node in model.graph] == ["Mul"]
    (output,) = model.graph.outputs
    assert (output.name, output.dtype, output.shape) == ("y", ir.DataType.FLOAT, ir.Shape(["rows", 4]))
    check_graph(model)


def test_a_node_may_be_replaced_again_and_again() -> None:
    model = _sum_model()
    x = model.graph.inputs[0]
    for _ in range(3):
        writer = GraphWriter.before(model.graph[len(model.graph) - 1], model.graph)
        doubled = writer.add("Mul", [writer.add("Abs", [writer.either(
            writer.add("Greater", [writer.sizes(x, 0), writer.integers([0])]),
            ("all", lambda inside: inside.add("Mul", [x, inside.number(2)])),
            ("none", lambda inside: inside.add("Abs", [x])),
            [None, 4],
        )]), model.graph[len(model.graph) - 1].inputs[0]])  # fmt: skip
        writer.replace(doubled)
    values = [str(value.name) for node in model.graph.all_nodes() for value in node.outputs]
    assert len(set(values)) == len(values), values
    check_graph(model)


def test_an_output_keeps_its_name_whatever_takes_its_place() -> None:
    model = _sum_model()
    start = GraphWriter(model.graph, "start", anchor=model.graph[0])
    known = start.add("Abs", [model.graph.inputs[0]])
    known.type, known.shape = model.graph.inputs[0].type, model.graph.inputs[0].shape
    GraphWriter.before(model.graph[1], model.graph).replace(known)
    assert [output.name for output in model.graph.outputs] == ["y"]
    check_graph(model)


def test_branches_share_the_constants_of_the_main_graph() -> None:
    model = _sum_model()
    x = model.graph.inputs[0]
    writer = GraphWriter.before(model.graph[0], model.graph)
    some = writer.add("Greater", [writer.sizes(x, 0), writer.integers([0])])
    chosen = writer.either(
        some,
        ("all", lambda inside: inside.add("Mul", [x, inside.number(2)])),
        ("none", lambda inside: inside.add("Mul", [x, inside.number(0)])),
        [None, 4],
    )
    writer.replace(chosen)
    check_graph(model)
    (choice,) = [node for node in model.graph if node.op_type == "If"]
    for branch in ("then_branch", "else_branch"):
        inside = choice.attributes[branch].as_graph()
        assert not inside.initializers
        assert inside.outputs[0].shape == ir.Shape([None, 4])


def test_a_graph_copied_in_twice_shares_its_weights() -> None:
    """Its own names get a prefix; a constant is one with those of the graph it comes into."""
    source = _sum_model()
    writer = GraphWriter.before(source.graph[0], source.graph)
    weight = ir.ExternalTensor("w", 0, 16, ir.DataType.FLOAT, shape=ir.Shape([4]), name="w", base_dir="")
    scaled = writer.add("Mul", [source.graph.inputs[0], writer.tensor(weight, "w")])
    writer.replace(writer.add("Add", [scaled, writer.number(1)]))

    x = _value("x", ["rows", 4])
    target = _model([], [x], [])
    home = GraphWriter(target.graph, "main")
    home.number(1)
    first = home.copy_in(source.graph, {"x": x}, "first")["y"]
    second = home.copy_in(source.graph, {"x": first}, "second")["y"]
    assert (first.name, second.name) == ("first/y", "second/y")
    assert len(target.graph.initializers) == 2
    assert [node.op_type for node in target.graph] == ["Mul", "Add"] * 2
    assert len(source.graph) == 2
    second.type, second.shape = x.type, x.shape
    target.graph.outputs.append(second)
    check_graph(target)
    with pytest.raises(AssertionError, match="main has inputs that nothing is given for: x"):
        home.copy_in(source.graph, {}, "third")
