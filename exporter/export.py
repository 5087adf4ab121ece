"""Checkpoint in, bundle out: traces the stages while the weights stream to disk, then weaves, lowers and checks.

The bundle appears whole or not at all. Memory does not grow with the model: no tensor is ever whole in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import onnx
import onnx_ir as ir

from mythos_edge.exporter import loop_graph
from mythos_edge.exporter.portable import write_portable
from mythos_edge.exporter.sample import golden_sample
from mythos_edge.exporter.targets.ort_files import exported_record
from mythos_edge.exporter.tokenizer_files import TOKENIZER_FILE, tokenizer_for
from mythos_edge.exporter.tracing import tracing
from mythos_edge.exporter.weights import (
    STORAGE_TYPES,
    WeightsHashes,
    plan_weights,
    write_weights,
)
from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.bundle_writer import BundleWriter, require_free_space
from mythos_edge.model.checkpoint import Checkpoint
from mythos_edge.model.config import MythosConfig
from mythos_edge.model.errors import ConfigError, ExportError
from mythos_edge.model.manifest import (
    MOST_CONTEXT,
    WEIGHTS_FILE,
    FileRecord,
    GraphSpec,
    Manifest,
    Source,
    TensorSpec,
    bundle_identity,
)
from mythos_edge.model.stages import STAGES
from mythos_edge.plugins.torch_ops import add_functions

_GRAPHS_BYTES = 16 << 20
_LIBRARIES = ("mythos-edge", "torch", "onnx", "onnx-ir", "onnxscript")

Progress = Callable[[str, float], None]


def export_bundle(
    checkpoint: Checkpoint,
    output: Path,
    *,
    dtype: str = "fp32",
    max_context: int | None = None,
    tokenizer: Path | None = None,
    end_tokens: Sequence[str] = (),
    force: bool = False,
    portable: bool = False,
    progress: Progress = lambda phase, fraction: None,
    note: Callable[[str], None] = lambda text: None,
) -> Bundle:
    """The bundle written to ``output``; ``progress`` is told the phase and the fraction of it that is done.

    ``max_context`` (positions) defaults to the checkpoint's ``max_seq_len``; ``dtype`` is the storage dtype of the
    large weights. ``tokenizer`` is a tokenizer.json or its folder, which also says which tokens end a text, unless
    ``end_tokens`` do: their texts, or their ids where there is no tokenizer. ``note`` is told what is worth knowing
    of the bundle. ``portable`` adds the graphs in standard ops alone.
    Raises ExportError, CheckpointError (a weight that is not finite) and ConfigError.
    """
    if dtype not in STORAGE_TYPES:
        raise ExportError(f"dtype is {dtype!r}, expected one of {', '.join(STORAGE_TYPES)}")
    config = checkpoint.config
    context = config.max_seq_len if max_context is None else max_context
    for name in ("prelude_layers", "coda_layers"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}: a model without these layers cannot be exported")
    if not 1 <= context <= MOST_CONTEXT:
        raise ExportError(
            f"max_context is {context}, expected at least 1 and at most {MOST_CONTEXT}: lower it with --max-context"
        )
    if checkpoint.stored_table is not None:
        checkpoint.stored_table.check_length(context, str(checkpoint.path))
    text = tokenizer_for(tokenizer, end_tokens, config.vocab_size)
    plan = plan_weights(config, context, dtype)
    writer = BundleWriter(output, force=force)
    require_free_space(writer.folder, plan.file.total_bytes + _GRAPHS_BYTES)
    with writer, _disk_errors(output):
        folder = writer.folder
        with tracing(config, context, dtype, folder) as finish_tracing:
            hashes = write_weights(
                plan,
                checkpoint,
                folder / WEIGHTS_FILE,
                lambda done: progress("weights", done),
            )
            progress("graphs", 0.0)
            finish_tracing()
        graphs = _write_graphs(config, folder, progress)
        if portable:
            graphs = write_portable(graphs, folder, folder)
        stages = {stage: ir.load(folder / f"{stage}.onnx") for stage in STAGES}
        if text.data is not None:
            (folder / TOKENIZER_FILE).write_bytes(text.data)
        progress("self-test sample", 0.0)
        sample = golden_sample(config, plan, folder, context)

        source = _source(checkpoint, hashes)
        identity = bundle_identity(source, dtype, context, config)
        target, record = exported_record(stages, folder, config, dtype, identity)

        def manifest(files: Mapping[str, FileRecord]) -> Manifest:
            return Manifest(
                config=config,
                dtype=dtype,
                max_context=context,
                graphs=graphs,
                targets={target: record},
                files=dict(files),
                versions={name: metadata.version(name) for name in _LIBRARIES},
                source=source,
                sample=sample,
                tokenizer=None if text.data is None else TOKENIZER_FILE,
                end_tokens=text.end_tokens,
                rope_table=checkpoint.rope_table,
                presets={},
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )

        writer.finish(manifest, known={WEIGHTS_FILE: hashes.file})
    for line in text.notes:
        note(line)
    return open_bundle(output)


@contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(f"{output}: cannot be written: {error.strerror or error}") from error


def _write_graphs(config: MythosConfig, folder: Path, progress: Progress) -> dict[str, GraphSpec]:
    stages = {stage: ir.load(folder / f"{stage}.onnx") for stage in STAGES}
    models = dict(stages)
    models["model"] = loop_graph.loop_model(stages, config)
    models["model_with_past"] = loop_graph.loop_model_with_past(stages, config)
    for index, (name, model) in enumerate(models.items()):
        progress("graphs", index / len(models))
        add_functions(model)
        path = folder / f"{name}.onnx"
        ir.save(model, path)
        onnx.checker.check_model(str(path), full_check=True)
    return {
        name: GraphSpec(f"{name}.onnx", _tensor_specs(model.graph.inputs), _tensor_specs(model.graph.outputs))
        for name, model in models.items()
    }


def _tensor_specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        assert value.shape is not None
        assert value.dtype is not None
        shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
        specs.append(TensorSpec(str(value.name), str(value.dtype.numpy()), shape))
    return tuple(specs)


def _source(checkpoint: Checkpoint, hashes: WeightsHashes) -> Source:
    return Source(checkpoint.path.name, checkpoint.kind, hashes.source, checkpoint.step)
