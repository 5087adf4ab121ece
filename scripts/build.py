"""``mythos-edge build``: adds a faster target to a bundle."""

import argparse
from pathlib import Path

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.errors import BackendUnavailable, BuildError, UsageError
from mythos_edge.runtime.session import checked_ids
from mythos_edge.scripts import options
from mythos_edge.scripts.console import Console

HELP = "add a target with rounded or prepacked weights to a bundle"
EXAMPLE = "mythos-edge build model.bundle --target ort-cpu --weights int4 --calibrate ids.npy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", default="ort-cpu", metavar="NAME", help="what to build for (default: ort-cpu)")
    parser.add_argument("--weights", choices=("fp32", "int8", "int4"), required=True)
    parser.add_argument("--block", type=int, metavar="N", help="values that share a scale: 32, 64, 128, or 0: a row")
    parts = "head, attention, experts, shared, prelude, coda, or names of tensors"
    parser.add_argument("--keep", default="", metavar="PARTS", help=f"what stays fp32: {parts}")
    parser.add_argument("--method", choices=("rtn", "search"), help="round to nearest, or search each block's scale")
    parser.add_argument("--calibrate", metavar="NPY", help="token ids to weigh the input channels with")


def run(args: argparse.Namespace, console: Console) -> int:
    if args.target != "ort-cpu":
        raise BuildError(f"target is {args.target!r}, expected ort-cpu")
    if args.calibrate is not None and (args.method is not None or args.weights == "fp32"):
        raise UsageError("--calibrate is a method of its own for int8 and int4: leave --method out")
    try:
        from mythos_edge.exporter import calibration, ort_target
    except ImportError as error:
        message = f"building a target needs {error.name}, which is not installed"
        raise BackendUnavailable(message, "pip install 'mythos-edge[export]'") from error

    importance = None
    if args.calibrate is not None:
        opened = open_bundle(args.bundle)
        ids = checked_ids(options.ids_from_file(args.calibrate), opened.manifest.config)
        importance = calibration.collect_importance(opened, ids, console.progress).importance
    bundle = ort_target.build_target(
        args.bundle,
        args.weights,
        block=args.block,
        keep=[part for part in args.keep.split(",") if part],
        method=args.method,
        importance=importance,
        progress=console.progress,
    )
    name = ort_target.target_name(args.weights)
    target = bundle.manifest.targets[name]
    rounded = "" if target.method == "none" else f", blocks of {target.block or 'a row'}, {target.method}"
    console.say(
        f"{name}: {target.weights}{rounded}; a token reads {target.fixed_bytes / 1e6:.1f} MB of weights and "
        f"{target.step_bytes / 1e6:.1f} MB at each loop step"
    )
    console.say(f"use it with --target {name}")
    console.result({"target": name, **vars(target)})
    return 0
