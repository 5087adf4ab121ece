"""The graphs of a bundle, checked before anything is made of them: the manifest that lists their hashes may be a
stranger's, too.

A graph must be sound ONNX with the inputs and outputs that the manifest says, and take its weights from files of the
bundle, within these.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import onnx
import onnx_ir as ir

from mythos_edge.exporter.graph_checks import all_graphs
from mythos_edge.exporter.graph_difference import read_graph
from mythos_edge.model.bounded_files import open_regular
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BundleError, one_line
from mythos_edge.model.manifest import FileRecord, GraphSpec, TensorSpec

# Digits of the number of a byte.
_MOST_DIGITS = 18
# Bits of the types that share bytes, by the ends of their names.
_NARROW = {"INT4": 4, "INT2": 2, "FLOAT4E2M1": 4}


def read_stored_graph(bundle: Bundle, file: str) -> onnx.ModelProto:
    """The graph in a listed file, whose weights lie where they may. Raises BundleError."""
    path = bundle.file(file)
    model = read_graph(path)
    for tensor in _tensors(model):
        if (fault := _misplaced(tensor, bundle.manifest.files)) is not None:
            raise BundleError(f"{path}: the weight {tensor.name[:80]!r} {fault}: do not trust this bundle")
    return model


def load_stored_graph(bundle: Bundle, file: str) -> ir.Model:
    """The graph in a listed file, to be changed in memory; its weights are not read yet. Raises BundleError."""
    return loaded(read_stored_graph(bundle, file), bundle.file(file))


def read_single_graph(path: Path) -> onnx.ModelProto:
    """A graph that comes without a bundle, whose weights lie in its own folder. Raises BundleError."""
    model = read_graph(path)
    tensors = list(_tensors(model))
    files = _beside(path, (tensor for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL))
    for tensor in tensors:
        if (fault := _misplaced(tensor, files, "file of its folder")) is not None:
            raise BundleError(f"{path}: the weight {tensor.name[:80]!r} {fault}: do not trust this file")
    try:
        # By its name, as the checker looks for the files of weights beside it.
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise BundleError(f"{path}: is no sound ONNX graph: {one_line(error)}: export it again") from error
    return model


def _beside(path: Path, tensors: Iterable[onnx.TensorProto]) -> dict[str, FileRecord]:
    """The files that weights name, as far as they are regular files that lie in the graph's folder."""
    folder, found = path.resolve().parent, {}
    told = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    for location in told:
        try:
            if (folder / location).resolve().is_relative_to(folder):
                with open_regular(folder / location) as file:
                    found[location] = FileRecord(os.fstat(file.fileno()).st_size, "")
        except (OSError, ValueError):
            continue  # a name that no file can have, or one that is not there: no file of the folder
    return found


def loaded(model: onnx.ModelProto, path: Path) -> ir.Model:
    """A graph that was read from ``path``, and checked, to be changed in memory."""
    made = ir.serde.deserialize_model(model)
    ir.external_data.set_base_dir(made.graph, path.parent)
    return made


def check_stored_graphs(bundle: Bundle) -> None:
    """Raises BundleError unless every graph of the export is one that an export can have written."""
    for spec in bundle.manifest.graphs.values():
        model = read_stored_graph(bundle, spec.file)
        path = bundle.path / spec.file
        try:
            # By its name, as the checker looks for the files of weights beside it.
            onnx.checker.check_model(str(path))
        except (onnx.checker.ValidationError, ValueError) as error:
            raise BundleError(f"{path}: is no sound ONNX graph: {one_line(error)}: do not trust this bundle") from error
        _check_ends(model, spec, path)


def _check_ends(model: onnx.ModelProto, spec: GraphSpec, path: Path) -> None:
    for kind, found, listed in (
        ("inputs", model.graph.input, spec.inputs),
        ("outputs", model.graph.output, spec.outputs),
    ):
        names = [value.name for value in found]
        if names != [tensor.name for tensor in listed] or not all(map(_fits, found, listed)):
            raise BundleError(f"{path}: its {kind} are not those that the manifest lists: export the bundle again")


def _fits(value: onnx.ValueInfoProto, listed: TensorSpec) -> bool:
    kind = value.type.tensor_type
    known = kind.elem_type in onnx.TensorProto.DataType.values()
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name if known and kind.elem_type else None
    return dtype == listed.dtype and len(kind.shape.dim) == len(listed.shape)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph, those in bodies, functions and attributes too."""
    graphs = list(all_graphs(model.graph))
    nodes = [node for graph in graphs for node in graph.node]
    for node in (node for function in model.functions for node in function.node):
        bodies = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        inner = [one for body in bodies for one in all_graphs(body)]
        graphs += inner
        nodes += [node, *(one for graph in inner for one in graph.node)]
    for graph in graphs:
        yield from graph.initializer
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else []))


def _misplaced(
    tensor: onnx.TensorProto, files: Mapping[str, FileRecord], place: str = "file of the bundle"
) -> str | None:
    """Says where a weight lies that it may not; None for one in its place, or inside of the graph."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    keys = [entry.key for entry in tensor.external_data]
    told = {entry.key: entry.value for entry in tensor.external_data}
    location, offset, length = (told.get(key, "") for key in ("location", "offset", "length"))
    if len(keys) != len(told) or location not in files:
        return f"lies in {location[:80]!r}, which is no {place}"
    if not all(number.isascii() and number.isdigit() and len(number) <= _MOST_DIGITS for number in (offset, length)):
        return f"lies at {offset[:80]!r} and has {length[:80]!r} bytes"
    if int(offset) + int(length) > files[location].bytes:
        return f"ends at byte {int(offset) + int(length)} of {location}, which has {files[location].bytes}"
    known = tensor.data_type in onnx.TensorProto.DataType.values() and tensor.data_type
    wanted = _bytes_of(tensor) if known else None
    if min(tensor.dims, default=0) < 0 or wanted != int(length):
        return f"has {length} bytes and the shape {list(tensor.dims)[:8]}"
    return None


def _bytes_of(tensor: onnx.TensorProto) -> int:
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    whole = int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize) * 8
    bits = next((own for end, own in _NARROW.items() if name.endswith(end)), whole)
    n_bytes: int = -(-prod(tensor.dims) * bits // 8)
    return n_bytes
