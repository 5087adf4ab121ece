"""ONNX Runtime CPU targets: the stages lowered in float32, int8 or int4, and added to a bundle.

Every target has each stage twice: for the rows of one sequence, and for those of several at once. They share the
rounded matrices, and with the bundle all weights that stay in float32.
"""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir

from mythos_edge.exporter.graph_checks import check_graph
from mythos_edge.exporter.lowering.ort_cpu import lower_for_ort
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
from mythos_edge.exporter.target_files import files_beside, install, settled, weights_file
from mythos_edge.exporter.weights import bytes_read
from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.bundle_writer import require_free_space
from mythos_edge.model.checkpoint import Checkpoint
from mythos_edge.model.config import MythosConfig
from mythos_edge.model.errors import BuildError
from mythos_edge.model.layout import recipes
from mythos_edge.model.manifest import CPU_PROVIDER, TARGET, WEIGHTS_FILE, TargetSpec
from mythos_edge.model.stages import MAX_TOGETHER, STAGES
from mythos_edge.model.tensor_files import read_tensor_file
from mythos_edge.plugins.processor import has_integer_dot_products
from mythos_edge.plugins.torch_ops import add_functions

BITS = {"fp32": 32, "int8": 8, "int4": 4}
_DEFAULT_METHODS = {"int8": "rtn", "int4": "search"}
# What --keep understands beside the names of tensors.
PARTS = {
    "head": "embed",
    "attention": "*.attn.*",
    "experts": "*.fc[12]",
    "shared": "*.shared_*",
    "prelude": "prelude_blocks.*",
    "coda": "coda_blocks.*",
}
# Multiplied head by head, which no kernel for rounded weights does; about a hundredth of a step's weights.
_NEVER_ROUNDED = ("*.key_up", "*.value_up")
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Lowered:
    """The graphs of a target by stage, and the bytes of weights it reads once a token and at each loop step."""

    graphs: dict[str, str]
    fixed_bytes: int
    step_bytes: int


def target_name(weights: str) -> str:
    """``ort-cpu-int4`` and so on; plain ``ort-cpu`` is what every export has."""
    return f"{TARGET}-{weights}"


def write_graphs(
    stages: Mapping[str, ir.Model],
    folder: Path,
    name: str,
    config: MythosConfig,
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


def build_target(
    path: Path | Bundle,
    weights: str,
    *,
    block: int | None = None,
    keep: Sequence[str] = (),
    method: str | None = None,
    importance: Importance | None = None,
    progress: Progress = lambda phase, fraction: None,
) -> Bundle:
    """The bundle at ``path``, or one that is open, with the target ``ort-cpu-<weights>`` added, or made again.

    ``block`` values share a scale: by default 64 for int4, and for int8 0 (a whole row) where the processor has integer
    dot products, else 128; or less, where the model's rows want it. ``keep`` names parts or tensors that stay float32;
    ``method`` is ``rtn``, ``search`` or, with the ``importance`` of each channel, ``calibrated``.
    Nothing of the bundle changes before the target is whole. Raises BuildError, BundleError, and ExportError without
    room on the disk.
    """
    bundle = path if isinstance(path, Bundle) else open_bundle(path)
    if weights not in BITS:
        elsewhere = ": fp8 is for TensorRT's targets" if weights == "fp8" else ""
        raise BuildError(f"weights is {weights!r}, expected one of {', '.join(BITS)} for {TARGET}{elsewhere}")
    if weights == "fp32" and (block is not None or keep or method is not None or importance is not None):
        raise BuildError(
            "block, keep, method and calibration are for rounding, and fp32 rounds nothing: leave them out"
        )
    manifest, name = bundle.manifest, target_name(weights)
    with files_beside(bundle, name, progress) as folder:
        stages = {stage: ir.load(bundle.file(f"{stage}.onnx")) for stage in STAGES}
        plan, packs = None, None
        if weights != "fp32":
            if block is None:
                block = _default_block(weights, manifest.config.dim)
            chosen = "calibrated" if importance is not None else method or _DEFAULT_METHODS[weights]
            rounding = Rounding(BITS[weights], block, chosen)
            plan = plan_rounded(matrices_of(manifest.config, rounding, keep), rounding)
            require_free_space(bundle.path, plan.total_bytes)
            round_weights(bundle, plan, folder / weights_file(name), importance, progress)
            packs = plan.packs(settled(bundle, folder, weights_file(name)), folder)
        progress("graphs", 0.0)
        lowered = write_graphs(stages, folder, name, manifest.config, partial(lower_for_ort, packs=packs))
        target = TargetSpec(
            graphs=lowered.graphs,
            compute_dtype="fp32",
            weights=weights,
            block=0 if plan is None else plan.rounding.block,
            method="none" if plan is None else plan.rounding.method,
            kept=tuple(keep),
            prepacked=True,
            fixed_bytes=lowered.fixed_bytes,
            step_bytes=lowered.step_bytes,
            bundle=manifest.identity,
            note="",
            engine=None,
            providers=(CPU_PROVIDER,),
        )
        return install(bundle, folder, name, target)


def _default_block(weights: str, dim: int) -> int:
    if weights == "int8" and has_integer_dot_products():
        return ROW
    wanted = 128 if weights == "int8" else 64
    # Experts take only whole blocks.
    return next((block for block in (wanted, wanted // 2, 32) if dim % block == 0), wanted)


def round_weights(
    bundle: Bundle, plan: RoundedFile, path: Path, importance: Importance | None, progress: Progress
) -> None:
    """Rounds the matrices of ``plan``, read from the bundle's own weights, into the file ``path``."""
    stored = read_tensor_file(bundle.file(WEIGHTS_FILE))
    with Checkpoint(bundle.path, stored.kind, bundle.manifest.config, stored.entries) as reader:
        write_rounded(plan, reader, path, importance, lambda done: progress("rounding", done))


def matrices_of(config: MythosConfig, rounding: Rounding, keep: Sequence[str]) -> list[Matrix]:
    """The matrices a target rounds, without those it keeps."""
    matrices = [
        _matrix(recipe.name, recipe.shape, rounding.block)
        for recipe in recipes(config, 1)
        if recipe.narrow and not any(fnmatch.fnmatch(recipe.name, pattern) for pattern in _NEVER_ROUNDED)
    ]
    kept: set[str] = set()
    for given in keep:
        pattern = PARTS.get(given, given)
        found = {matrix.name for matrix in matrices if fnmatch.fnmatch(matrix.name, pattern)}
        if not found:
            raise BuildError(
                f"--keep {given} fits no matrix of this model: expected {', '.join(PARTS)} or a tensor's name"
            )
        kept |= found
    experts = {matrix.name for matrix in matrices if matrix.stacked}
    if kept & experts:
        kept |= experts  # one kernel computes with both
    chosen = [matrix for matrix in matrices if matrix.name not in kept]
    for matrix in chosen:
        if matrix.stacked and rounding.block and matrix.columns % rounding.block:
            raise BuildError(
                f"{matrix.name}: rows of {matrix.columns} values do not divide into blocks of {rounding.block}: "
                "choose another --block, or --keep experts"
            )
    return chosen


def _matrix(name: str, shape: tuple[int, ...], block: int) -> Matrix:
    rows, columns = shape[-2:]
    if block == ROW:
        return Matrix(name, shape, rows, columns, halves=name.endswith(".fc1"))
    # An expert's hidden size may be padded with zeros, which add nothing; its input may not.
    if name.endswith(".fc1"):
        rows += 2 * (-(rows // 2) % block)
    elif name.endswith(".fc2"):
        columns += -columns % block
    return Matrix(name, shape, rows, columns)
