"""The graphs of a bundle in standard ops alone, for engines that read no functions: ``<name>.portable.onnx``.

They stand beside the graphs with ops of ours, which lowerings and TensorRT's plugins need, and share their weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx.inliner import inline_local_functions

from mythos_edge.exporter.graph_checks import all_graphs, check_graph
from mythos_edge.exporter.stored_graphs import check_stored_graphs
from mythos_edge.exporter.targets.build import files_beside, install_into
from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.manifest import STANDARD_OPS, FileRecord, GraphSpec, Manifest

# ONNX's own ops, under the two names of their domain.
_STANDARD = ("", "ai.onnx")


def write_portable(graphs: Mapping[str, GraphSpec], source: Path, folder: Path) -> dict[str, GraphSpec]:
    """Writes every graph of ``source`` to ``folder`` in standard ops alone; the graphs of a manifest with them."""
    made = {}
    for name, spec in graphs.items():
        if name.endswith(STANDARD_OPS):
            continue
        # The weights stay where they are: what is loaded and written refers to their file.
        model = _inlined(onnx.load(source / spec.file, load_external_data=False))
        _check(model)
        portable = f"{name}{STANDARD_OPS}"
        onnx.save(model, folder / f"{portable}.onnx")
        made[portable] = replace(spec, file=f"{portable}.onnx")
    return {**graphs, **made}


def inline_bundle(path: Path, progress: Callable[[str, float], None] = lambda phase, fraction: None) -> Bundle:
    """The bundle at ``path`` with its portable graphs added, or made again. Raises BundleError and BuildError."""
    bundle = open_bundle(path)
    with files_beside(bundle, "portable", progress) as folder:
        check_stored_graphs(bundle)
        graphs = write_portable(bundle.manifest.graphs, bundle.path, folder)
        made = {name: spec for name, spec in graphs.items() if name.endswith(STANDARD_OPS)}

        def with_graphs(now: Manifest, names: Mapping[str, str], records: Mapping[str, FileRecord]) -> Manifest:
            before = set(portable_files(now.graphs).values())
            return replace(
                now,
                graphs={**now.graphs, **{name: replace(spec, file=names[spec.file]) for name, spec in made.items()}},
                files={file: record for file, record in now.files.items() if file not in before}
                | {names[file]: record for file, record in records.items()},
            )

        return install_into(bundle, folder, with_graphs)


def portable_files(graphs: Mapping[str, GraphSpec]) -> dict[str, str]:
    """The portable graphs among those of a manifest: the name of what each is a form of -> file."""
    return {name.removesuffix(STANDARD_OPS): spec.file for name, spec in graphs.items() if name.endswith(STANDARD_OPS)}


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every function in place of its calls, in the bodies of loops and branches, too."""
    inlined = inline_local_functions(model)
    standard = [opset for opset in inlined.opset_import if opset.domain in _STANDARD]
    del inlined.opset_import[:]
    inlined.opset_import.extend(standard)
    return inlined


def _check(model: onnx.ModelProto) -> None:
    foreign = {node.domain for graph in all_graphs(model.graph) for node in graph.node} - set(_STANDARD)
    assert not foreign, f"ops of {foreign} are left"
    assert not model.functions
    check_graph(ir.from_proto(model))
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
