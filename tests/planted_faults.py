"""Copies of small bundles with one fault planted in their weights or in the graphs of their target."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mythos_edge.model.bundle import open_bundle

Values = np.ndarray[Any, Any]


class Planted:
    """A copy of a bundle at ``path``, to be spoilt."""

    def __init__(self, source: Path, path: Path) -> None:
        self.path = Path(shutil.copytree(source, path))

    def weight(self, name: str, change: Callable[[Values], Any]) -> None:
        """Changes the values of a stored tensor in place."""
        for stage in ("prelude", "step", "coda"):
            found = ir.load(self.path / f"{stage}.onnx").graph.initializers.get(name)
            if found is not None:
                tensor = found.const_value
                assert isinstance(tensor, ir.ExternalTensor)
                shape = tensor.shape.numpy()
                place = {"mode": "r+", "offset": tensor.offset, "shape": shape, "dtype": np.float32}
                mapped = np.memmap(self.path / str(tensor.location), **place)
                before = mapped.copy()
                change(mapped)
                assert not np.array_equal(before, mapped), f"{name} is as it was"
                mapped.flush()
                return
        raise KeyError(name)

    def graph(self, stage: str, change: Callable[["Graph"], None]) -> None:
        """Changes the graph of the target that the bundle opens with."""
        manifest = open_bundle(self.path).manifest
        file = self.path / manifest.targets[manifest.default_target].graphs[stage]
        model = ir.load(file)
        change(Graph(model.graph))
        ir.save(model, file)
        listed = json.loads((self.path / "manifest.json").read_text())
        listed["files"][file.name] = {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        (self.path / "manifest.json").write_text(json.dumps(listed))


class Graph:
    """A graph that is changed by the names of weights and values."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._made = 0

    def reader(self, name: str, op_type: str | None = None) -> ir.Node:
        """The first node that reads a value, of this type."""
        nodes = (node for node in self.graph if op_type in (None, node.op_type))
        return next(node for node in nodes if any(value is not None and value.name == name for value in node.inputs))

    def maker(self, name: str) -> ir.Node:
        return next(node for node in self.graph if any(value.name == name for value in node.outputs))

    def first(self, op_type: str, number: int = 0) -> ir.Node:
        return [node for node in self.graph if node.op_type == op_type][number]

    def input(self, name: str) -> ir.Value:
        return next(value for value in self.graph.inputs if value.name == name)

    def before(self, node: ir.Node, op_type: str, value: ir.Value | None, number: Any) -> ir.Value:
        """The result of a new node in front of ``node``: ``value`` and a constant."""
        self._made += 1
        tensor = ir.tensor(np.asarray(number), name=f"planted_{self._made}")
        constant = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        self.graph.register_initializer(constant)
        made = ir.node(op_type, [value, constant])
        made.outputs[0].name = f"planted_value_{self._made}"
        assert node.graph is not None
        node.graph.insert_before(node, made)
        return made.outputs[0]

    def bypass(self, name: str, index: int = 0) -> None:
        """Puts the input ``index`` of the node that makes a value in its place, under its name."""
        node = self.maker(name)
        given = node.inputs[index]
        assert given is not None
        replacement = ir.node("Identity", [given])
        self.graph.insert_before(node, replacement)
        old = node.outputs[0]
        ir.convenience.replace_all_uses_with(old, replacement.outputs[0], replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        replacement.outputs[0].name = name


@dataclass(frozen=True)
class Fault:
    """A fault in a model, and what the deep comparison is to say of it."""

    what: str
    model: str
    plant: Callable[[Planted], None]
    part: str
    step_index: int
    kind: str

    def __str__(self) -> str:
        return f"{self.model}-{self.what}".replace(" ", "_")


def _weight(name: str, change: Callable[[Values], Any]) -> Callable[[Planted], None]:
    return lambda planted: planted.weight(name, change)


def _graph(change: Callable[[Graph], None], stage: str = "step") -> Callable[[Planted], None]:
    return lambda planted: planted.graph(stage, change)


def _put(values: Values, made: Values) -> None:
    values[...] = made.copy()


def _flip(values: Values, place: tuple[int, ...], bit: int) -> None:
    number = values[place].copy().view(np.uint32) ^ np.uint32(1 << bit)
    values[place] = number.view(np.float32)


def _swap(values: Values, one: int, other: int) -> None:
    _put(values, values[[other if i == one else one if i == other else i for i in range(len(values))]])


def _position_late(graph: Graph) -> None:
    node = graph.first("RotaryEmbedding", 1)
    node.replace_input_with(3, graph.before(node, "Add", node.inputs[3], np.int64(1)))


def _other_pairs(graph: Graph) -> None:
    graph.first("RotaryEmbedding", 1).attributes["interleaved"] = ir.AttrInt64("interleaved", 0)


def _no_selection_bias(graph: Graph) -> None:
    bias = graph.reader("step.block.ffn.router_bias")
    ir.convenience.replace_all_uses_with(bias.outputs[0], bias.inputs[0])


def _without_e(graph: Graph) -> None:
    node = graph.reader("step.inject")
    node.replace_input_with(1, graph.before(node, "Mul", node.inputs[1], np.float32(0)))


def _e_left_out_of_input(graph: Graph) -> None:
    graph.bypass(str(graph.maker("observed/injection.0").inputs[0].name))


def _same_loop_step(graph: Graph) -> None:
    for node in [node for node in graph.graph if node.op_type == "Mul"]:
        if node.inputs[1] is not None and node.inputs[1].name == "step.table.sin_frequency":
            node.replace_input_with(0, graph.before(node, "Mul", node.inputs[0], np.float32(0)))


def _lora_row(graph: Graph) -> None:
    node = graph.reader("step.lora.scale", "Gather")
    node.replace_input_with(1, graph.before(node, "Min", node.inputs[1], np.int64(0)))


def _lower_threshold(graph: Graph) -> None:
    node = graph.first("GreaterOrEqual", 1)
    node.replace_input_with(1, graph.before(node, "Mul", node.inputs[1], np.float32(0.5)))


def _eps(name: str) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        graph.reader(name).attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)

    return change


