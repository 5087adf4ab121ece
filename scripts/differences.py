"""The differences of two bundles or checkpoints, part by part, as JSON values.

A part has fields with both values, or what is ``only_in_a``, ``only_in_b`` and ``changed``. Nothing is held but what
differs, so memory does not grow with the models.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from mythos_edge.exporter.graph_difference import graph_difference, read_graph
from mythos_edge.model.bundle import Bundle, sha256_of
from mythos_edge.model.entry_reader import EntryReader
from mythos_edge.model.errors import UsageError
from mythos_edge.model.layout import recipes
from mythos_edge.model.manifest import WEIGHTS_FILE
from mythos_edge.model.recipes import Recipe
from mythos_edge.model.stored_checkpoint import Checkpoint
from mythos_edge.model.tensor_difference import pairs_of, tensor_difference, values_of
from mythos_edge.model.tensor_files import TensorEntry, read_tensor_file

Part: TypeAlias = dict[str, Any]
Entries: TypeAlias = Mapping[str, TensorEntry]
Pairs: TypeAlias = Iterator[tuple[Tensor, Tensor]]
Progress: TypeAlias = Callable[[float], None]
# Fields of a manifest that say what a bundle is, and not who made it when.
_SETTINGS = ("family", "dtype", "max_context", "rope_table", "sample", "presets")
# Fields of a target's record that follow from others, or that are told apart.
_NOT_OF_RECORD = ("graphs", "bundle", "summary")
# Files beside a checkpoint that the text of a bundle comes from.
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
# Nothing that a field can be.
_ABSENT = object()


def compared(a: Bundle | Checkpoint, b: Bundle | Checkpoint, progress: Progress) -> dict[str, Part]:
    """Every part that both have. ``progress`` is told the share of the tensors that is compared.

    Raises UsageError for a bundle and a checkpoint of two families; BundleError and CheckpointError for damaged files.
    """
    of_a, of_b = map(_config, (a, b))
    parts = {"settings": fields(*map(_settings, (a, b))), "config": fields(of_a, of_b)}
    match a, b:
        case Bundle(), Bundle():
            return parts | {
                "tensors": tensors(_weights(a), _weights(b), progress),
                "graphs": _graphs(_portable(a), _portable(b)),
                "targets": _targets(a, b),
                "text": fields(_text(a), _text(b)),
            }
        case Bundle(), Checkpoint():
            return {"config": parts["config"], "tensors": _beside_checkpoint(a, b, False, progress)}
        case Checkpoint(), Bundle():
            return {"config": parts["config"], "tensors": _beside_checkpoint(b, a, True, progress)}
        case Checkpoint(), Checkpoint():
            return parts | {
                "tensors": tensors(_tensors(a), _tensors(b), progress),
                "text": fields(_text_files(a.path), _text_files(b.path)),
            }
    raise AssertionError


def differs(part: Mapping[str, Any]) -> bool:
    """Whether there is any difference in a part."""
    if "only_in_a" not in part:
        return bool(part)
    return any(part[name] for name in ("only_in_a", "only_in_b", "changed"))


def fields(a: Mapping[str, Any], b: Mapping[str, Any]) -> Part:
    """The fields that differ, each with both values; None where there is none."""
    names = [name for name in {**a, **b} if a.get(name, _ABSENT) != b.get(name, _ABSENT)]
    return {name: {"a": a.get(name), "b": b.get(name)} for name in names}


def _config(one: Bundle | Checkpoint) -> Mapping[str, Any]:
    return one.manifest.config if isinstance(one, Bundle) else one.config.to_dict()


def _settings(one: Bundle | Checkpoint) -> Part:
    """The fields that say what it is as a whole."""
    if not isinstance(one, Bundle):
        return {"family": one.config.family}
    values = dataclasses.asdict(one.manifest)
    return {name: values[name] for name in _SETTINGS}


def _weights(bundle: Bundle) -> Entries:
    """The tensors that every target of a bundle may read; none where it was packed without. Raises CheckpointError."""
    return read_tensor_file(bundle.file(WEIGHTS_FILE)).entries if WEIGHTS_FILE in bundle.manifest.files else {}


def _tensors(checkpoint: Checkpoint) -> Entries:
    """The tensors of a checkpoint, with the rotary table where it has one."""
    table = checkpoint.table
    return {**checkpoint.tensors, **({} if table is None else {table.entry.name: table.entry})}


def tensors(a: Entries, b: Entries, progress: Progress = lambda share: None) -> Part:
    """The tensors of two files or checkpoints; ``progress`` is told the share that is compared."""
    total, done, changed = max(1, sum(entry.n_bytes for entry in a.values())), 0, []
    reader = EntryReader()
    try:
        for name in [name for name in a if name in b]:
            progress(done / total)
            changed += _changed(name, a[name], b[name], pairs_of(reader, a[name], b[name]))
            done += a[name].n_bytes
    finally:
        reader.close()
    return _part(a, b, changed)


def _beside_checkpoint(bundle: Bundle, checkpoint: Checkpoint, checkpoint_first: bool, progress: Progress) -> Part:
    """The tensors of a bundle beside those that an export of ``checkpoint`` would give it, rounded as it has them."""
    families = bundle.manifest.family, checkpoint.config.family
    if families[0] != families[1]:
        raise UsageError(
            f"{bundle.path} is of the family {families[0]}, {checkpoint.path} of {families[1]}: a bundle and a "
            "checkpoint are compared within one family"
        )
    if WEIGHTS_FILE not in bundle.manifest.files:
        bundle.require_whole("compare")
    stored, max_context = _weights(bundle), bundle.manifest.max_context
    made = {recipe.name: recipe for recipe in recipes(checkpoint.config, max_context)}
    changed, reader = [], EntryReader()
    try:
        for number, (name, recipe) in enumerate(made.items()):
            progress(number / len(made))
            if name not in stored:
                continue
            entry = stored[name]
            # The checkpoint's, as it would be stored.
            as_stored = dataclasses.replace(entry, shape=recipe.shape)
            pairs = _recipe_pairs(recipe, checkpoint, reader, entry)
            if checkpoint_first:
                changed += _changed(name, as_stored, entry, pairs)
            else:
                changed += _changed(name, entry, as_stored, ((b, a) for a, b in pairs))
    finally:
        reader.close()
    return _part(made, stored, changed) if checkpoint_first else _part(stored, made, changed)


def _portable(bundle: Bundle) -> dict[str, Path]:
    return {name: bundle.file(graph.file) for name, graph in bundle.manifest.graphs.items()}


def _targets(a: Bundle, b: Bundle) -> Part:
    both = [name for name in a.manifest.targets if name in b.manifest.targets]
    found = {name: _target(a, b, name) for name in both}
    return _part(a.manifest.targets, b.manifest.targets, {name: part for name, part in found.items() if part})


def _target(a: Bundle, b: Bundle, name: str) -> Part:
    records = [dataclasses.asdict(one.target(name)) for one in (a, b)]
    of_record = fields(*({key: value for key, value in one.items() if key not in _NOT_OF_RECORD} for one in records))
    files = [{stage: one.file(file) for stage, file in one.manifest.targets[name].graphs.items()} for one in (a, b)]
    parts = {"graphs": _graphs(*files), "tensors": tensors(_own_weights(a, name), _own_weights(b, name))}
    return of_record | {what: part for what, part in parts.items() if differs(part)}


def _own_weights(bundle: Bundle, target: str) -> Entries:
    files = [read_tensor_file(bundle.file(name)) for name in bundle.own_weights(target)]
    return {name: entry for file in files for name, entry in file.entries.items()}


def _text(bundle: Bundle) -> Part:
    """Tokenizer and chat template by content, and the tokens that end a text."""
    manifest, template = bundle.manifest, bundle.manifest.chat_template
    return {
        "tokenizer": None if manifest.tokenizer is None else sha256_of(bundle.file(manifest.tokenizer)),
        "chat_template": None
        if template is None
        else {**dataclasses.asdict(template), "file": sha256_of(bundle.file(template.file))},
        "end_tokens": [dataclasses.asdict(token) for token in manifest.end_tokens],
    }


def _text_files(checkpoint: Path) -> Part:
    """The files beside a checkpoint that the text of a bundle comes from, by content."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return {name: sha256_of(folder / name) for name in _TEXT_FILES if (folder / name).is_file()}


