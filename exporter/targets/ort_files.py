"""The files of ONNX Runtime's targets: lowered graphs, and the matrices of a model rounded part by part."""

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from mythos_edge.exporter.graph_checks import check_graph
from mythos_edge.exporter.lowering.ort_cpu import lower_for_ort
from mythos_edge.exporter.lowering.ort_kernels import Pack
from mythos_edge.exporter.lowering.sequences import for_many_sequences, for_one_sequence
from mythos_edge.exporter.rounding import ROW, Importance, Matrix, RoundedFile, Rounding, write_rounded
from mythos_edge.exporter.targets.spec import Work, form_of_parts
from mythos_edge.exporter.weights import bytes_read
from mythos_edge.model.bundle_writer import require_free_space
from mythos_edge.model.errors import BuildError
from mythos_edge.model.families.family import Config
from mythos_edge.model.families.table import config_of
from mythos_edge.model.layout import recipes
from mythos_edge.model.manifest import WEIGHTS_FILE
from mythos_edge.model.recipes import Recipe
from mythos_edge.model.stages import MAX_TOGETHER, STAGES
from mythos_edge.model.stored_checkpoint import Checkpoint
from mythos_edge.model.tensor_files import read_tensor_file
from mythos_edge.plugins.torch_ops import add_functions

EXPERTS = "experts"
# Where a model has no matrices that may be rounded.
_OTHERS = "others"


@dataclass(frozen=True)
class Lowered:
    """The graphs of a target by stage, and the bytes of weights it reads once a token and at each loop step."""

    graphs: dict[str, str]
    fixed_bytes: int
    step_bytes: int


def write_graphs(
    stages: Mapping[str, ir.Model],
    folder: Path,
    name: str,
    config: Config,
    lower: Callable[[ir.Model], ir.Model] = lower_for_ort,
) -> Lowered:
    """Lowers the traced stages and writes them to ``folder`` as ``<stage>.<name>.onnx``.

    For several sequences they are also written as ``<stage>.<name>.many.onnx``.
    """
    graphs, sizes = {}, {}
    for stage in STAGES:
        one = for_one_sequence(stages[stage])
        models = {stage: one, f"{stage}.many": for_many_sequences(one, MAX_TOGETHER)}
        for key, model in models.items():
            lowered = lower(model)
            add_functions(lowered)
            graphs[key] = f"{stage}.{name}{key.removeprefix(stage)}.onnx"
            ir.save(lowered, folder / graphs[key])
            check_graph(lowered)
            sizes[key] = bytes_read(lowered.graph, config)
    return Lowered(graphs, sizes["prelude"] + sizes["coda"], sizes["step"])


def summary_of(weights: Mapping[str, str], roundings: Mapping[str, Rounding]) -> str:
    """The forms of the parts in one line, as in ``experts int4 (blocks of 64, search), rest int8 (a row, rtn)``."""

    def told(form: str) -> str:
        rounding = roundings.get(form)
        if rounding is None:
            return form
        return f"{form} ({f'blocks of {rounding.block}' if rounding.block else 'a row'}, {rounding.method})"

    parts: dict[str, list[str]] = defaultdict(list)
    for part, form in weights.items():
        parts[form].append(part)
    if len(parts) == 1:
        return told(next(iter(parts)))
    rest = max(parts, key=lambda form: len(parts[form]))
    return ", ".join(
        [*(f"{' '.join(parts[form])} {told(form)}" for form in parts if form != rest), f"rest {told(rest)}"]
    )


def stages_of(work: Work) -> dict[str, ir.Model]:
    """The portable stage graphs of the bundle."""
    return {stage: ir.load(work.bundle.file(f"{stage}.onnx")) for stage in STAGES}


def rounded_packs(work: Work, plan: RoundedFile, importance: Importance | None = None) -> dict[str, Pack]:
    """Rounds the matrices of ``plan``, read from the bundle's own weights, into a file of the target."""
    bundle, file = work.bundle, work.weights_file()
    require_free_space(bundle.path, plan.total_bytes)
    stored = read_tensor_file(bundle.file(WEIGHTS_FILE))
    with Checkpoint(bundle.path, stored.kind, config_of(bundle.manifest), stored.entries) as reader:
        write_rounded(plan, reader, work.folder / file, importance, lambda done: work.progress("rounding", done))
    return plan.packs(work.settled(file), work.folder)


def matrices_of(config: Config, roundings: Mapping[str, Rounding | None], keep: Sequence[str] = ()) -> list[Matrix]:
    """The matrices that a target rounds, without those it keeps.

    ``roundings`` are by part, "" for all other parts; None keeps a part. Raises BuildError for a name in ``keep`` that
    fits no matrix, and for rows of experts that do not divide into blocks.
    """
    candidates = [recipe for recipe in recipes(config, 1) if recipe.parts]
    kept: set[str] = set()
    for given in keep:
        found = {recipe.name for recipe in candidates if given in recipe.parts or fnmatch.fnmatch(recipe.name, given)}
        if not found:
            parts = dict.fromkeys(part for recipe in candidates for part in recipe.parts)
            raise BuildError(
                f"--keep {given} fits no matrix of this model: expected {', '.join(parts)} or a tensor's name"
            )
        kept |= found
    experts = {recipe.name for recipe in candidates if EXPERTS in recipe.parts}
    if kept & experts:
        kept |= experts  # one kernel computes with both
    chosen = []
    for recipe in candidates:
        rounding = roundings.get(recipe.parts[0], roundings.get(""))
        if rounding is not None and recipe.name not in kept:
            chosen.append(_matrix(recipe, rounding))
    return chosen


def forms_of(config: Config, rounded: Sequence[Matrix], other: str) -> dict[str, str]:
    """The table part -> form of a target with these ``rounded`` matrices, all ``other`` ones in one form."""
    known = {matrix.name: f"int{matrix.rounding.bits}" for matrix in rounded}
    forms: dict[str, set[str]] = defaultdict(set)
    for recipe in recipes(config, 1):
        if recipe.parts:
            forms[recipe.parts[0]].add(known.get(recipe.name, other))
    return form_of_parts(forms) or {_OTHERS: other}


def _matrix(recipe: Recipe, rounding: Rounding) -> Matrix:
    name, (rows, columns) = recipe.name, recipe.shape[-2:]
    if rounding.block == ROW:
        return Matrix(name, recipe.shape, rows, columns, rounding, halves=recipe.role == "fc1")
    if len(recipe.shape) == 3:
        # An expert's hidden size may be padded with zeros, which add nothing; its input may not.
        if recipe.role == "fc1":
            rows += 2 * (-(rows // 2) % rounding.block)
        elif recipe.role == "fc2":
            columns += -columns % rounding.block
        if columns % rounding.block:
            raise BuildError(
                f"{name}: rows of {columns} values do not divide into blocks of {rounding.block}: "
                "choose another --block, or --keep experts"
            )
    return Matrix(name, recipe.shape, rows, columns, rounding)
