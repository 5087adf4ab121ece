"""The files of ONNX Runtime's targets: lowered graphs, and the matrices of a model rounded part by part."""

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir

from mythos_edge.exporter.graph_checks import check_graph
from mythos_edge.exporter.lowering.narrow_caches import narrow_caches
from mythos_edge.exporter.lowering.ort_cpu import Packs, lower_for_ort
from mythos_edge.exporter.lowering.sequences import for_many_sequences, for_one_sequence
from mythos_edge.exporter.rounding import (
    ROW,
    Importance,
    Matrix,
    RoundedFile,
    Rounding,
    plan_rounded,
    write_rounded,
)
from mythos_edge.exporter.stored_graphs import check_stored_graphs
from mythos_edge.exporter.targets.spec import Work, Written, form_of_parts
from mythos_edge.exporter.weights import bytes_read, weights_of
from mythos_edge.model.bundle_writer import require_free_space
from mythos_edge.model.errors import BuildError
from mythos_edge.model.families.family import Config
from mythos_edge.model.families.table import config_of
from mythos_edge.model.layout import recipes
from mythos_edge.model.manifest import graph_key
from mythos_edge.model.recipes import Recipe
from mythos_edge.model.stages import MAX_TOGETHER, STAGES
from mythos_edge.model.target_options import OrtOptions
from mythos_edge.plugins.torch_ops import add_functions

EXPERTS, MLP = "experts", "mlp"
# Where a model has no matrices that may be rounded.
_OTHERS = "others"


@dataclass(frozen=True)
class Forms:
    """The forms that a target gives a model's matrices ``by_part`` ("" for all other parts), but for those in ``keep``.

    ``roundings`` are by form; without one a matrix is in ``dtype``, which products are computed in. ``asked`` is the
    form that was asked for by name, ``block`` the block that was asked for it.
    """

    asked: str
    dtype: str
    by_part: Mapping[str, str]
    roundings: Mapping[str, Rounding]
    block: int | None = None
    keep: Sequence[str] = ()
    prepacked: bool = True
    note: str = ""


def write_graphs(
    stages: Mapping[str, ir.Model],
    folder: Path,
    name: str,
    config: Config,
    forms: Forms,
    matrices: Sequence[Matrix] = (),
    lower: Callable[[ir.Model], ir.Model] = lower_for_ort,
    caches: Sequence[str] = (),
) -> Written:
    """Lowers the traced stages, of which ``matrices`` are rounded, and writes them to ``folder``.

    Each is ``<stage>.<name>.onnx``, and for several sequences ``<stage>.<name>.many.onnx``; with ``caches`` also
    ``<stage>.<name>.int8.onnx`` and so on, which keep cached rows in int8.
    """
    graphs, sizes = {}, {}
    for stage in STAGES:
        one = for_one_sequence(stages[stage])
        for many, model in ((False, one), (True, for_many_sequences(one, MAX_TOGETHER))):
            lowered = lower(model)
            add_functions(lowered)
            sizes[stage] = bytes_read(lowered.graph, config)
            for cache in (None, *caches):
                kept = lowered if cache is None else narrow_caches(lowered, cache, config.looped)
                key = graph_key(stage, cache, many=many)
                graphs[key] = f"{stage}.{name}{key.removeprefix(stage)}.onnx"
                ir.save(kept, folder / graphs[key])
                check_graph(kept)
    weights = forms_of(config, matrices, forms.dtype)
    return Written(
        graphs=graphs,
        compute_dtype=forms.dtype,
        weights=weights,
        fixed_bytes=sizes["prelude"] + sizes["coda"],
        step_bytes=sizes["step"],
        summary=_summary(weights, forms.roundings),
        options=_options(forms, {matrix.rounding for matrix in matrices}),
        note=forms.note,
    )


def _options(forms: Forms, used: Set[Rounding]) -> OrtOptions:
    roundings = (forms.roundings.get(form) for form in forms.by_part.values())
    # Without experts, or with them kept, what is rounded is the dense matrices alone.
    main = next((rounding for rounding in roundings if rounding in used), None)
    return OrtOptions(
        asked=forms.asked,
        block=0 if main is None else main.block,
        method="none" if main is None else main.method,
        prepacked=forms.prepacked,
        integer_rows=any(rounding.block == ROW for rounding in used),
    )


def _summary(weights: Mapping[str, str], roundings: Mapping[str, Rounding]) -> str:
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
    """The portable stage graphs of the bundle. Raises BundleError for graphs that no export can have written."""
    check_stored_graphs(work.bundle)
    return {stage: ir.load(work.bundle.file(f"{stage}.onnx")) for stage in STAGES}


def write_ort(
    work: Work,
    forms: Forms,
    lower: Callable[..., ir.Model],
    importance: Callable[[], Importance | None] = lambda: None,
    caches: Sequence[str] = (),
) -> Written:
    """Rounds the matrices of a target, lowers the stages with them, and writes both.

    ``lower`` takes a stage and ``packs``; ``importance`` is asked for when something is rounded; ``caches``: see
    ``write_graphs``. Raises BuildError.
    """
    config = config_of(work.bundle.manifest)
    matrices = matrices_of(config, forms)
    packs = _packs(work, plan_rounded(matrices), importance()) if matrices else {}
    work.progress("graphs", 0.0)
    stages, lower_with = stages_of(work), partial(lower, packs=packs)
    return write_graphs(stages, work.folder, work.name, config, forms, matrices, lower_with, caches)


def _packs(work: Work, plan: RoundedFile, importance: Importance | None) -> Packs:
    """Rounds the matrices of ``plan``, read from the bundle's own weights, into a file of the target."""
    file = work.weights_file()
    require_free_space(work.bundle.path, plan.total_bytes)
    with weights_of(work.bundle) as reader:
        write_rounded(plan, reader, work.folder / file, importance, lambda done: work.progress("rounding", done))
    return plan.packs(work.settled(file), work.folder)


def matrices_of(config: Config, forms: Forms) -> list[Matrix]:
    """The matrices that a target rounds.

    Raises BuildError for a name to keep that fits no matrix, where none is left that is rounded as asked, and for rows
    of experts that do not divide into blocks.
    """
    candidates = [recipe for recipe in recipes(config, 1) if recipe.parts]
    kept: set[str] = set()
    for given in forms.keep:
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
        rounding = forms.roundings.get(forms.by_part.get(recipe.parts[0], forms.by_part[""]))
        if rounding is not None and recipe.name not in kept:
            chosen.append(_matrix(recipe, rounding))
    if forms.roundings and not chosen:
        raise BuildError(
            f"nothing of this model is left to round to {forms.asked}: leave parts out of --keep, "
            "or build a target that rounds nothing"
        )
    if forms.block is not None and forms.roundings[forms.asked] not in {matrix.rounding for matrix in chosen}:
        raise BuildError(f"--block is {forms.block}, and no matrix left is {forms.asked}: leave --block out")
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
