"""Checkpoint in, bundle out: traces the stages while the weights stream to disk, then weaves, lowers and checks.

The bundle appears whole or not at all. Memory does not grow with the model: no tensor is ever whole in it.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import onnx
import onnx_ir as ir

from mythos_edge.exporter import loop_graph, ort_target
from mythos_edge.exporter.sample import golden_sample
from mythos_edge.exporter.tracing import tracing
from mythos_edge.exporter.weights import (
    STORAGE_TYPES,
    WeightsHashes,
    plan_weights,
    write_weights,
)
from mythos_edge.model.bounded_files import require_file
from mythos_edge.model.bundle import (
    CPU_PROVIDER,
    MOST_CONTEXT,
    MOST_TOKENIZER_BYTES,
    STAGES,
    TARGET,
    WEIGHTS_FILE,
    Bundle,
    FileRecord,
    GraphSpec,
    Manifest,
    Source,
    TargetSpec,
    TensorSpec,
    bundle_identity,
    open_bundle,
)
from mythos_edge.model.bundle_writer import BundleWriter, require_free_space
from mythos_edge.model.checkpoint import Checkpoint
from mythos_edge.model.config import MythosConfig
from mythos_edge.model.errors import ConfigError, ExportError
from mythos_edge.plugins.torch_ops import add_functions

TOKENIZER_FILE = "tokenizer.json"
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
    force: bool = False,
    progress: Progress = lambda phase, fraction: None,
) -> Bundle:
    """The bundle written to ``output``; ``progress`` is told the phase and the fraction of it that is done.

    ``max_context`` (positions) defaults to the checkpoint's ``max_seq_len``; ``dtype`` is the storage dtype of the
    large weights. Raises ExportError, CheckpointError (a weight that is not finite) and ConfigError.
    """
    if dtype not in STORAGE_TYPES:
        raise ExportError(f"dtype is {dtype!r}, expected one of {', '.join(STORAGE_TYPES)}")
    config = checkpoint.config
    context = config.max_seq_len if max_context is None else max_context
    for name in ("prelude_layers", "coda_layers"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}: a model without these layers can not be exported")
    if not 1 <= context <= MOST_CONTEXT:
        raise ExportError(
            f"max_context is {context}, expected at least 1 and at most {MOST_CONTEXT}: lower it with --max-context"
        )
    if tokenizer is not None:
        _check_tokenizer(tokenizer, config)
    plan = plan_weights(config, context, dtype)
    require_free_space(output.parent, plan.total_bytes + _GRAPHS_BYTES)
    with BundleWriter(output, force=force) as writer, _disk_errors(output):
        folder = writer.folder
        with tracing(config, context, dtype, folder) as finish_tracing:
            hashes = write_weights(
                plan,
                checkpoint,
                folder / WEIGHTS_FILE,
                lambda done: progress("weights", done / plan.total_bytes),
            )
            progress("graphs", 0.0)
            finish_tracing()
        graphs = _write_graphs(config, folder, progress)
        stages = {stage: ir.load(folder / f"{stage}.onnx") for stage in STAGES}
        lowered = ort_target.write_graphs(stages, folder, TARGET, config)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
        progress("self-test sample", 0.0)
        sample = golden_sample(config, plan, folder, context)

        source = _source(checkpoint, hashes)
        identity = bundle_identity(source, dtype, context, config)

        def manifest(files: Mapping[str, FileRecord]) -> Manifest:
            return Manifest(
                config=config,
                dtype=dtype,
                max_context=context,
                graphs=graphs,
                targets={TARGET: _mapped_target(lowered, dtype, identity)},
                files=dict(files),
                versions={name: metadata.version(name) for name in _LIBRARIES},
                source=source,
                sample=sample,
                tokenizer=TOKENIZER_FILE if tokenizer is not None else None,
                end_tokens=(),
                rope_table="config",
                presets={},
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )

        writer.finish(manifest, known={WEIGHTS_FILE: hashes.file})
    return open_bundle(output)


@contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(f"{output}: can not be written: {error.strerror or error}") from error


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


def _mapped_target(lowered: ort_target.Lowered, dtype: str, identity: str) -> TargetSpec:
    """The target every export has: float32 weights that stay mapped in the bundle's file."""
    note = "" if dtype == "fp32" else f"weights are stored in {dtype}; the CPU has no fast {dtype} and computes in fp32"
    sizes = (lowered.fixed_bytes, lowered.step_bytes)
    return TargetSpec(
        lowered.graphs, "fp32", "fp32", 0, "none", (), False, *sizes, identity, note, None, (CPU_PROVIDER,)
    )


def _source(checkpoint: Checkpoint, hashes: WeightsHashes) -> Source:
    return Source(checkpoint.path.name, checkpoint.kind, hashes.source, checkpoint.step)


def _check_tokenizer(path: Path, config: MythosConfig) -> None:
    from tokenizers import Tokenizer

    if not path.exists():
        raise ExportError(f"{path}: no such tokenizer; expected a Hugging Face tokenizer.json")
    try:
        require_file(path, MOST_TOKENIZER_BYTES, "a tokenizer")
        size = Tokenizer.from_file(str(path)).get_vocab_size()
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the library raises plain Exception
        raise ExportError(f"{path}: not a Hugging Face tokenizer.json: {error}") from error
    if size > config.vocab_size:
        raise ConfigError(f"{path}: the tokenizer has {size} tokens, but the model knows {config.vocab_size}")
