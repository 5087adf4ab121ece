"""A bundle for deployment: the targets that a device needs, and of the shared weights only what those targets read.

Graphs of ONNX Runtime name tensors of the shared weights by their place in the file. Packing writes those tensors to a
smaller file, and puts the new places into the graphs. Everything else is copied as it is. The identity of the bundle
stays, so saved sessions go on.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from mythos_edge.exporter.graph_checks import all_graphs
from mythos_edge.exporter.stored_graphs import read_stored_graph
from mythos_edge.exporter.weight_file import StoredTensor, WeightFile, plan_file
from mythos_edge.exporter.weights import STORAGE_TYPES, copied_pieces, weights_of
from mythos_edge.model.bundle import Bundle, open_bundle, verify_hashes
from mythos_edge.model.bundle_writer import BundleWriter, require_free_space
from mythos_edge.model.errors import BundleError, ExportError, OSErrorAs
from mythos_edge.model.manifest import WEIGHTS_FILE, FileRecord, GoldenSample, Manifest
from mythos_edge.model.tensor_files import TensorEntry, read_tensor_file

_GRAPH = ".onnx"
_TYPES = {kind.torch: kind.onnx for kind in STORAGE_TYPES.values()}


def pack_bundle(
    bundle: Bundle,
    targets: Sequence[str],
    output: Path,
    sample: GoldenSample,
    *,
    force: bool = False,
    progress: Callable[[str, float], None] = lambda phase, fraction: None,
) -> Bundle:
    """The bundle with ``targets`` alone, written to ``output``; the first is the one that runs when none is asked for.

    ``sample`` is the self-test of the first. Files are compared with their sha256 before they are copied. Raises
    BundleError for a target that the bundle does not have and for a damaged file, and ExportError.
    """
    manifest = bundle.manifest
    records = {name: bundle.target(name) for name in dict.fromkeys(targets)}
    copied = manifest.text_files.union(*map(manifest.files_of, records))
    verify_hashes(bundle, lambda share: progress("hashing the files", share), copied | {WEIGHTS_FILE})
    graphs = {file: read_stored_graph(bundle, file) for file in copied if file.endswith(_GRAPH)}
    entries = read_tensor_file(bundle.file(WEIGHTS_FILE)).entries
    plan = _plan(graphs.values(), entries)
    size = sum(manifest.files[file].bytes for file in copied) + plan.total_bytes
    writer = BundleWriter(output, force=force)
    require_free_space(writer.folder, size)
    with writer, weights_of(bundle) as reader, OSErrorAs(ExportError, f"{output}: cannot be written"):
        if plan.entries:
            pieces = copied_pieces(plan, reader, ExportError, {})
            plan.write(writer.folder / WEIGHTS_FILE, pieces, ExportError, lambda done: progress("weights", done))
        for file, model in graphs.items():
            _move(model, entries, plan)
            (writer.folder / file).write_bytes(model.SerializeToString())
        for index, file in enumerate(sorted(copied - set(graphs))):
            progress("files", index / len(copied))
            with OSErrorAs(ExportError, f"{output}: cannot copy {file} to it"):
                shutil.copyfile(bundle.file(file), writer.folder / file)

        def packed(files: Mapping[str, FileRecord]) -> Manifest:
            return replace(
                manifest,
                graphs={},
                targets=records,
                files=dict(files),
                sample=sample,
                presets={name: preset for name, preset in manifest.presets.items() if preset.target in records},
            )

        writer.finish(packed, known={file: manifest.files[file].sha256 for file in copied - set(graphs)})
    return open_bundle(output)


def _places(graph: onnx.GraphProto) -> Iterator[dict[str, onnx.StringStringEntryProto]]:
    """The places in the shared weights that a graph names, bodies of branches and loops included."""
    for tensor in (tensor for body in all_graphs(graph) for tensor in body.initializer):
        place = {entry.key: entry for entry in tensor.external_data}
        if "location" in place and place["location"].value == WEIGHTS_FILE:
            yield place


def _entry_of(place: Mapping[str, onnx.StringStringEntryProto], entries: Mapping[str, TensorEntry]) -> TensorEntry:
    """The stored tensor that a place lies in; graphs also name parts of one, such as a single expert."""
    start, length = int(place["offset"].value), int(place["length"].value)
    for entry in entries.values():
        if entry.offset <= start and start + length <= entry.offset + entry.n_bytes:
            return entry
    raise BundleError(f"a graph reads byte {start} of {WEIGHTS_FILE}, where no tensor is: export the bundle again")


def _plan(graphs: Iterable[onnx.ModelProto], entries: Mapping[str, TensorEntry]) -> WeightFile:
    """The file of all tensors that ``graphs`` read."""
    read = {_entry_of(place, entries).name for model in graphs for place in _places(model.graph)}
    return plan_file(
        StoredTensor(name, _TYPES[entry.dtype], entry.shape) for name, entry in entries.items() if name in read
    )


def _move(model: onnx.ModelProto, entries: Mapping[str, TensorEntry], plan: WeightFile) -> None:
    """Puts the places of the new file into a graph."""
    for place in _places(model.graph):
        entry = _entry_of(place, entries)
        place["offset"].value = str(plan.entries[entry.name].offset + int(place["offset"].value) - entry.offset)
