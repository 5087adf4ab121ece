"""Checks of graphs: what a pass requires and ensures, and onnx's own of what was made.

A graph that a pass cannot work on is a broken invariant of ours, told by the pass and the node, before it does harm.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import onnx
import onnx_ir as ir

# What is wrong with a model, by name of a node or value; None for a model that is right.
Condition = Callable[[ir.Model], str | None]
# Gives the model it makes of the one it is given first; None where it changes that one.
Pass = TypeVar("Pass", bound=Callable[..., ir.Model | None])


def graph_pass(requires: Sequence[Condition] = (), ensures: Sequence[Condition] = ()) -> Callable[[Pass], Pass]:
    """Makes a function a pass that checks the model it gets, and the one it makes or has changed.

    Raises AssertionError with the name of the pass and what is wrong where.
    """

    def checked(change: Pass) -> Pass:
        @wraps(change)
        def run(model: ir.Model, *given: Any, **options: Any) -> ir.Model | None:
            _check(requires, model, f"{change.__name__} cannot work on {model.graph.name}")
            made = change(model, *given, **options)
            _check(ensures, made or model, f"{change.__name__} left {model.graph.name} wrong")
            return made

        return cast(Pass, run)

    return checked


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and the bodies of its loops and branches, those in bodies too."""
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            yield from all_graphs(body)


def has_inputs(*names: str) -> Condition:
    """All of ``names`` are inputs."""

    def wrong(model: ir.Model) -> str | None:
        missing = [name for name in names if name not in _inputs(model)]
        return f"{missing[0]}: no such input" if missing else None

    return wrong


def has_no_inputs(*names: str) -> Condition:
    """None of ``names`` is an input."""

    def wrong(model: ir.Model) -> str | None:
        found = [name for name in names if name in _inputs(model)]
        return f"{found[0]}: an input" if found else None

    return wrong


def has_no(*op_types: str) -> Condition:
    """No node, in subgraphs neither, is one of ``op_types``."""
    return no_node(lambda node: node.op_type in op_types, "a node of this kind")


def no_node(is_wrong: Callable[[ir.Node], object], what: str) -> Condition:
    """No node, in subgraphs neither, is wrong in the way that ``what`` says."""

    def wrong(model: ir.Model) -> str | None:
        found = next(filter(is_wrong, model.graph.all_nodes()), None)
        return None if found is None else f"{found.outputs[0].name} ({found.op_type}): {what}"

    return wrong


def one_sequence(model: ir.Model) -> str | None:
    """No input has a free axis ``batch``."""
    free = [value for value in model.graph.inputs if value.shape is not None and "batch" in map(str, value.shape)]
    return f"{free[0].name}: its batch is free" if free else None


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


def _inputs(model: ir.Model) -> set[str]:
    return {str(value.name) for value in model.graph.inputs}


def _check(conditions: Sequence[Condition], model: ir.Model, what: str) -> None:
    for condition in conditions:
        wrong = condition(model)
        if wrong is not None:
            raise AssertionError(f"{what}: {wrong}")
