"""Checkpoint in, bundle out: streams the weights to disk, then makes the graphs over them, or finds them kept.

The bundle appears whole or not at all. Memory does not grow with the model: no tensor is ever whole in it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

from mythos_edge.exporter.kept_graphs import Graphs, kept, versions
from mythos_edge.exporter.sample import golden_sample
from mythos_edge.exporter.tokenizer_files import TOKENIZER_FILE, tokenizer_for
from mythos_edge.exporter.weights import STORAGE_TYPES, WeightsHashes, WeightsPlan, plan_weights, write_weights
from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.bundle_writer import BundleWriter, require_free_space
from mythos_edge.model.errors import ExportError, OSErrorAs
from mythos_edge.model.families.family import Config
from mythos_edge.model.manifest import (
    MOST_CONTEXT,
    WEIGHTS_FILE,
    GraphSpec,
    Manifest,
    Source,
    TargetRecord,
    bundle_identity,
)
from mythos_edge.model.stored_checkpoint import Checkpoint
from mythos_edge.model.typed_json import dataclass_from_json

_GRAPHS_BYTES = 16 << 20

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
    config = checkpoint.config
    context = config.max_seq_len if max_context is None else max_context
    _check(checkpoint, dtype, context)
    text = tokenizer_for(tokenizer, end_tokens, config.looped.vocab_size, checkpoint.special_tokens)
    plan = plan_weights(config, context, dtype)
    writer = BundleWriter(output, force=force)
    require_free_space(writer.folder, plan.file.total_bytes + _GRAPHS_BYTES)
    with writer, OSErrorAs(ExportError, f"{output}: cannot be written"):
        folder = writer.folder
        hashes = write_weights(plan, checkpoint, folder / WEIGHTS_FILE, lambda done: progress("weights", done))
        progress("graphs", 0.0)
        made = _graphs(config, context, dtype, plan, folder, portable, progress, note)
        text.write(folder)
        progress("self-test sample", 0.0)
        sample = golden_sample(config, plan, folder, context)
        source = _source(checkpoint, hashes)
        manifest = partial(
            Manifest,
            family=config.family,
            model=config.looped,
            config=config.to_dict(),
            dtype=dtype,
            max_context=context,
            graphs=made.graphs,
            targets={made.target: replace(made.record, bundle=_identity(config, source, dtype, context))},
            versions=versions(),
            source=source,
            sample=sample,
            tokenizer=None if text.data is None else TOKENIZER_FILE,
            end_tokens=text.end_tokens,
            chat_template=text.chat_template,
            rope_table=checkpoint.rope_table,
            presets={},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        writer.finish(lambda files: manifest(files=files), known={WEIGHTS_FILE: hashes.file})
    for line in text.notes:
        note(line)
    return open_bundle(output)


def _identity(config: Config, source: Source, dtype: str, context: int) -> str:
    return bundle_identity(source, dtype, context, config.family, config.to_dict(), config.looped)


def _check(checkpoint: Checkpoint, dtype: str, context: int) -> None:
    """Raises ExportError and ConfigError for what cannot be exported."""
    if dtype not in STORAGE_TYPES:
        raise ExportError(f"dtype is {dtype!r}, expected one of {', '.join(STORAGE_TYPES)}")
    if not 1 <= context <= MOST_CONTEXT:
        raise ExportError(
            f"max_context is {context}, expected at least 1 and at most {MOST_CONTEXT}: lower it with --max-context"
        )
    if checkpoint.stored_table is not None:
        checkpoint.stored_table.check_length(context, str(checkpoint.path))


@dataclass(frozen=True)
class _MadeGraphs:
    """The portable graphs of a bundle, and the target that it starts with, whose record names no bundle yet."""

    graphs: dict[str, GraphSpec]
    target: str
    record: TargetRecord


def _graphs(
    config: Config,
    context: int,
    dtype: str,
    plan: WeightsPlan,
    folder: Path,
    portable: bool,
    progress: Progress,
    note: Callable[[str], None],
) -> _MadeGraphs:
    """Puts all graphs into ``folder``: those kept from an export of such a model, or made now."""

    def make() -> Graphs:
        from mythos_edge.exporter.bundle_graphs import write_bundle_graphs

        made = _MadeGraphs(*write_bundle_graphs(config, context, dtype, plan, folder, portable, progress))
        files = [*(spec.file for spec in made.graphs.values()), *made.record.graphs.values()]
        return Graphs({file: (folder / file).read_bytes() for file in files}, json.loads(json.dumps(asdict(made))))

    depends_on = {
        "family": config.family,
        "config": config.to_dict(),
        "max_context": context,
        "dtype": dtype,
        "portable": portable,
        "biased": _biased(plan, folder / WEIGHTS_FILE),
    }
    found = kept("bundle", depends_on, make, note)
    for file, data in found.files.items():
        (folder / file).write_bytes(data)
    return dataclass_from_json(_MadeGraphs, found.facts, "kept graphs")


def _biased(plan: WeightsPlan, weights: Path) -> dict[str, bool]:
    """Whether each selection bias is other than zeros, which lowering leaves out: all that a graph has of values."""
    found = {}
    with weights.open("rb") as file:
        for name, recipe in plan.recipes.items():
            if recipe.role == "router_bias":
                entry = plan.file.entries[name]
                file.seek(entry.offset)
                found[name] = bool(np.frombuffer(file.read(entry.n_bytes), np.float32).any())
    return found


def _source(checkpoint: Checkpoint, hashes: WeightsHashes) -> Source:
    return Source(checkpoint.path.name, checkpoint.kind, hashes.source, checkpoint.step)
