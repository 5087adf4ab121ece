"""``mythos-edge build``: adds a faster target to a bundle."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.errors import BackendUnavailable, UsageError
from mythos_edge.runtime.session import checked_ids
from mythos_edge.scripts import options
from mythos_edge.scripts.console import Console

HELP = "add a target for a backend to a bundle: rounded or prepacked weights, TensorRT engines"
EXAMPLE = "mythos-edge build model.bundle --target rtx-sm89 --weights int4"

_CPU, _CUDA = "ort-cpu", "ort-cuda"
# What each kind of target understands besides --weights.
_UNDERSTANDS = {
    _CPU: ("block", "keep", "method", "calibrate"),
    _CUDA: ("dtype", "block", "provider"),
    "TensorRT": ("dtype", "layout", "max_context", "max_rows", "plugins"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    names = "ort-cpu (default), ort-cuda, rtx-sm89, rtx-sm86+sm89+sm120 (several GPUs), trt-this-gpu"
    parser.add_argument("--target", default=_CPU, metavar="NAME", help=f"what to build for: {names}")
    weights = "ort-cpu: fp32, int8, int4; ort-cuda: none, int8, int4; TensorRT: none, int8, int4, fp8"
    parser.add_argument("--weights", choices=("none", "fp32", "int8", "int4", "fp8"), help=weights)
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="what is computed in, on GPUs (fp16)")
    providers = "what runs ort-cuda: its CUDA provider, or TensorRT (10, fp32 alone) before it"
    parser.add_argument("--provider", choices=("cuda", "tensorrt"), help=providers)
    tensorrt = parser.add_argument_group("TensorRT")
    tensorrt.add_argument("--layout", choices=("step", "loop"), help="an engine a stage (step), or one with the loop")
    tensorrt.add_argument("--max-context", type=int, metavar="N", help="longest sequence (default: the bundle's)")
    tensorrt.add_argument("--max-rows", type=int, metavar="N", help="longest chunk of a sequence at once (default: 64)")
    plugins = "one for each op, in Python, or ahead of time: TensorRT alone loads the engine (trt-this-gpu)"
    tensorrt.add_argument("--plugins", choices=("python", "aot"), help=plugins)
    rounding = parser.add_argument_group("rounding for ONNX Runtime")
    rounding.add_argument("--block", type=int, metavar="N", help="values that share a scale: 32, 64, 128, or 0: a row")
    parts = "head, attention, experts, shared, prelude, coda, or names of tensors"
    rounding.add_argument("--keep", metavar="PARTS", help=f"what stays fp32: {parts}")
    rounding.add_argument("--method", choices=("rtn", "search"), help="round to nearest, or search each block's scale")
    rounding.add_argument("--calibrate", metavar="NPY", help="token ids to weigh the input channels with")


def run(args: argparse.Namespace, console: Console) -> int:
    kind = args.target if args.target in _UNDERSTANDS else "TensorRT"
    _refuse_foreign_options(args, kind)
    builders: dict[str, Callable[[argparse.Namespace, Console], None]] = {
        _CPU: _build_for_cpu,
        _CUDA: _build_for_cuda,
        "TensorRT": _build_for_tensorrt,
    }
    try:
        builders[kind](args, console)
    except ImportError as error:
        message = f"building a target needs {error.name}, which is not installed"
        raise BackendUnavailable(message, "pip install 'mythos-edge[export]'") from error
    return 0


def _refuse_foreign_options(args: argparse.Namespace, kind: str) -> None:
    known = {name for names in _UNDERSTANDS.values() for name in names}
    for name in sorted(known - set(_UNDERSTANDS[kind])):
        if getattr(args, name) is not None:
            understood = ", ".join(_flag(own) for own in ("weights", *_UNDERSTANDS[kind]))
            raise UsageError(f"{_flag(name)} means nothing to the target {args.target}, which understands {understood}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _build_for_cpu(args: argparse.Namespace, console: Console) -> None:
    if args.weights is None:
        raise UsageError("ort-cpu is what every export has: say with --weights fp32, int8 or int4 what to add")
    if args.calibrate is not None and (args.method is not None or args.weights == "fp32"):
        raise UsageError("--calibrate is a method of its own for int8 and int4: leave --method out")
    from mythos_edge.exporter import calibration, ort_target

    importance = None
    if args.calibrate is not None:
        opened = open_bundle(args.bundle)
        ids = checked_ids(options.ids_from_file(args.calibrate), opened.manifest.config)
        importance = calibration.collect_importance(opened, ids, console.progress).importance
    bundle = ort_target.build_target(
        args.bundle,
        args.weights,
        block=args.block,
        keep=[part for part in (args.keep or "").split(",") if part],
        method=args.method,
        importance=importance,
        progress=console.progress,
    )
    _tell(console, bundle, ort_target.target_name(args.weights))


def _build_for_cuda(args: argparse.Namespace, console: Console) -> None:
    from mythos_edge.exporter import ort_cuda_target

    given = _given(args, "dtype", "weights", "block", "provider")
    bundle = ort_cuda_target.build_ort_cuda_target(args.bundle, **given, progress=console.progress)
    given.pop("block", None)
    _tell(console, bundle, ort_cuda_target.target_name(**{"dtype": "fp16", **given}))


def _build_for_tensorrt(args: argparse.Namespace, console: Console) -> None:
    from mythos_edge.exporter import trt_target

    given = _given(args, "dtype", "layout", "weights", "max_context", "max_rows", "plugins")
    built = trt_target.build_trt_target(args.bundle, args.target, **given, progress=console.progress)
    for stage, report in built.reports.items():
        console.say(
            f"{stage}: engine of {report.plan_bytes / 1e6:.1f} MB from {report.layers} layers, of which "
            f"{report.plugin_layers} plugins; building took {report.peak_bytes / 1e9:.1f} GB of memory"
        )
    _tell(console, built.bundle, built.name, engines={stage: vars(report) for stage, report in built.reports.items()})


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given, so that the builder's own defaults stand for the others."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _tell(console: Console, bundle: Bundle, name: str, **more: Any) -> None:
    target = bundle.manifest.targets[name]
    # Blocks differ between the matrices of an engine.
    blocks = "" if target.engine is not None else f", blocks of {target.block or 'a row'}"
    rounded = "" if target.method == "none" else f"{blocks}, {target.method}"
    weights = target.compute_dtype if target.weights == "none" else target.weights
    console.say(
        f"{name}: {weights}{rounded}; a token reads {target.fixed_bytes / 1e6:.1f} MB of weights and "
        f"{target.step_bytes / 1e6:.1f} MB at each loop step"
    )
    if target.engine is not None:
        from mythos_edge.exporter.target_files import log_file

        log = bundle.path / log_file(name)
        console.say(f"what TensorRT {target.engine.version} said is in {log}")
    if target.note:
        console.say(target.note)
    console.say(f"use it with --target {name}")
    console.result({"target": name, **asdict(target), **more})