def _other_expert(graph: Graph) -> None:
    equals = (node for node in graph.graph if node.op_type == "Equal")
    node = next(node for node in equals if node.inputs[0].const_value is not None)
    following = graph.before(node, "Add", node.inputs[1], np.int64(1))
    node.replace_input_with(1, graph.before(node, "Mod", following, np.int64(8)))


def _gate_for_up(graph: Graph) -> None:
    product = graph.reader("layers.0.gate_up")
    one, other = graph.reader(str(product.outputs[0].name), "Split").outputs
    uses = [(user, index, value) for value in (one, other) for user, index in value.uses()]
    for user, index, value in uses:
        user.replace_input_with(index, other if value is one else one)


def _narrow_window(graph: Graph) -> None:
    # The mask over cached rows of the first inner layer that has a window.
    maker = graph.maker(str(graph.reader("past_1.keys").outputs[0].name)).name.split("/")[0]
    (mask,) = (node for node in graph.graph.all_nodes() if str(node.name).startswith(f"{maker}/cached/greater"))
    mask.replace_input_with(0, graph.before(mask, "Sub", mask.inputs[0], np.int64(3)))


def _no_norm(graph: Graph) -> None:
    graph.bypass(str(graph.reader("norm.weight").outputs[0].name))


def _no_gate(graph: Graph) -> None:
    graph.bypass(str(graph.maker("rms_norm_12").inputs[0].name))


def _gate_and_up_apart(w: Values) -> None:
    _put(w, w.reshape(8, -1, 2, 96)[:, :, ::-1].reshape(w.shape))


