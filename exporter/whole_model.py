"""One ONNX file with a whole looped model in it, as a bundle's ``model.onnx`` is: the loop step is the body of a Loop.

Whoever made the file, only what it computes is used: the Loop is known by what it carries, and values inside it by the
names that an export gives them, or else by their place in the graph (``matched_values``). Nothing is written.
Not here: comparing.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.inliner import inline_local_functions

from mythos_edge.exporter.matched_values import Structure
from mythos_edge.exporter.probes import graph_session
from mythos_edge.exporter.stored_graphs import loaded, read_single_graph
from mythos_edge.exporter.taps import router_values
from mythos_edge.model.errors import BundleError, MythosEdgeError, one_line
from mythos_edge.model.linked_weights import NONE_APART, Apart
from mythos_edge.model.network import LoopState
from mythos_edge.model.observed import PREFIX, is_tap
from mythos_edge.model.stages import STAGES
from mythos_edge.plugins import ops

Array = NDArray[Any]
INPUTS, OUTPUTS = ("input_ids", "max_depth", "threshold"), ("logits", "depth")
CARRIED = LoopState._fields
# More nodes than any model has, which functions that call functions could become.
_MOST_NODES = 1_000_000
# Longer than a few hundred tokens of any model that fits a machine; a Loop of somebody's file may never end.
_MOST_SECONDS = 1800.0


@dataclass(frozen=True)
class Inside:
    """One pass of a whole model over ids (1, S): what its Loop began with, and what every loop step of M carried on.

    ``begun`` and ``carried`` (M, ...) are by the names of ``LoopState``; ``taps`` by stage and name, those of the loop
    step (M, ...).
    """

    logits: Array
    begun: dict[str, Array]
    carried: dict[str, Array]
    taps: dict[str, dict[str, Array]]


class WholeModel:
    """The model in the file at ``path``; ``router`` is the name of a router's matrix, ``apart`` see
    ``linked_weights``. Raises BundleError for a file that is no such model."""

    def __init__(self, path: Path, router: str | None = None, apart: Apart = NONE_APART) -> None:
        self.path, self.router, self._apart = path, router, apart
        proto = read_single_graph(path)
        self.inputs = _known([value.name for value in proto.graph.input], INPUTS, ("input_ids",), "inputs", path)
        self.outputs = _known([value.name for value in proto.graph.output], OUTPUTS, ("logits",), "outputs", path)
        self._proto = proto
        self._loop_of(self.graph())

    def graph(self) -> ir.Model:
        """The model with its functions in place of their calls, to be changed in memory."""
        _check_functions(self._proto, self.path)
        try:
            whole = onnx.shape_inference.infer_shapes(inline_local_functions(self._proto))
        except (onnx.shape_inference.InferenceError, RuntimeError) as error:
            raise BundleError(f"{self.path}: has functions or shapes that are not sound: {one_line(error)}") from error
        return loaded(whole, self.path)

    @cached_property
    def weights(self) -> dict[str, ir.TensorProtocol]:
        """The weights of the main graph by name, not read yet."""
        values = self.graph().graph.initializers.items()
        return {name: value.const_value for name, value in values if value.const_value is not None}

    def run(self, ids: Array, max_depth: int, threshold: float) -> dict[str, Array]:
        """The outputs by name for ids (1, S)."""
        found = self._ran(self._session, self.outputs, ids, max_depth, threshold)
        return dict(zip(self.outputs, found, strict=True))

    @cached_property
    def _session(self) -> Any:
        return graph_session(loaded(self._proto, self.path), self.path, prepack=False, apart=self._apart)

    def inside(self, ids: Array, max_depth: int, threshold: float, like: "WholeModel | None" = None) -> Inside:
        """All that can be found inside on ids (1, S); values without an export's name by their place in ``like``."""
        model = self.graph()
        graph, loop = model.graph, self._loop_of(model)
        taps = self.taps(model, loop, like)
        step = taps.pop("step")
        scanned = [*(loop.body.outputs[1 + loop.index[name]] for name in CARRIED), *step.values()]
        stacked = _scanned(loop, scanned)
        begun = [loop.node.inputs[2 + loop.index[name]] for name in CARRIED]
        outer = [value for known in taps.values() for value in known.values()]
        logits = next(value for value in graph.outputs if value.name == "logits")
        wanted = [logits, *_named(graph, [*begun, *outer]), *stacked]
        graph.outputs.clear()
        graph.outputs.extend(wanted)
        session = graph_session(model, self.path, prepack=False, apart=self._apart)
        found = iter(self._ran(session, [str(value.name) for value in wanted], ids, max_depth, threshold))
        return Inside(
            next(found),
            {name: next(found) for name in CARRIED},
            **_shared(found, taps, step),
        )

    def taps(self, model: ir.Model, loop: "Loop", like: "WholeModel | None") -> dict[str, dict[str, ir.Value]]:
        """The values that parts make, by stage and name; without ``like`` only those that have an export's names."""
        scopes = {"prelude": model.graph, "step": loop.body, "coda": model.graph}
        found = {stage: _by_name(scopes[stage], stage) for stage in STAGES}
        if self.router is not None:
            found["step"] |= router_values(loop.body, self.router)
        if like is None:
            return found
        other = like.graph()
        theirs = like._loop_of(other)
        known = like.taps(other, theirs, None)
        here = Structure(model.graph, [loop.body], loop.roles(model.graph))
        there = Structure(other.graph, [theirs.body], theirs.roles(other.graph))
        for stage in STAGES:
            for name, value in known[stage].items():
                mine = None if name in found[stage] else here.like(there, value)
                if mine is not None and mine.graph is scopes[stage]:
                    found[stage][name] = mine
        return found

    def _ran(self, session: Any, names: Sequence[str], ids: Array, max_depth: int, threshold: float) -> list[Array]:
        given = {"input_ids": ids, "max_depth": np.array(max_depth), "threshold": np.array(threshold, np.float32)}
        try:
            return _run(session, list(names), {name: given[name] for name in self.inputs})
        except TimeoutError as error:
            raise MythosEdgeError(
                f"{self.path.name}: still ran after {_MOST_SECONDS:g} s on {ids.shape[1]} tokens: it may never end: "
                "look at what its Loop takes for the number of loop steps, or compare on fewer tokens"
            ) from error
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            raise MythosEdgeError(f"{self.path.name}: ONNX Runtime failed: {one_line(error)}") from error

    def _loop_of(self, model: ir.Model) -> "Loop":
        loops = [node for node in model.graph if node.op_type == "Loop" and node.domain in ("", "ai.onnx")]
        fitting = [loop for node in loops if (loop := _loop(node, model.graph)) is not None]
        if len(fitting) != 1:
            raise BundleError(
                f"{self.path}: has {len(loops)} Loops, of which {len(fitting)} carry {', '.join(CARRIED)}, expected "
                "one: give a model.onnx as an export writes it, edited or converted with its Loop left in place"
            )
        return fitting[0]


