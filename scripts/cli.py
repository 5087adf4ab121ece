"""The command ``mythos-edge``: one verb per module, one line per error.

Exit codes: 0 done, 1 an expected error or a parity failure, 2 wrong usage of the command line.
"""

import argparse
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

from mythos_edge.model.errors import MythosEdgeError
from mythos_edge.scripts import bench, build, demo, doctor, export_verb, generate, inspect_verb, score, tune, validate
from mythos_edge.scripts.console import Console

_VERBS = {
    "doctor": doctor,
    "inspect": inspect_verb,
    "export": export_verb,
    "build": build,
    "generate": generate,
    "score": score,
    "validate": validate,
    "tune": tune,
    "bench": bench,
    "demo": demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    args = _parser().parse_args(argv)
    console = Console(args.json)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: console.note(f"warning: {message}")
            code: int = args.run(args, console)
            return code
    except MythosEdgeError as error:
        return _fail(console, args.debug, str(error))
    except KeyboardInterrupt:
        return _fail(console, args.debug, "interrupted; nothing was left half-written")
    except BrokenPipeError:
        # The reader of stdout went away; there is nobody to tell, and Python's exit must not try to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        what = " ".join(str(error).split()) or type(error).__name__
        return _fail(console, args.debug, f"internal error: {type(error).__name__}: {what} (--debug shows where)")


def _fail(console: Console, debug: bool, message: str) -> int:
    if debug:
        traceback.print_exc()
    console.note(f"error: {message}")
    console.result({"error": message})
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mythos-edge", description="Export OpenMythos checkpoints to ONNX and run them locally."
    )
    parser.add_argument("--version", action="version", version=f"mythos-edge {metadata.version('mythos-edge')}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON object on stdout, the rest on stderr")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in _VERBS.items():
        verb = verbs.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=f"example: {module.EXAMPLE}",
            parents=[common],
            allow_abbrev=False,
        )
        add: Any = module.add_arguments
        add(verb)
        verb.set_defaults(run=module.run)
    return parser


def entry() -> NoReturn:
    # An end that is asked for, as by a container or a job's time limit, cleans up like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())


if __name__ == "__main__":
    entry()
