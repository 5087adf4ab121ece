"""The inside of a target's own graph: what its parts make, under the names that ``model.observed`` gives them.

A tapped graph is made in memory from a file of the bundle and reads the same weights; nothing is written. What the
graph does not show any more, as in an engine or in a bundle of an earlier version, is missing from what is found.
Not here: running sequences, comparing.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from numpy.typing import NDArray

from mythos_edge.exporter.probes import fed, graph_session, with_whole_rows
from mythos_edge.exporter.stored_graphs import load_stored_graph
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import MythosEdgeError, one_line
from mythos_edge.model.linked_weights import NONE_APART, Apart
from mythos_edge.model.observed import PREFIX, is_tap
from mythos_edge.model.stages import half_of

# What the router chooses by, and what it chose, where a graph has an own node for that.
ROUTER, CHOSEN = "router.0", "chosen.0"
# Outputs of the loop step that are one number a position.
ONE_A_ROW = ("halt_mass_next", "depth_next")


class Taps:
    """One graph of a target that tells what its parts make; ``names`` are those that it shows.

    ``router`` is the name of the router's matrix. ``prepack`` as the target says, ``apart`` see ``linked_weights``.
    With ``outputs`` the graph's own outputs count as taps. Raises BundleError, and BackendUnavailable without
    onnxruntime.
    """

    def __init__(
        self,
        bundle: Bundle,
        file: str,
        router: str | None = None,
        prepack: bool = False,
        apart: Apart = NONE_APART,
        outputs: bool = False,
    ) -> None:
        model, path = load_stored_graph(bundle, file), bundle.file(file)
        graph = model.graph
        shown = {name.removeprefix(PREFIX): value for name, value in _values(graph).items() if is_tap(name)}
        shown |= router_values(graph, router) if router is not None else {}
        if outputs:
            shown |= {str(value.name): value for value in graph.outputs}
        for name, value in shown.items():
            if value.type is None:
                value.type = ir.TensorType(ir.DataType.INT64 if name == CHOSEN else ir.DataType.FLOAT)
        graph.outputs.clear()
        graph.outputs.extend(dict.fromkeys(shown.values()))
        passes.RemoveUnusedNodesPass()(model)
        self.names = tuple(dict.fromkeys(half_of(name)[0] for name in shown))
        self._outputs = {name: str(value.name) for name, value in shown.items()}
        self._path, self._inputs = path, []
        if shown:
            self._session = graph_session(model, path, prepack, apart)
            self._inputs = [value.name for value in self._session.get_inputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The values (rows, channels) of all taps; ``feeds`` may hold more than the graph takes."""
        if not self.names:
            return {}
        try:
            given = {name: fed(feeds, name) for name in self._inputs}
            found = self._session.run(list(self._outputs.values()), given)
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            raise MythosEdgeError(f"{self._path.name}: ONNX Runtime failed: {one_line(error)}") from error
        shown = {name: _rows(np.asarray(value), name) for name, value in zip(self._outputs, found, strict=True)}
        return with_whole_rows(shown)


def _rows(value: NDArray[Any], name: str) -> NDArray[Any]:
    # One number a position, as the halting mass, has no axis of channels; inside a graph rows have no batch.
    alone = value.ndim == 2 and name in ONE_A_ROW
    return value.reshape(-1, 1 if alone else value.shape[-1])


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    return {str(value.name): value for node in graph for value in node.outputs}


def router_values(graph: ir.Graph, matrix: str) -> dict[str, ir.Value]:
    """The scores that experts are chosen by, and the choice, as far as nodes of their own have them."""
    users = [node for node in graph if any(value is not None and value.name == matrix for value in node.inputs[1:])]
    value = users[0].outputs[0] if len(users) == 1 and users[0].op_type in ("Gemm", "MatMul") else None
    while value is not None:
        following = [(node, index) for node, index in value.uses()]
        chooses = next((node for node, index in following if node.op_type == "TopK" and index == 0), None)
        if chooses is not None:
            return {ROUTER: value, CHOSEN: chooses.outputs[1]}
        if any(node.op_type == "QMoE" and index == 1 for node, index in following):
            return {ROUTER: value}
        value = next((node.outputs[0] for node, _ in following if node.op_type == "Add"), None)
    return {}