def _graphs(a: Mapping[str, Path], b: Mapping[str, Path]) -> Part:
    changed: Part = {}
    for name in [name for name in a if name in b]:
        if any(path.suffix != ".onnx" for path in (a[name], b[name])):
            # Native code says nothing of itself.
            changed |= fields({name: sha256_of(a[name])}, {name: sha256_of(b[name])})
        elif difference := graph_difference(read_graph(a[name]), read_graph(b[name])):
            changed[name] = difference.to_dict()
    return _part(a, b, changed)


def _part(a: Iterable[str], b: Iterable[str], changed: Any) -> Part:
    of_a, of_b = dict.fromkeys(a), dict.fromkeys(b)
    only_in_a, only_in_b = [name for name in of_a if name not in of_b], [name for name in of_b if name not in of_a]
    return {"compared": len(of_a) - len(only_in_a), "only_in_a": only_in_a, "only_in_b": only_in_b, "changed": changed}


def _changed(name: str, a: TensorEntry, b: TensorEntry, pairs: Pairs) -> list[Part]:
    """A list with the difference of a tensor, or without."""
    found: Part = {}
    if a.shape != b.shape:
        found["shape"] = {"a": list(a.shape), "b": list(b.shape)}
    if a.dtype != b.dtype:
        found["dtype"] = {"a": _name(a), "b": _name(b)}
    if a.shape == b.shape:
        difference = tensor_difference(pairs)
        found |= difference.to_dict() if difference.changed else {}
    return [{"name": name, **found}] if found else []


def _recipe_pairs(recipe: Recipe, checkpoint: Checkpoint, reader: EntryReader, entry: TensorEntry) -> Pairs:
    """The pieces that a recipe makes of the checkpoint, and the same of what is stored."""
    start = 0
    for piece in recipe.pieces(checkpoint):
        stop = start + piece.numel()
        yield piece.reshape(-1).to(entry.dtype), values_of(reader, entry, start, stop)
        start = stop


def _name(entry: TensorEntry) -> str:
    return str(entry.dtype).removeprefix("torch.")