@dataclass(frozen=True)
class Loop:
    """A Loop that carries the state of a looped model, and in which places."""

    node: ir.Node
    body: ir.Graph
    index: Mapping[str, int]

    def roles(self, graph: ir.Graph) -> dict[ir.Value, str]:
        """The values that every such model has."""
        inside = {self.body.inputs[2 + at]: name for name, at in self.index.items()}
        ends = {self.body.outputs[1 + at]: f"{name}_next" for name, at in self.index.items()}
        outer = {value: str(value.name) for value in (*graph.inputs, *graph.outputs)}
        return {self.body.inputs[0]: "step_index", **inside, **ends, **outer}


def _run(session: Any, names: list[str], feeds: dict[str, Array]) -> list[Array]:
    """One run, which Ctrl-C ends, too. Raises TimeoutError."""
    import onnxruntime as ort

    options = ort.RunOptions()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(session.run, names, feeds, options)
        try:
            found: list[Array] = running.result(_MOST_SECONDS)
        except BaseException:
            options.terminate = True  # else the thread would be waited for
            raise
    return found


def _known(found: Sequence[str], known: Sequence[str], needed: Sequence[str], what: str, path: Path) -> tuple[str, ...]:
    if set(found) - set(known) or set(needed) - set(found):
        told = ", ".join(name[:40] for name in found[:6]) or "none"
        raise BundleError(
            f"{path}: has the {what} {told}, expected {', '.join(known)}: give a model.onnx as an export writes it"
        )
    return tuple(found)


