"""Looks inside a bundle's graphs: the activations beside a named weight, and which experts the router chooses.

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

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BackendUnavailable, BundleError, MythosEdgeError

Array = NDArray[Any]
MOE_NORM = "step.block.ffn_norm.weight"
_ROUTER = "step.block.ffn.router"


class Probe:
    """One graph of a bundle that tells the activations beside ``weights``, and of its own outputs ``kept``.

    Beside a matrix that is what it is multiplied with, beside a norm what the norm makes. Nodes that neither needs
    are not run. Raises BundleError when the graph has no such weight, BackendUnavailable without onnxruntime.
    """

    def __init__(self, path: Path, weights: Sequence[str], kept: Sequence[str] = (), threads: int = 0) -> None:
        model = ir.load(path)
        graph = model.graph
        outputs = [value for value in graph.outputs if value.name in kept]
        self._names = {str(value.name): str(value.name) for value in outputs}
        for weight in weights:
            value = _beside(graph, weight, path)
            value.type = ir.TensorType(ir.DataType.FLOAT)
            self._names[weight] = str(value.name)
            outputs += [] if value in outputs else [value]
        graph.outputs.clear()
        graph.outputs.extend(outputs)
        passes.RemoveUnusedNodesPass()(model)
        self._path = path
        self._session = _session(model, path, threads)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Kept outputs by their name, activations (rows, channels) by the name of the weight."""
        wanted = sorted(set(self._names.values()))
        try:
            found = dict(zip(wanted, self._session.run(wanted, dict(feeds)), strict=True))
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            raise MythosEdgeError(f"{self._path.name}: ONNX Runtime failed: {_one_line(error)}") from error
        return {name: found[value] for name, value in self._names.items()}


@dataclass(frozen=True)
class Router:
    """What chooses experts: ``weight (E, D)``, and ``bias (E,)`` that counts for the choice only."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    top_k: int

    def chosen(self, x: Array) -> NDArray[np.int64]:
        """The experts (rows, k) of each row of ``x (rows, D)``, in no order."""
        logits = x @ self.weight.T + self.bias
        chosen: NDArray[np.int64] = np.argpartition(-logits, self.top_k - 1, axis=-1)[:, : self.top_k]
        return chosen


def router_of(bundle: Bundle) -> Router:
    """The router as the bundle stores it; every target keeps it in float32."""
    stored = stored_weights(bundle, "step")
    weight, bias = (np.array(stored[name].numpy()) for name in (_ROUTER, f"{_ROUTER}_bias"))
    return Router(weight, bias, bundle.manifest.config.n_experts_per_tok)


def stored_weights(bundle: Bundle, stage: str) -> dict[str, ir.TensorProtocol]:
    """The weights of the portable graph of ``stage`` by name, mapped from the file and not read yet."""
    graph = ir.load(bundle.file(bundle.manifest.graphs[stage].file)).graph
    return {name: value.const_value for name, value in graph.initializers.items() if value.const_value is not None}


def _beside(graph: ir.Graph, weight: str, path: Path) -> ir.Value:
    """The activations that meet ``weight``."""
    value = graph.initializers.get(weight)
    uses = [] if value is None else list(value.uses())
    # A weight that is stored narrower goes through a Cast first.
    if len(uses) == 1 and uses[0][0].op_type == "Cast":
        uses = list(uses[0][0].outputs[0].uses())
    if len(uses) != 1:
        raise BundleError(f"{path.name}: {len(uses)} nodes use {weight!r}, expected one: build the target again")
    node = uses[0][0]
    beside = node.outputs[0] if node.op_type.endswith("Normalization") else node.inputs[0]
    assert beside is not None
    return beside


def _session(model: ir.Model, path: Path, threads: int) -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise BackendUnavailable("onnxruntime is not installed", "pip install onnxruntime") from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    # As in the runtime: weights are read from the mapped file, and idle threads leave the cores to others.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        serialized = ir.serde.serialize_model(model).SerializeToString()
        return ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # see Probe.run
        raise BundleError(f"{path.name}: ONNX Runtime can not load it with probes: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
