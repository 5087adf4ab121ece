"""``mythos-edge inline``: adds graphs of standard ops alone to a bundle."""

import argparse

from mythos_edge.model.errors import unavailable
from mythos_edge.model.manifest import WEIGHTS_FILE
from mythos_edge.scripts import arguments
from mythos_edge.scripts.console import Console

HELP = "add graphs of standard ONNX ops alone to a bundle, for other engines"
EXAMPLE = "mythos-edge inline model.bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_bundle(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    try:
        from mythos_edge.exporter.portable import inline_bundle, portable_files
    except ImportError as error:
        raise unavailable(error, "inlining graphs", "pip install 'mythos-edge[export]'") from error
    bundle = inline_bundle(args.bundle, console.progress)
    files = portable_files(bundle.manifest.graphs)
    console.say(f"{bundle.path}: {', '.join(files.values())}: standard ops alone, weights in {WEIGHTS_FILE}")
    console.result({"bundle": str(bundle.path), "portable": files})
    return 0
