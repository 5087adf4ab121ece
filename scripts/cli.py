"""The command ``mythos-edge``: one verb per module, one line per error.

Exit codes: 0 done, 1 an expected error or a parity failure, 2 a command line that can not be read.
"""

import argparse
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from mythos_edge.model.errors import MythosEdgeError
from mythos_edge.scripts.console import Console

# What takes time to import is imported by main, so that Ctrl-C meanwhile is no traceback.
_VERBS = {
    "doctor": "doctor",
    "inspect": "inspect_verb",
    "export": "export_verb",
    "build": "build",
    "inline": "inline_verb",
    "generate": "generate",
    "score": "score",
    "validate": "validate",
    "tune": "tune",
    "bench": "bench",
    "demo": "demo",
}
_INTERRUPTED = "interrupted; nothing was left half-written"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    return run(lambda: _parser().parse_args(argv))


def run(parse: Callable[[], argparse.Namespace]) -> int:
    """Runs the verb that ``parse`` names as ``run``, with every error told in one line; returns the exit code."""
    console, debug = Console(as_json=False), False
    try:
        args = parse()
        console, debug = Console(args.json), args.debug
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: console.note(f"warning: {message}")
            code: int = args.run(args, console)
            return code
    except MythosEdgeError as error:
        return _fail(console, debug, str(error))
    except KeyboardInterrupt:
        return _fail(console, debug, _INTERRUPTED)
    except BrokenPipeError:
        # The reader of stdout went away; there is nobody to tell, and Python's exit must not try to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Python 3.11, while a library makes a class
            return _fail(console, debug, _INTERRUPTED)
        what = " ".join(str(error).split()) or type(error).__name__
        return _fail(console, debug, f"internal error: {type(error).__name__}: {what} (--debug shows where)")


def _fail(console: Console, debug: bool, message: str) -> int:
    if debug:
        traceback.print_exc()
    console.note(f"error: {message}")
    console.result({"error": message})
    return 1


def _parser() -> argparse.ArgumentParser:
    from importlib import metadata

    parser = argparse.ArgumentParser(
        prog="mythos-edge", description="Export OpenMythos checkpoints to ONNX and run them locally."
    )
    parser.add_argument("--version", action="version", version=f"mythos-edge {metadata.version('mythos-edge')}")
    common = argparse.ArgumentParser(add_help=False)
    add_common(common)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module_name in _VERBS.items():
        module = import_module(f"mythos_edge.scripts.{module_name}")
        verb = verbs.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=f"example: {module.EXAMPLE}",
            parents=[common],
            allow_abbrev=False,
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    """What every verb takes."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the rest on stderr")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def entry() -> NoReturn:
    # An end that is asked for, as by a container or a job's time limit, cleans up like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())


if __name__ == "__main__":
    entry()