FAULTS = [
    Fault(
        "transposed projection",
        "mla-small",
        _weight("step.block.attn.wo", lambda w: _put(w, w.T)),
        "attention",
        0,
        "weights",
    ),
    Fault(
        "gate and up rows swapped",
        "mla-small",
        _weight("step.block.ffn.fc1", _gate_and_up_apart),
        "experts",
        0,
        "weights",
    ),
    Fault(
        "an expert zeroed", "gqa-small", _weight("step.block.ffn.fc2", lambda w: w[3].fill(0)), "experts", 0, "weights"
    ),
    Fault(
        "a flipped bit that no token reaches",
        "mla-small",
        _weight("embed", lambda w: _flip(w, (330, 7), 0)),
        "prelude",
        0,
        "weights",
    ),
    Fault(
        "a flipped low bit of an expert",
        "gqa-small",
        _weight("step.block.ffn.fc1", lambda w: _flip(w, (5, 3, 2), 1)),
        "experts",
        0,
        "weights",
    ),
    Fault(
        "lora row of one loop step",
        "mla-small",
        _weight("step.lora.scale", lambda w: _swap(w, 2, 3)),
        "lora",
        2,
        "weights",
    ),
    Fault("A above 1", "mla-small", _weight("step.decay", lambda w: w[:4].fill(1.5)), "injection", 0, "weights"),
    Fault(
        "selection bias of zero",
        "mla-small",
        _weight("step.block.ffn.router_bias", lambda w: w.fill(0)),
        "router",
        0,
        "weights",
    ),
    Fault("gate bias dropped", "ouro-small", _weight("gate_bias", lambda w: w.fill(0)), "halting", 0, "weights"),
    Fault("head rows swapped", "ouro-small", _weight("head", lambda w: _swap(w, 3, 200)), "coda", 3, "weights"),
    Fault(
        "embedding rows swapped", "nanbeige-small", _weight("embed", lambda w: _swap(w, 0, 1)), "prelude", 0, "weights"
    ),
    Fault(
        "kv heads tiled",
        "nanbeige-small",
        _weight("layers.1.attn.qkv", lambda w: _put(w, np.roll(w, 16, axis=0))),
        "attention",
        0,
        "weights",
    ),
    Fault(
        "rate of a layer", "dory-small", _weight("layers.step.2.mlp_rate", lambda w: w.fill(1)), "experts", 0, "weights"
    ),
    Fault("logit scale", "dory-small", _weight("logit_scale", lambda w: w.__imul__(1.01)), "coda", 1, "weights"),
    Fault(
        "rotary table late",
        "ouro-small",
        _weight("rope.cos", lambda w: _put(w, np.roll(w, 1, axis=0))),
        "attention",
        0,
        "rotary",
    ),
    Fault("wrong rotary pairing", "mla-small", _graph(_other_pairs), "attention", 0, "rotary"),
    Fault("position off by one", "ouro-small", _graph(_position_late), "attention", 0, "rotary"),
    Fault("selection bias missing", "mla-small", _graph(_no_selection_bias), "router", 0, "graph"),
    Fault("injection without e", "gqa-small", _graph(_without_e), "injection", 0, "graph"),
    Fault("input without e", "mla-small", _graph(_e_left_out_of_input), "injection", 0, "graph"),
    Fault("step_index ignored", "mla-small", _graph(_same_loop_step), "injection", 1, "graph"),
    Fault("lora row always the first", "gqa-small", _graph(_lora_row), "lora", 1, "graph"),
    Fault("threshold off", "mla-small", _graph(_lower_threshold), "halting", 0, "graph"),
    Fault("eps of a norm", "gqa-small", _graph(_eps("step.block.attn_norm.weight")), "attention", 0, "graph"),
    Fault("eps of a norm", "ouro-small", _graph(_eps("layers.1.ffn_norm.weight")), "experts", 0, "graph"),
    Fault(
        "shared expert dropped", "gqa-small", _graph(lambda g: g.bypass("observed/experts.0")), "experts", 0, "graph"
    ),
    Fault("expert index off by one", "mla-small", _graph(_other_expert), "experts", 0, "graph"),
    Fault(
        "post-norm dropped", "ouro-small", _graph(lambda g: g.bypass("observed/attention.1")), "attention", 0, "graph"
    ),
    Fault("gate and up changed", "nanbeige-small", _graph(_gate_for_up), "experts", 0, "graph"),
    Fault("norm of the loop step dropped", "nanbeige-small", _graph(_no_norm), "injection", 0, "graph"),
    Fault("gate dropped", "dory-small", _graph(_no_gate), "attention", 0, "graph"),
    Fault("window too narrow", "dory-small", _graph(_narrow_window), "attention", 0, "graph"),
]
