"""ONNX Runtime targets for GPUs: the stages lowered for the CUDA provider, and added to a bundle.

    ort-cuda-fp32         everything in float32, the bundle's own weights
    ort-cuda-fp16         the large matrices in float16, all else in float32
    ort-cuda-fp16-int8    the large matrices rounded to 8 or 4 bits, products in float16
    ort-cuda-fp16-int4

Building needs neither a GPU nor onnxruntime-gpu; running them does (``runtime.ort_cuda_backend``).
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import onnx_ir as ir

from mythos_edge.exporter.lowering.ort_cuda import Narrowed, lower_for_ort_cuda
from mythos_edge.exporter.narrowing import plan_narrow, write_narrow
from mythos_edge.exporter.ort_target import BITS, Progress, matrices_of, round_weights, write_graphs
from mythos_edge.exporter.rounding import RoundedFile, Rounding, plan_rounded
from mythos_edge.exporter.target_files import files_beside, install, settled, weights_file
from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.bundle_writer import require_free_space
from mythos_edge.model.config import MythosConfig
from mythos_edge.model.errors import BuildError
from mythos_edge.model.manifest import CUDA_PROVIDER, CUDA_TARGET, TargetSpec
from mythos_edge.model.stages import STAGES

DTYPES = ("fp16", "fp32")
WEIGHTS = ("none", "int8", "int4")
# Values that share a scale. The kernels of QMoE take 64 and 128, on Turing to Ada no others.
BLOCKS = (64, 128)
_METHODS = {"int8": "rtn", "int4": "search"}
_NOTE = "activations of the large products are float16: beyond 65504 they overflow"


def target_name(dtype: str, weights: str = "none") -> str:
    """``ort-cuda-fp16``, ``ort-cuda-fp16-int4`` and so on."""
    return f"{CUDA_TARGET}-{dtype}" + ("" if weights == "none" else f"-{weights}")


def build_ort_cuda_target(
    path: Path,
    *,
    dtype: str = "fp16",
    weights: str = "none",
    block: int | None = None,
    progress: Progress = lambda phase, fraction: None,
) -> Bundle:
    """The bundle at ``path`` with the target ``ort-cuda-<dtype>[-<weights>]`` added, or made again.

    ``block`` values share a scale: by default 64 for int4 and 128 for int8, or 64 where the model's rows want it.
    Nothing of the bundle changes before the target is whole. Raises BuildError, BundleError, and ExportError without
    room on the disk.
    """
    bundle = open_bundle(path)
    _check(dtype, weights, block, bundle.manifest.config)
    manifest, name = bundle.manifest, target_name(dtype, weights)
    with files_beside(bundle, name, progress) as folder:
        stages = {stage: ir.load(bundle.file(f"{stage}.onnx")) for stage in STAGES}
        rounded = _rounded(bundle, name, folder, weights, block, progress)
        packs = {} if rounded is None else rounded.packs(settled(bundle, folder, weights_file(name)), folder)
        narrowed = None if dtype == "fp32" else _narrowed(bundle, name, folder, stages, tuple(packs), progress)
        progress("graphs", 0.0)
        lower = partial(lower_for_ort_cuda, narrowed=narrowed, packs=packs)
        lowered = write_graphs(stages, folder, name, manifest.config, lower)
        target = TargetSpec(
            graphs=lowered.graphs,
            compute_dtype=dtype,
            weights=weights,
            block=0 if rounded is None else rounded.rounding.block,
            method="none" if rounded is None else rounded.rounding.method,
            kept=(),
            prepacked=True,
            fixed_bytes=lowered.fixed_bytes,
            step_bytes=lowered.step_bytes,
            bundle=manifest.identity,
            note=_NOTE if dtype == "fp16" else "",
            engine=None,
            providers=(CUDA_PROVIDER,),
        )
        return install(bundle, folder, name, target)


def _check(dtype: str, weights: str, block: int | None, config: MythosConfig) -> None:
    if dtype not in DTYPES:
        raise BuildError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)} for {CUDA_TARGET}")
    if weights not in WEIGHTS:
        raise BuildError(f"weights is {weights!r}, expected one of {', '.join(WEIGHTS)} for {CUDA_TARGET}")
    if weights == "none":
        if block is not None:
            raise BuildError("block is for rounding, and weights none rounds nothing: leave it out")
        return
    if dtype != "fp16":
        raise BuildError(f"the CUDA kernel of rounded experts has no {dtype} form: build {weights} with --dtype fp16")
    if block is not None and block not in BLOCKS:
        raise BuildError(f"block is {block}, expected one of {', '.join(map(str, BLOCKS))} for {CUDA_TARGET}")
    if config.dim % (block or min(BLOCKS)):
        raise BuildError(
            f"the experts' rows of {config.dim} values do not divide into blocks of {block or min(BLOCKS)}, which the "
            "CUDA kernel wants: build with --weights none"
        )


def _rounded(
    bundle: Bundle, name: str, folder: Path, weights: str, block: int | None, progress: Progress
) -> RoundedFile | None:
    """The rounded matrices, written to ``folder``."""
    if weights == "none":
        return None
    config = bundle.manifest.config
    wide = weights == "int8" and config.dim % 128 == 0
    rounding = Rounding(BITS[weights], block or (128 if wide else 64), _METHODS[weights])
    plan = plan_rounded(matrices_of(config, rounding, ()), rounding)
    require_free_space(bundle.path, plan.total_bytes)
    round_weights(bundle, plan, folder / weights_file(name), None, progress)
    return plan


def _narrowed(
    bundle: Bundle,
    name: str,
    folder: Path,
    stages: Mapping[str, ir.Model],
    rounded: tuple[str, ...],
    progress: Progress,
) -> Narrowed:
    """The matrices that are not ``rounded`` in float16: as they are stored, or written to ``folder``."""
    if bundle.manifest.dtype == "fp16":
        weights = [value for model in stages.values() for value in model.graph.initializers.values()]
        stored = {str(value.name): value.const_value for value in weights if value.dtype == ir.DataType.FLOAT16}
        return {key: tensor for key, tensor in stored.items() if tensor is not None}
    plan = plan_narrow(bundle, rounded)
    file = weights_file(name, "narrow")
    require_free_space(bundle.path, plan.total_bytes)
    write_narrow(plan, bundle, folder / file, lambda done: progress("narrowing", done))
    return plan.tensors(settled(bundle, folder, file), folder)
