"""The engines of a TensorRT target: lowered graphs, a build for each in a process of its own, and one log."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from mythos_edge.exporter.engine import EngineJob, EngineReport, Range
from mythos_edge.exporter.engine_process import build_engine, plan_bytes, require_memory, weight_bytes
from mythos_edge.exporter.lowering.tensorrt import EngineOptions, LoweredForTensorRT, lower_for_tensorrt
from mythos_edge.exporter.targets.gpus import Gpus
from mythos_edge.exporter.targets.ort_files import forms_of
from mythos_edge.exporter.targets.spec import Progress, Work, Written
from mythos_edge.model.bundle_writer import require_free_space
from mythos_edge.model.errors import BuildError
from mythos_edge.model.families.family import Config
from mythos_edge.model.families.table import config_of
from mythos_edge.model.looped import MOST_DEPTH
from mythos_edge.model.target_options import EngineSpec, Profile
from mythos_edge.plugins import kernel_store


def write_engines(gpus: Gpus, options: EngineOptions, work: Work) -> Written:
    """Lowers the stages and builds an engine for each, or one for all. Raises BuildError."""
    config, graphs = config_of(work.bundle.manifest), work.folder / "graphs"
    graphs.mkdir()
    lowered = lower_for_tensorrt(work.bundle, graphs, options, work.progress)
    jobs = engine_jobs(gpus, options, lowered, work.name, work.folder, config)
    reports = _build_all(jobs, work.folder, work.log_file, work.progress)
    shutil.rmtree(graphs)
    version = next(iter(reports.values())).version
    form = options.dtype if options.weights == "none" else options.weights
    return Written(
        graphs={stage: f"{stage}.{work.name}.engine" for stage in lowered.graphs},
        compute_dtype=options.dtype,
        # Blocks, and what does not divide into them, differ between matrices: see tensorrt_passes.round_weights.
        weights=dict.fromkeys(forms_of(config, [], form), form),
        fixed_bytes=lowered.fixed_bytes,
        step_bytes=lowered.step_bytes,
        summary=f"{form}; {gpus.builder} {version}, layout {options.layout}, context {options.max_context}",
        options=EngineSpec(
            flavour=gpus.flavour,
            version=version,
            compute_capabilities=gpus.compute_capabilities,
            device=gpus.device,
            layout=options.layout,
            max_context=options.max_context,
            max_rows=options.max_rows,
            profiles=profiles_of(options),
            plugin_layers={stage: report.plugin_layers for stage, report in reports.items()},
            kernels=kernel_store.manifest_sha256(),
        ),
        reports={stage: asdict(report) for stage, report in reports.items()},
    )


def engine_jobs(
    gpus: Gpus, options: EngineOptions, lowered: LoweredForTensorRT, name: str, folder: Path, config: Config
) -> dict[str, EngineJob]:
    """A job for each graph; the plans go to ``folder``."""
    depth = (1, config.looped.max_depth, MOST_DEPTH)
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
