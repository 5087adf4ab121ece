"""``mythos-edge build``: adds a faster target to a bundle."""

import argparse
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.errors import UsageError, unavailable
from mythos_edge.model.manifest import CUDA_TARGET, TARGET, TargetSpec
from mythos_edge.runtime.prompts import checked_ids
from mythos_edge.scripts import arguments, options
from mythos_edge.scripts.console import Console

HELP = "add a target for a backend to a bundle: rounded or prepacked weights, TensorRT engines"
EXAMPLE = "mythos-edge build model.bundle --target rtx-sm89 --weights int4"

# What each kind of target understands besides --weights.
_UNDERSTANDS = {
    TARGET: ("block", "keep", "method", "calibrate"),
    CUDA_TARGET: ("dtype", "block"),
    "TensorRT": ("dtype", "layout", "max_context", "max_rows"),
}
# What the parts of a built target's name were asked for with.
_ASKED_WITH = {
    **dict.fromkeys(("fp16", "bf16", "fp32"), "--dtype"),
    **dict.fromkeys(("int8", "int4", "fp8"), "--weights"),
    "loop": "--layout",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_bundle(parser)
    names = "ort-cpu (default), ort-cuda, rtx-sm89, rtx-sm86+sm89+sm120 (several GPUs), trt-this-gpu"
    parser.add_argument("--target", default=TARGET, metavar="NAME", help=f"what to build for: {names}")
    weights = "ort-cpu: fp32, int8, int4; ort-cuda: none, int8, int4; TensorRT: none, int8, int4, fp8"
    parser.add_argument("--weights", choices=("none", "fp32", "int8", "int4", "fp8"), help=weights)
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="what is computed in, on GPUs (fp16)")
    tensorrt = parser.add_argument_group("TensorRT")
    tensorrt.add_argument("--layout", choices=("step", "loop"), help="an engine a stage (step), or one with the loop")
    tensorrt.add_argument("--max-context", type=int, metavar="N", help="longest sequence (default: the bundle's)")
    tensorrt.add_argument("--max-rows", type=int, metavar="N", help="longest chunk of a sequence at once (default: 64)")
    rounding = parser.add_argument_group("rounding for ONNX Runtime")
    rounding.add_argument("--block", type=int, metavar="N", help="values that share a scale: 32, 64, 128, or 0: a row")
    parts = "head, attention, experts, shared, prelude, coda, or names of tensors"
    rounding.add_argument("--keep", metavar="PARTS", help=f"what stays fp32: {parts}")
    rounding.add_argument("--method", choices=("rtn", "search"), help="round to nearest, or search each block's scale")
    rounding.add_argument(
        "--calibrate", type=arguments.file_name, metavar="NPY", help="token ids to weigh the input channels with"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    kind = args.target if args.target in _UNDERSTANDS else "TensorRT"
    _refuse_built_name(args.target)
    _refuse_foreign_options(args, kind)
    builders: dict[str, Callable[[argparse.Namespace, Bundle, Console], None]] = {
        TARGET: _build_for_cpu,
        CUDA_TARGET: _build_for_cuda,
        "TensorRT": _build_for_tensorrt,
    }
    before = open_bundle(args.bundle)
    try:
        builders[kind](args, before, console)
    except ImportError as error:
        raise unavailable(error, "building a target", "pip install 'mythos-edge[export]'") from error
    return 0


def _refuse_built_name(name: str) -> None:
    """Raises UsageError for a name that a bundle records: it says how its target is asked for."""
    found = re.fullmatch(r"(ort-cpu|ort-cuda|(?:rtx|trt)-sm\d+(?:\+sm\d+)*)-(.+)", name)
    if found is None or not set(parts := found[2].split("-")) <= set(_ASKED_WITH):
        return
    # On a CPU everything is computed in fp32, so there it can only be said of weights.
    asked = {**_ASKED_WITH, "fp32": "--weights"} if found[1] == TARGET else _ASKED_WITH
    wish = "trt-this-gpu" if found[1].startswith("trt") else found[1]
    options_of_it = "".join(f" {asked[part]} {part}" for part in parts)
    raise UsageError(f"{name} is the name of a built target: ask for it with --target {wish}{options_of_it}")


def _refuse_foreign_options(args: argparse.Namespace, kind: str) -> None:
    known = {name for names in _UNDERSTANDS.values() for name in names}
    for name in sorted(known - set(_UNDERSTANDS[kind])):
        if getattr(args, name) is not None:
            understood = ", ".join(_flag(own) for own in ("weights", *_UNDERSTANDS[kind]))
            raise UsageError(f"{_flag(name)} means nothing to the target {args.target}, which understands {understood}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _build_for_cpu(args: argparse.Namespace, before: Bundle, console: Console) -> None:
    if args.weights is None:
        raise UsageError("ort-cpu is what every export has: say with --weights fp32, int8 or int4 what to add")
    if args.calibrate is not None and (args.method is not None or args.weights == "fp32"):
        raise UsageError("--calibrate is a method of its own for int8 and int4: leave --method out")
    keep = [] if args.keep is None else args.keep.split(",")
    if "" in keep:
        raise UsageError(f"--keep is {args.keep!r}, expected parts or names of tensors, separated by commas")
    from mythos_edge.exporter import calibration, ort_target

    importance = None
    if args.calibrate is not None:
        ids = checked_ids(options.ids_from_file(args.calibrate), before.manifest.config)
        importance = calibration.collect_importance(before, ids, console.progress).importance
    # What was calibrated on, and not what may stand there by now.
    bundle = ort_target.build_target(
        before,
        args.weights,
        block=args.block,
        keep=keep,
        method=args.method,
        importance=importance,
        progress=console.progress,
    )
    _tell(console, before, bundle, ort_target.target_name(args.weights))


def _build_for_cuda(args: argparse.Namespace, before: Bundle, console: Console) -> None:
    from mythos_edge.exporter import ort_cuda_target

    given = _given(args, "dtype", "weights", "block")
    bundle = ort_cuda_target.build_ort_cuda_target(args.bundle, **given, progress=console.progress)
    given.pop("block", None)
    _tell(console, before, bundle, ort_cuda_target.target_name(**{"dtype": "fp16", **given}))


def _build_for_tensorrt(args: argparse.Namespace, before: Bundle, console: Console) -> None:
    from mythos_edge.exporter import trt_target

    given = _given(args, "dtype", "layout", "weights", "max_context", "max_rows")
    built = trt_target.build_trt_target(args.bundle, args.target, **given, progress=console.progress)
    for stage, report in built.reports.items():
        console.say(
            f"{stage}: engine of {report.plan_bytes / 1e6:.1f} MB from {report.layers} layers, of which "
            f"{report.plugin_layers} plugins; building took {report.peak_bytes / 1e9:.1f} GB of memory"
        )
    engines = {stage: vars(report) for stage, report in built.reports.items()}
    _tell(console, before, built.bundle, built.name, engines=engines)


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given, so that the builder's own defaults stand for the others."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _tell(console: Console, before: Bundle, bundle: Bundle, name: str, **more: Any) -> None:
    target, old = bundle.manifest.targets[name], before.manifest.targets.get(name)
    console.say(
        f"{name}: {weights_of(target)}; a token reads {target.fixed_bytes / 1e6:.1f} MB of weights and "
        f"{target.step_bytes / 1e6:.1f} MB at each loop step"
    )
    if old is not None:
        lost = ", ".join(sorted(set(before.manifest.presets) - set(bundle.manifest.presets)))
        console.say(f"replaces the one before ({weights_of(old)})" + (f" and its presets: {lost}" if lost else ""))
    if target.engine is not None:
        from mythos_edge.exporter.target_files import log_of

        log = log_of(bundle, name)
        if log is not None:
            console.say(f"what TensorRT {target.engine.version} said is in {log}")
    if target.note:
        console.say(target.note)
    console.say(f"use it with --target {name}")
    console.result({"target": name, **asdict(target), "replaced": old is not None, **more})


def weights_of(target: TargetSpec) -> str:
    """What a target's weights are, as in ``int4, blocks of 64, search, head kept``."""
    parts = [target.compute_dtype if target.weights == "none" else target.weights]
    if target.method != "none":
        # Blocks differ between the matrices of an engine.
        parts += [] if target.engine is not None else [f"blocks of {target.block or 'a row'}"]
        parts += [target.method, *(f"{kept} kept" for kept in target.kept)]
    return ", ".join(parts)
