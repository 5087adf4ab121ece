"""``mythos-edge pack``: a small bundle for a device, of some targets and only the weights that those read."""

import argparse
from dataclasses import replace

import numpy as np

from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.errors import UsageError, unavailable
from mythos_edge.model.manifest import GoldenSample
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import arguments
from mythos_edge.scripts.console import Console

HELP = "write a small bundle for a device: some targets, and only the weights that they read"
EXAMPLE = "mythos-edge pack model.bundle --target ort-cpu-int4 -o small.bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=arguments.path, help="the bundle to pack from")
    names = "targets to pack, separated by commas; the first is the one that runs when none is asked for"
    parser.add_argument("--target", required=True, metavar="T,T", help=names)
    parser.add_argument("-o", "--output", required=True, type=arguments.path, metavar="SMALL", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace a bundle that is there")


def run(args: argparse.Namespace, console: Console) -> int:
    names = arguments.target_names(args.target)
    bundle = open_bundle(args.bundle)
    if args.output.resolve().is_relative_to(args.bundle.resolve()):
        raise UsageError(f"{args.output}: is in the bundle to pack from: choose another folder")
    for name in names:
        bundle.target(name)
    try:
        from mythos_edge.exporter.pack import pack_bundle
    except ImportError as error:
        raise unavailable(error, "packing", "pip install 'mythos-edge[export]'") from error
    sample = _sample_of(bundle, names[0], console)
    packed = pack_bundle(bundle, names, args.output, sample, force=args.force, progress=console.progress)
    before, after = (sum(record.bytes for record in one.manifest.files.values()) for one in (bundle, packed))
    console.say(
        f"{packed.path}: {after / 1e6:.1f} MB of {before / 1e6:.1f} MB, with {', '.join(packed.manifest.targets)}"
    )
    if sample == bundle.manifest.sample and bundle.target(names[0]).is_native:
        console.say("its self-test is that of the export: validate it on its device")
    console.result({"bundle": str(packed.path), "targets": list(packed.manifest.targets), "bytes": after, "of": before})
    return 0


def _sample_of(bundle: Bundle, target: str, console: Console) -> GoldenSample:
    """The self-test with the numbers of ``target``, which rounded weights make others; the export's for engines.

    Engines run on their own GPU alone, which need not be here.
    """
    sample = bundle.manifest.sample
    if bundle.target(target).is_native:
        return sample
    console.progress("self-test sample", 0.0)
    with Session.of(bundle, target=target) as session:
        score = session.score([sample.ids], max_depth=sample.max_depth, threshold=sample.threshold)
    logits = score.logits[0, -1]
    top = np.argsort(-logits, kind="stable")[: len(sample.top_ids)]
    return replace(
        sample,
        depth=tuple(score.depth[0].tolist()),
        top_ids=tuple(top.tolist()),
        top_logits=tuple(float(logits[index]) for index in top),
    )
