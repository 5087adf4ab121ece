"""Looks inside a bundle's graphs: what a named matrix is multiplied with, and which experts the router chooses.

A probed graph is made in memory from a file of the bundle and reads the same weights; nothing is written.
Not here: running sequences. A probe knows one graph.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from numpy.typing import NDArray

from mythos_edge.exporter.stored_graphs import load_stored_graph
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BundleError, MythosEdgeError, one_line, unavailable
from mythos_edge.model.families.table import config_of
from mythos_edge.model.layout import experts_of
from mythos_edge.model.linked_weights import NONE_APART, Apart, lent_weights
from mythos_edge.model.machine import cores
from mythos_edge.model.manifest import EXACT_TIE_MARGIN
from mythos_edge.model.stages import HALVES, half_name, half_of

Array = NDArray[Any]


class Probe:
    """One graph of a bundle that tells what ``matrices`` are multiplied with, and of its own outputs ``kept``.

    Nodes that neither needs are not run; ``prepack`` as the target says, ``apart`` see ``linked_weights``. Raises
    BundleError when the graph has no such matrix, BackendUnavailable without onnxruntime.
    """

    def __init__(
        self,
        bundle: Bundle,
        file: str,
        matrices: Sequence[str],
        kept: Sequence[str] = (),
        prepack: bool = False,
        apart: Apart = NONE_APART,
    ) -> None:
        model, path = load_stored_graph(bundle, file), bundle.file(file)
        graph = model.graph
        probed = {matrix: _multiplied(graph, matrix, path) for matrix in matrices}
        for value in probed.values():
            value.type = ir.TensorType(ir.DataType.FLOAT)
        outputs = [value for value in graph.outputs if value.name in kept]
        graph.outputs.clear()
        graph.outputs.extend(dict.fromkeys([*outputs, *probed.values()]))
        self._kept = tuple(kept)
        self._probed = {matrix: str(value.name) for matrix, value in probed.items()}
        passes.RemoveUnusedNodesPass()(model)
        self._path = path
        self._session = graph_session(model, path, prepack, apart)
        self._inputs = [value.name for value in self._session.get_inputs()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Kept outputs by their name, activations (rows, channels) by the name of the matrix.

        ``feeds`` may hold more than the graph takes: portable and lowered graphs know positions by different inputs.
        """
        given = {name: fed(feeds, name) for name in self._inputs}
        wanted = list(dict.fromkeys([*self._kept, *self._probed.values()]))
        try:
            found = dict(zip(wanted, self._session.run(wanted, given), strict=True))
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            raise MythosEdgeError(f"{self._path.name}: ONNX Runtime failed: {one_line(error)}") from error
        rows = {matrix: found[value].reshape(-1, found[value].shape[-1]) for matrix, value in self._probed.items()}
        return {name: found[name] for name in self._kept} | rows


def fed(feeds: Mapping[str, Array], name: str) -> Array:
    """The array among ``feeds`` for an input of a graph, which may take halves of rows that are fed whole."""
    rows, half = half_of(name)
    return np.split(feeds[rows], len(HALVES), axis=-1)[HALVES.index(half)] if half else feeds[name]


