"""The weights that a target's own graphs read, as the values they stand for, whatever form they have there.

A matrix may be in one piece, one piece an expert, or rounded. Not here: native engines, which show no weights.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mythos_edge.exporter.probes import in_bundle
from mythos_edge.exporter.rounding import unpacked
from mythos_edge.exporter.stored_graphs import load_stored_graph
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.families.table import config_of
from mythos_edge.model.layout import experts_of, recipes
from mythos_edge.model.stages import STAGES

Array = NDArray[Any]
# How far a value may be from its code, in codes: half of one where a row's largest value sets the scale. A scale that
# was searched for may cut off the largest value of a block.
_NEAREST, _SEARCHED = 0.501, 2.0
_CODES, _SCALE = ".q", ".scale"


@dataclass(frozen=True)
class _Stored:
    """How a graph reads a matrix: whole, in one piece an expert, or as codes and scales of ``bits``."""

    pieces: tuple[ir.TensorProtocol, ...]
    scales: tuple[ir.TensorProtocol, ...] = ()
    bits: int = 0


@dataclass
class TargetWeights:
    """The weights of a target of ``bundle``; without a ``target``, those of the portable graphs."""

    bundle: Bundle
    target: str | None
    _stored: dict[str, dict[str, _Stored]] = field(default_factory=dict)
    _expert: tuple[Any, Array, Array] | None = None

    def __post_init__(self) -> None:
        self._shapes = {
            one.name: one.shape for one in recipes(config_of(self.bundle.manifest), self.bundle.manifest.max_context)
        }
        experts = experts_of(config_of(self.bundle.manifest))
        # Rows of gate and up take turns in the bundle, and are parted where they are rounded.
        self._parted = None if experts is None else experts.fc1
        for stage in STAGES:
            file = (
                self.bundle.manifest.graphs[stage].file
                if self.target is None
                else self.bundle.target(self.target).graphs[stage]
            )
            graph = load_stored_graph(self.bundle, file).graph
            self._stored[stage] = {name: one for name in self._shapes if (one := self._found(graph, name)) is not None}

    def stages_of(self, name: str) -> list[str]:
        """The stages whose graphs read a matrix; of those that read the same bytes, the first."""
        found: list[str] = []
        seen: list[Any] = []
        for stage, stored in self._stored.items():
            place = [_place(tensor) for tensor in stored[name].pieces] if name in stored else None
            if place is not None and place not in seen:
                found.append(stage)
                seen.append(place)
        return found

    @property
    def rounded(self) -> set[str]:
        """The matrices that are rounded."""
        return {name for stored in self._stored.values() for name, one in stored.items() if one.bits}

    def read(self, stage: str, name: str, start: int, stop: int | None = None) -> tuple[Array, Array | float]:
        """The values ``start .. stop`` of a matrix, flat, and by how much rounding may have moved each."""
        stored, shape = self._stored[stage][name], self._shapes[name]
        stop = int(np.prod(shape)) if stop is None else stop
        if not stored.bits and len(stored.pieces) == 1:
            return _flat(stored.pieces[0])[start:stop].astype(np.float32), 0.0
        size = int(np.prod(shape[1:])) if len(shape) == 3 else int(np.prod(shape))
        values, bounds = [], []
        while start < stop:
            piece, at = divmod(start, size)
            count = min(stop - start, size - at)
            made, bound = self._piece(stage, name, piece, at, at + count)
            values.append(made)
            bounds.append(bound)
            start += count
        return np.concatenate(values), np.concatenate(bounds)

    def _piece(self, stage: str, name: str, piece: int, start: int, stop: int) -> tuple[Array, Array]:
        """Values of one expert's matrix, or of the only one."""
        key = stage, name, piece
        if self._expert is None or self._expert[0] != key:
            self._expert = (key, *self._matrix(stage, name, piece))
        _, values, bound = self._expert
        return values[start:stop], bound[start:stop]

    def _matrix(self, stage: str, name: str, piece: int) -> tuple[Array, Array]:
        stored, shape = self._stored[stage][name], self._shapes[name]
        apart = len(stored.pieces) > 1
        codes = stored.pieces[piece if apart else 0].numpy()
        if not stored.bits:
            flat = codes.reshape(-1).astype(np.float32)
            return flat, np.zeros_like(flat)
        scales = stored.scales[piece if apart else 0].numpy()
        if len(shape) == 3 and not apart:
            codes, scales = codes[piece], scales[piece]
        rows, columns = shape[-2:]
        row_bytes = codes.reshape(len(codes), -1)
        width = columns if codes.dtype == np.int8 else row_bytes.shape[1] * 8 // stored.bits
        given = row_bytes if codes.dtype == np.int8 else row_bytes.reshape(*scales.shape, -1)
        values = unpacked(given[..., :width] if codes.dtype == np.int8 else given, scales, stored.bits, width)
        steps = np.abs(scales if scales.ndim == 2 else scales[:, None]).astype(np.float32)
        off = _NEAREST if codes.dtype == np.int8 else _SEARCHED
        bounds = np.repeat(steps * off, values.shape[1] // steps.shape[1], axis=1)
        if name == self._parted and codes.dtype == np.int8:
            half = len(values) // 2
            values, bounds = (np.stack([one[:half], one[half:]], axis=1).reshape(one.shape) for one in (values, bounds))
        return values[:rows, :columns].reshape(-1), bounds[:rows, :columns].reshape(-1)

    def _found(self, graph: ir.Graph, name: str) -> _Stored | None:
        def tensors(stem: str) -> tuple[ir.TensorProtocol, ...]:
            count = self._shapes[name][0]
            whole = graph.initializers.get(stem)
            values = [whole] if whole is not None else [graph.initializers.get(f"{stem}@{i}") for i in range(count)]
            found = [value.const_value for value in values if value is not None]
            return (
                tuple(in_bundle(self.bundle, one) for one in found if one is not None)
                if len(found) == len(values)
                else ()
            )

        if pieces := tensors(name):
            return _Stored(pieces)
        codes, scales = tensors(name + _CODES), tensors(name + _SCALE)
        if not codes or not scales:
            return None
        return _Stored(codes, scales, 8 if codes[0].dtype == ir.DataType.INT8 else _bits_of(graph, name + _CODES))


def _bits_of(graph: ir.Graph, codes: str) -> int:
    """The bits of a code, as the kernel that reads them is told."""
    readers = [node for node, _ in graph.initializers[codes].uses()]
    for node in readers:
        if node.op_type == "Reshape":
            readers += [node for node, _ in node.outputs[0].uses()]
        for name in ("bits", "expert_weight_bits"):
            if name in node.attributes:
                return node.attributes[name].as_int()
    return 8


def _place(tensor: ir.TensorProtocol) -> Any:
    if isinstance(tensor, ir.ExternalTensor):
        return str(tensor.location), tensor.offset, tensor.length
    return tensor.numpy().tobytes()


def _flat(tensor: ir.TensorProtocol) -> Array:
    flat: Array = tensor.numpy().reshape(-1)
    return flat
