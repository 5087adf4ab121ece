"""TensorRT targets: what their names mean, what is refused, and the engines added to a bundle.

A wish names the GPUs, and the bundle records it with what the engines compute::

    rtx-sm89                TensorRT for RTX, GPUs of compute capability 8.9
    rtx-sm86+sm89+sm120     the same engines for several GPUs
    trt-this-gpu            full TensorRT, for the GPU of this machine (Jetson, data centre); recorded as trt-sm87

    rtx-sm89-fp16           recorded: float16, an engine a stage
    rtx-sm89-fp16-int4      with the large matrices rounded to int4
    rtx-sm89-fp16-loop      one engine with the loop inside

Not here: the graphs (``lowering.tensorrt``), the build of one engine (``engine_process``).
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mythos_edge.exporter.engine import EngineJob, EngineReport, Range
from mythos_edge.exporter.engine_process import build_engine, plan_bytes, require_memory, weight_bytes
from mythos_edge.exporter.lowering.tensorrt import EngineOptions, LoweredForTensorRT, lower_for_tensorrt
from mythos_edge.exporter.target_files import files_beside, install, log_file
from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.bundle_writer import require_free_space
from mythos_edge.model.config import MOST_DEPTH, MythosConfig
from mythos_edge.model.errors import BuildError
from mythos_edge.model.manifest import CUDA_TARGET, TARGET, EngineSpec, Profile, TargetSpec
from mythos_edge.plugins import kernel_store, trt_bindings
from mythos_edge.plugins.cuda_driver import Driver

THIS_GPU = "trt-this-gpu"
# Rows of the longest chunk of a step layout, unless asked for otherwise.
DEFAULT_MAX_ROWS = 64
_FLAVOURS = {"rtx": "TensorRT for RTX", "trt": "TensorRT"}
# Machines that people try, and that only full TensorRT serves.
_ELSEWHERE = {87: "Jetson Orin", 90: "Hopper", 100: "data centre Blackwell", 110: "Jetson Thor"}
# The least compute capability on which TensorRT has a type; TensorRT for RTX has no float32 products on Turing.
_LEAST = {"bf16": 80, "int4": 86, "fp8": 89}
_LEAST_OF = {"rtx": {**_LEAST, "fp32": 80}, "trt": _LEAST}
# How lowering.tensorrt_weights rounds.
_METHODS = {"none": "none", "int8": "rtn", "fp8": "rtn", "int4": "search"}
Progress = Callable[[str, float], None]


class Lower(Protocol):
    """``lowering.tensorrt.lower_for_tensorrt``, or what a test puts in its place."""

    def __call__(
        self, bundle: Bundle, folder: Path, options: EngineOptions, progress: Progress
    ) -> LoweredForTensorRT: ...


@dataclass(frozen=True)
class Gpus:
    """What a target name asks for: the TensorRT, and the compute capabilities in ascending order (89 for SM 8.9).

    ``device`` is the name of this machine's GPU where the engines are for it alone, "" where they are not.
    """

    flavour: str
    compute_capabilities: tuple[int, ...]
    device: str = ""

    @property
    def name(self) -> str:
        return f"{self.flavour}-{'+'.join(f'sm{number}' for number in self.compute_capabilities)}"


@dataclass(frozen=True)
class BuiltEngines:
    """The bundle with a target added, the target's name, and the report of each engine's build."""

    bundle: Bundle
    name: str
    reports: dict[str, EngineReport]


def target_name(gpus: Gpus, options: EngineOptions) -> str:
    """The name a bundle records: see above."""
    rounded = "" if options.weights == "none" else f"-{options.weights}"
    layout = "-loop" if options.layout == "loop" else ""
    return f"{gpus.name}-{options.dtype}{rounded}{layout}"


def gpus_from_name(wish: str) -> Gpus:
    """The GPUs a target name asks for. Raises BuildError for another name, BackendUnavailable without a GPU."""
    if wish == THIS_GPU:
        driver = Driver.load()
        if not driver.device_count():
            raise BuildError(f"{THIS_GPU}: this machine has no GPU: build there, or for known GPUs as in rtx-sm89")
        return Gpus("trt", (driver.compute_capability(0),), driver.device_name(0))
    if not re.fullmatch(r"rtx-sm\d+(\+sm\d+)*", wish):
        raise BuildError(
            f"target is {wish!r}, expected {TARGET}, {CUDA_TARGET}, rtx-sm89 (or several GPUs, as in rtx-sm86+sm89) or "
            f"{THIS_GPU}"
        )
    return Gpus("rtx", tuple(sorted({int(number) for number in re.findall(r"\d+", wish)})))


def options_from(
    bundle: Bundle,
    *,
    dtype: str = "fp16",
    layout: str = "step",
    weights: str = "none",
    max_context: int | None = None,
    max_rows: int | None = None,
) -> EngineOptions:
    """The options with defaults filled in: the bundle's whole context, and chunks of 64 rows. Raises BuildError.

    A loop layout has no cache and computes the whole sequence as one chunk.
    """
    longest = bundle.manifest.max_context
    context = longest if max_context is None else max_context
    if context < 1 or context > longest:
        mend = f": export with --max-context {context}" if context > longest else ""
        raise BuildError(f"max_context is {context}, expected 1 to {longest}, for which the bundle was exported{mend}")
    if layout == "loop" and max_rows is not None:
        raise BuildError("max_rows is for the step layout: a loop layout takes the whole sequence at once")
    rows = context if layout == "loop" else min(DEFAULT_MAX_ROWS, context) if max_rows is None else max_rows
    if rows < 1 or rows > context:
        raise BuildError(f"max_rows is {rows}, expected 1 to max_context, which is {context}")
    return EngineOptions(dtype, layout, weights, context, rows)


def build_trt_target(
    path: Path,
    wish: str,
    *,
    progress: Progress = lambda phase, fraction: None,
    lower: Lower = lower_for_tensorrt,
    **options_given: Any,
) -> BuiltEngines:
    """The bundle at ``path`` with engines for the GPUs that ``wish`` names added, or made again; one line per problem.

    ``options_given`` are those of ``options_from``. Nothing of the bundle changes before all engines are whole. Raises
    BuildError, BundleError, BackendUnavailable without the bindings, and ExportError without room on the disk.
    """
    bundle = open_bundle(path)
    gpus = gpus_from_name(wish)
    options = options_from(bundle, **options_given)
    check_gpus(gpus, options)
    name = target_name(gpus, options)
    with files_beside(bundle, name, progress) as folder:
        graphs = folder / "graphs"
        graphs.mkdir()
        lowered = lower(bundle, graphs, options, progress)
        jobs = engine_jobs(gpus, options, lowered, name, folder, bundle.manifest.config)
        reports = _build_all(jobs, folder, log_file(name), progress)
        shutil.rmtree(graphs)
        target = _target_spec(gpus, options, lowered, bundle, name, reports)
        return BuiltEngines(install(bundle, folder, name, target), name, reports)


def check_gpus(gpus: Gpus, options: EngineOptions) -> None:
    """Raises BuildError for a GPU that TensorRT or our kernels do not know, or without the types asked for."""
    known = trt_bindings.known_compute_capabilities(trt_bindings.load(gpus.flavour))
    for number in gpus.compute_capabilities:
        if known and number not in known:
            mend = f": for {_ELSEWHERE[number]} use {THIS_GPU} there" if number in _ELSEWHERE else ""
            raise BuildError(
                f"sm{number} is not among those {_FLAVOURS[gpus.flavour]} builds for "
                f"({' '.join(map(str, known))}){mend}"
            )
        for kind in (options.dtype, options.weights):
            least = _LEAST_OF[gpus.flavour].get(kind, 0)
            if number < least:
                raise BuildError(
                    f"sm{number} has no {kind}, which begins with sm{least}: choose another dtype or weights"
                )
        if number not in kernel_store.compute_capabilities():
            kernels = " ".join(map(str, kernel_store.compute_capabilities()))
            raise BuildError(f"there are no kernels for sm{number}, expected one of {kernels}")


def engine_jobs(
    gpus: Gpus, options: EngineOptions, lowered: LoweredForTensorRT, name: str, folder: Path, config: MythosConfig
) -> dict[str, EngineJob]:
    """A job for each graph; the plans go to ``folder``."""
    depth = (1, config.max_loop_iters, MOST_DEPTH)
    return {
        stage: EngineJob(
            graph=str(graph),
            plan=str(folder / f"{stage}.{name}.engine"),
            flavour=gpus.flavour,
            compute_capabilities=gpus.compute_capabilities,
            profiles=tuple(_ranges(profile, options) for profile in profiles_of(options)),
            values={"max_depth": depth},
            plugin_layers=lowered.plugins[stage],
            max_rows=options.max_rows,
            layout=options.layout,
        )
        for stage, graph in lowered.graphs.items()
    }


def profiles_of(options: EngineOptions) -> tuple[Profile, ...]:
    """One for a single row, which is what decoding runs, and one for whole chunks."""
    single, chunk = Profile(1, 1), Profile(options.max_rows, options.max_rows)
    return (single,) if options.max_rows == 1 else (single, chunk)


def _ranges(profile: Profile, options: EngineOptions) -> dict[str, Range]:
    rows = (1, profile.opt_rows, profile.max_rows)
    context = options.max_context + options.max_rows
    # Most often the logits of one row are asked for, whatever the chunk.
    return {"chunk": rows, "context": (1, context, context), "logit_count": (1, 1, profile.max_rows)}


def _build_all(
    jobs: Mapping[str, EngineJob], folder: Path, log_name: str, progress: Progress
) -> dict[str, EngineReport]:
    """The plans, and the log of all builds, in ``folder``; after a failure the log stays among temporary files."""
    graphs = [Path(job.graph) for job in jobs.values()]
    for graph in graphs:
        require_memory(graph)
    require_free_space(folder, sum(plan_bytes(weight_bytes(graph)) for graph in graphs))
    with tempfile.NamedTemporaryFile(prefix="mythos-edge-", suffix=f"-{log_name}", delete=False) as file:
        log = Path(file.name)
    try:
        reports = {stage: build_engine(job, log, progress) for stage, job in jobs.items()}
        # Copied, for a temporary file is for its owner's eyes only.
        shutil.copyfile(log, folder / log_name)
        log.unlink()
    except BaseException as error:
        if not isinstance(error, BuildError) or error.log is None:
            log.unlink(missing_ok=True)
        raise
    return reports


def _target_spec(
    gpus: Gpus,
    options: EngineOptions,
    lowered: LoweredForTensorRT,
    bundle: Bundle,
    name: str,
    reports: Mapping[str, EngineReport],
) -> TargetSpec:
    return TargetSpec(
        graphs={stage: f"{stage}.{name}.engine" for stage in lowered.graphs},
        compute_dtype=options.dtype,
        weights=options.weights,
        block=0,  # differs between matrices: see tensorrt_passes.round_weights
        method=_METHODS[options.weights],
        kept=(),
        prepacked=True,
        fixed_bytes=lowered.fixed_bytes,
        step_bytes=lowered.step_bytes,
        bundle=bundle.manifest.identity,
        note="",
        engine=EngineSpec(
            flavour=gpus.flavour,
            version=next(iter(reports.values())).version,
            compute_capabilities=gpus.compute_capabilities,
            device=gpus.device,
            layout=options.layout,
            max_context=options.max_context,
            max_rows=options.max_rows,
            profiles=profiles_of(options),
            plugin_layers={stage: report.plugin_layers for stage, report in reports.items()},
            kernels=kernel_store.manifest_sha256(),
        ),
    )