def with_whole_rows(values: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of a graph by name, with whole rows in the place of halves of them."""
    whole: dict[str, Array] = {}
    for name, value in values.items():
        rows, half = half_of(name)
        if not half:
            whole[name] = value
        elif rows not in whole:
            whole[rows] = np.concatenate([values[half_name(rows, each)] for each in HALVES], axis=-1)
    return whole


@dataclass(frozen=True)
class Router:
    """The weights that choose experts: ``weight (E, D)``, and ``bias (E,)`` that counts for the choice only.

    Every target multiplies ``weight``, which it knows by ``name``, in float32 with what the experts see, too.
    """

    name: str
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    top_k: int

    def chosen(self, x: Array) -> NDArray[np.int64]:
        """The experts (rows, k) of each row of ``x (rows, D)``, best first, of equal ones the lowest index first."""
        logits = x @ self.weight.T + self.bias
        chosen: NDArray[np.int64] = np.argsort(-logits, axis=-1, kind="stable")[:, : self.top_k]
        return chosen

    def entropy(self, x: Array) -> NDArray[np.float64]:
        """How undecided the router is on each row of ``x (rows, D)``, in nats: 0, or log E where all are alike to it.

        It is the entropy of the softmax of its logits over all experts. The bias, which balances loads, says nothing.
        """
        logits = (x @ self.weight.T).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        shares = np.exp(logits)
        total = shares.sum(axis=-1)
        entropy: NDArray[np.float64] = np.log(total) - (shares * logits).sum(axis=-1) / total
        return entropy

    def tied(self, x: Array) -> NDArray[np.bool_]:
        """Whether for each row of ``x (rows, D)`` an expert that is not chosen is as good as the last of the chosen.

        Exactly as good: that rounding turns a near tie over is what rounding costs.
        """
        best = -np.sort(-(x @ self.weight.T + self.bias), axis=-1)
        if self.top_k == best.shape[-1]:
            return np.zeros(len(best), np.bool_)
        tied: NDArray[np.bool_] = best[:, self.top_k - 1] - best[:, self.top_k] < EXACT_TIE_MARGIN
        return tied


def router_of(bundle: Bundle) -> Router | None:
    """The router as the bundle stores it; None of a model without experts."""
    experts = experts_of(config_of(bundle.manifest))
    if experts is None:
        return None
    stored = stored_weights(bundle, "step")
    weight, bias = (np.array(stored[name].numpy()) for name in (experts.router, experts.router_bias))
    return Router(experts.router, weight, bias, bundle.manifest.model.experts_per_token)


def multiplied_in(bundle: Bundle, file: str, matrices: Sequence[str]) -> list[str]:
    """Those of ``matrices`` that a graph of the bundle multiplies something with. Raises BundleError."""
    graph = load_stored_graph(bundle, file).graph
    return [matrix for matrix in matrices if _users(graph, matrix)]


def stored_weights(bundle: Bundle, stage: str) -> dict[str, ir.TensorProtocol]:
    """The weights of the portable graph of ``stage`` by name, mapped from the file and not read yet."""
    file = bundle.manifest.graphs[stage].file
    graph = load_stored_graph(bundle, file).graph
    tensors = {name: value.const_value for name, value in graph.initializers.items()}
    return {name: in_bundle(bundle, tensor) for name, tensor in tensors.items() if tensor is not None}


def in_bundle(bundle: Bundle, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor, of the file that a link in the bundle leads to: onnx_ir follows none."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    file = bundle.file(str(tensor.location)).resolve()
    place = (file.name, tensor.offset, tensor.length, tensor.dtype)
    return ir.ExternalTensor(*place, shape=tensor.shape, name=str(tensor.name), base_dir=file.parent)


def _users(graph: ir.Graph, matrix: str) -> list[ir.Node]:
    # A matrix that is stored narrower is used as its float32 copy. The first input is what is looked up in or cast.
    names = (matrix, f"{matrix}.fp32")
    return [node for node in graph if any(value is not None and value.name in names for value in node.inputs[1:])]


def _multiplied(graph: ir.Graph, matrix: str, path: Path) -> ir.Value:
    users = _users(graph, matrix)
    if len(users) != 1:
        raise BundleError(f"{path.name}: {len(users)} nodes use {matrix!r}, expected one: build the target again")
    x = users[0].inputs[0]
    assert x is not None
    return x


def graph_session(model: ir.Model, path: Path, prepack: bool, apart: Apart) -> Any:
    """A session on the CPU of a graph changed in memory, which reads the weights of the file at ``path``."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise unavailable(error, "comparing targets", "pip install onnxruntime") from error
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = cores()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    # As in the runtime: float32 weights are read from the mapped file, and idle threads leave the cores to others.
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        serialized = ir.serde.serialize_model(model).SerializeToString()
        with lent_weights(options, apart):
            return ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # see Probe.run
        raise BundleError(f"{path.name}: ONNX Runtime cannot load it with probes: {one_line(error)}") from error