def _check_functions(model: onnx.ModelProto, path: Path) -> None:
    """Raises BundleError for functions that are gone, that call each other in a circle, or become too many nodes."""
    functions = {(one.domain, one.name): one.node for one in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(nodes: Any, within: tuple[tuple[str, str], ...]) -> int:
        total = 0
        for node in nodes:
            key = node.domain, node.op_type
            if node.domain == ops.DOMAIN and key not in functions:
                raise BundleError(
                    f"{path}: calls {node.domain}.{node.op_type}, which it does not define: a tool dropped the "
                    "functions, so let it convert the graph of standard ops that mythos-edge inline writes"
                )
            if key in within or len(within) > 50 or total > _MOST_NODES:
                raise BundleError(f"{path}: has functions that become too many nodes: do not trust this file")
            if key in functions and key not in sizes:
                sizes[key] = size(functions[key], (*within, key))
            total += sizes.get(key, 1)
            total += sum(size(one.g.node, within) for one in node.attribute if one.HasField("g"))
        return total

    size(model.graph.node, ())


def _loop(node: ir.Node, graph: ir.Graph) -> Loop | None:
    """The Loop of a looped model; None of another one."""
    body = node.attributes["body"].as_graph() if "body" in node.attributes else None
    count = len(node.inputs) - 2
    if body is None or count < len(CARRIED) or len(body.inputs) != count + 2 or len(node.outputs) < count:
        return None
    of_logits = _reached(next(value for value in graph.outputs if value.name == "logits"), node)
    begun = node.inputs[2:]
    depth = [at for at in range(count) if body.inputs[2 + at].dtype == ir.DataType.INT64]
    states = [at for at in range(count) if at not in depth and at not in of_logits and _is_computed(begun[at])]
    masses = [at for at in range(count) if at not in depth and at not in of_logits and at not in states]
    if any(len(found) != 1 for found in (depth, of_logits, states, masses)):
        return None
    return Loop(node, body, {"h": states[0], "out": of_logits[0], "halt_mass": masses[0], "depth": depth[0]})


def _reached(value: ir.Value, node: ir.Node) -> list[int]:
    """The outputs of ``node`` that a value is computed from."""
    found, seen, left = set(), set(), [value]
    while left:
        one = left.pop()
        maker = one.producer()
        if one in seen or maker is None:
            continue
        seen.add(one)
        if maker is node:
            found.add(one.index())
        else:
            left += [given for given in maker.inputs if given is not None]
    return sorted(at for at in found if at is not None)


def _is_computed(value: ir.Value | None) -> bool:
    """Whether a state begins with more than one number everywhere, as zeros are."""
    maker = None if value is None else value.producer()
    while maker is not None and maker.op_type in ("Identity", "Cast", "Reshape", "Expand"):
        given = maker.inputs[0]
        maker = None if given is None else given.producer()
    return maker is not None and maker.op_type not in ("ConstantOfShape", "Constant")


def _by_name(graph: ir.Graph, stage: str) -> dict[str, ir.Value]:
    values = {str(value.name): value for node in graph for value in node.outputs}
    own = {name.removeprefix(f"{stage}/"): value for name, value in values.items() if name.startswith(f"{stage}/")}
    taps = {name.removeprefix(PREFIX): value for name, value in own.items() if is_tap(name)}
    return taps | {name: value for name, value in own.items() if name.startswith("rows_") and name[5:].isdigit()}


def _scanned(loop: Loop, values: Sequence[ir.Value]) -> list[ir.Value]:
    """The values of a body as outputs of its Loop, one row a loop step."""
    before = len(loop.node.outputs)
    loop.node.resize_outputs(before + len(values))
    for number, value in enumerate(values):
        copy = ir.node("Identity", [value])
        copy.outputs[0].name = f"looked_into_{number}"
        loop.body.append(copy)
        loop.body.outputs.append(copy.outputs[0])
        copy.outputs[0].type = value.type
        made = loop.node.outputs[before + number]
        made.name, made.type = f"seen_by_loop_step_{number}", value.type
    return list(loop.node.outputs[before:])


def _named(graph: ir.Graph, values: Sequence[ir.Value | None]) -> list[ir.Value]:
    """The values of the main graph under names of their own, so that each can be an output."""
    made = []
    for number, value in enumerate(values):
        copy = ir.node("Identity", [value])
        copy.outputs[0].name = f"seen_{number}"
        copy.outputs[0].type = None if value is None else value.type
        graph.append(copy)
        made.append(copy.outputs[0])
    return made


def _shared(found: Any, taps: Mapping[str, Any], step: Mapping[str, Any]) -> dict[str, Any]:
    outer = {stage: {name: next(found) for name in known} for stage, known in taps.items()}
    carried = {name: next(found) for name in CARRIED}
    return {"carried": carried, "taps": {**outer, "step": {name: next(found) for name in step}}}
