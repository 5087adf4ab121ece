"""The options of targets as a manifest holds them, for their builders and their backends. Standard library only.

A target's record has the fields of its kind as a JSON object, which ``options_of`` reads.
"""

from dataclasses import dataclass
from typing import TypeVar

from mythos_edge.model.manifest import TargetRecord
from mythos_edge.model.typed_json import dataclass_from_json

Options = TypeVar("Options")
# The names of nodes that compute with shapes alone begin with it: of a graph for a GPU, the part that the CPU may run.
ON_SHAPES = "on_shapes/"
# pip does not know that the two packages are one module: side by side, the one installed last wins.
ONNXRUNTIME_GPU = "pip uninstall --yes onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"


@dataclass(frozen=True)
class OrtOptions:
    """The options of a target for ONNX Runtime.

    ``asked`` is the value of ``--weights`` that made it. ``block`` values of a rounded row share a scale (0: all of
    them), rounded by ``method``. ``prepacked`` weights are copied into the kernels' own layout when loaded, others are
    read from the mapped file. ``integer_rows``: some products are of 8-bit integers with one scale a row.
    """

    asked: str
    block: int
    method: str
    prepacked: bool
    integer_rows: bool


@dataclass(frozen=True)
class Profile:
    """Rows of a chunk that an engine was tuned for: ``max_rows`` at most, ``opt_rows`` best."""

    opt_rows: int
    max_rows: int


@dataclass(frozen=True)
class EngineSpec:
    """The conditions under which the TensorRT engines of a target can be loaded.

    ``flavour`` is ``rtx`` (TensorRT for RTX) or ``trt``, ``version`` the one that built them, ``compute_capabilities``
    the GPUs they were built for (89 for SM 8.9), ``device`` the one GPU model that the plans of ``trt`` are for ("" for
    ``rtx``). ``layout`` is ``step`` (an engine a stage) or ``loop`` (one with the loop inside). Caches have room for
    ``max_context`` columns and ``max_rows`` beyond, which the padding of a chunk may touch. ``plugin_layers`` counts
    the plugins of each engine, and ``kernels`` is the sha256 of the manifest of the kernels they carry.
    """

    flavour: str
    version: str
    compute_capabilities: tuple[int, ...]
    device: str
    layout: str
    max_context: int
    max_rows: int
    profiles: tuple[Profile, ...]
    plugin_layers: dict[str, int]
    kernels: str


def options_of(record: TargetRecord, kind: type[Options]) -> Options:
    """The options of a target as ``kind``. Raises BundleError for a damaged or edited manifest."""
    return dataclass_from_json(kind, record.options, f"options of a {record.kind} target")
