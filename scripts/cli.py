"""The command ``mythos-edge``: one verb per module, one line per error.

Exit codes: 0 done, 1 an expected error or a parity failure, 2 a command line that cannot be read. Of ``diff``: 0 the
same, 1 different, 2 an error.
"""

import argparse
import difflib
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from mythos_edge.model.errors import MythosEdgeError, UsageError
from mythos_edge.model.machine import processors
from mythos_edge.scripts import interrupts
from mythos_edge.scripts.console import CLOSED, Console, drop, tell

# What takes time to import is imported by main, so that Ctrl-C meanwhile is no traceback.
VERBS = {
    "doctor": "doctor",
    "inspect": "inspect_verb",
    "export": "export_verb",
    "build": "build",
    "pack": "pack",
    "inline": "inline_verb",
    "tokenize": "tokenize_verb",
    "generate": "generate",
    "chat": "chat",
    "serve": "serve",
    "score": "score",
    "validate": "validate",
    "diff": "diff",
    "tune": "tune",
    "bench": "bench",
    "demo": "demo",
    "completion": "completion",
}
_EXAMPLE = "example:\n  "
_INTERRUPTED = "interrupted; nothing was left half-written"
# Options with one of these may have a value that begins with a dash.
_TEXTS = ("TEXT", "TOKEN", "1,2,3")
# What libraries ask for the number of their threads, which else is that of the machine.
_THREADS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Known before the rest can be read, as that may fail.
    options = words[: words.index("--")] if "--" in words else words
    return run(lambda: _parsed(words), Console("--json" in options), "--debug" in options)


def run(parse: Callable[[], argparse.Namespace], console: Console, debug: bool) -> int:
    """Runs the verb that ``parse`` names as ``run``, with every error told in one line; returns the exit code."""
    failed = 1
    try:
        args = parse()
        console.as_json, failed = args.json, getattr(args, "error_code", failed)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: console.note(f"warning: {' '.join(str(message).split())}")
            code: int = args.run(args, console)
            return code
    except BrokenPipeError:
        # The reader of stdout went away; there is nobody to tell, and Python's exit must not try to.
        drop(sys.stdout)
        return failed
    except (Exception, KeyboardInterrupt) as error:
        console.fail(_message(error), traceback.format_exc() if debug else "")
        return 2 if isinstance(error, _UnreadableCommand) and not interrupts.caused(error) else failed


def _parsed(words: list[str]) -> argparse.Namespace:
    if sys.stdout is None:
        raise UsageError(CLOSED)
    if any("\0" in word for word in words):
        raise UsageError("an argument has a zero byte in it, which no file name and no text can have")
    return parser().parse_args(words)


def _message(error: BaseException) -> str:
    """Tells an error in one line: never "internal error" for what a user, a file or a machine did."""
    if interrupts.caused(error):
        return _INTERRUPTED
    if isinstance(error, MythosEdgeError | _UnreadableCommand):
        return str(error)
    what = " ".join(str(error).split())
    if isinstance(error, OSError):
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*names, error.strerror or what or type(error).__name__])
    if isinstance(error, MemoryError) or "t allocate memory" in what:  # torch raises a RuntimeError
        return f"memory ran out{f' ({what})' if what else ''}: end other programs, or use a larger machine"
    if isinstance(error, RecursionError):
        return "something that was read is nested too deeply: give a file that is not"
    if isinstance(error, UnicodeError):
        return f"text that was given or read cannot be encoded or decoded: {what}: give UTF-8"
    return f"internal error: {type(error).__name__}: {what or type(error).__name__} (--debug shows where)"


class _UnreadableCommand(Exception):
    """A command line that argparse refuses."""


def _meant(word: str, known: Iterable[str]) -> str:
    """Asks for the nearest of the ``known`` names, as the end of a message; nothing where none is near."""
    names, written = list(known), word.lower().replace("_", "-")
    begun = [name for name in names if written.strip("-") and name.startswith(written)]
    near = begun or difflib.get_close_matches(written, names, n=1)
    return f": did you mean {near[0]}?" if near else ""


class _Formatter(argparse.HelpFormatter):
    """Breaks help between words alone, and examples nowhere, so that they can be copied."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLE) else "\n".join(self._split_lines(indent + text, width))


class _Parser(argparse.ArgumentParser):
    """Raises _UnreadableCommand instead of ending, and takes texts that begin with a dash."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, **options})

    def error(self, message: str) -> NoReturn:
        # Not all options, which are a dozen lines: what is wrong should be the first that is seen.
        tell(f"usage: {self.prog} ..., as {self.prog} --help tells\n")
        raise _UnreadableCommand(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, others = super().parse_known_args(self._with_texts(list(args)), namespace)
        if others:
            # Told here and not by the parser of the whole, which does not know the options of the verb.
            option = next((word.partition("=")[0] for word in others if word.startswith("-")), "")
            self.error(f"unrecognized arguments: {' '.join(others)}{_meant(option, self._option_string_actions)}")
        return known, others

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            meant = _meant(value, action.choices or ())
            if action.dest == "verb":
                self.error(f"unknown verb {value!r}{meant or ': expected one of ' + ', '.join(VERBS)}")
            raise argparse.ArgumentError(action, f"{error.message}{meant}") from None

    def _with_texts(self, words: list[str]) -> list[str]:
        """Joins ``-p -x`` to ``-p=-x``, which argparse does not take for two options; ``-p --json`` stays as it is."""
        known = self._option_string_actions
        joined: list[str] = []
        rest = iter(words)
        for word in rest:
            if word == "--":
                return [*joined, word, *rest]
            option, _, given = word.partition("=")
            if option in known and given == "--":
                self.error(f"argument {option}: its value cannot be two dashes alone")  # argparse would drop them
            joined.append(word)
            if word in known and known[word].metavar in _TEXTS:
                value = next(rest, None)
                if value is None:
                    break
                apart = not value.startswith("-") or value in ("-", "--") or value.partition("=")[0] in known
                joined[-1:] = [word, value] if apart else [f"{word}={value}"]
        return joined

    def _print_message(self, message: str, file: Any = None) -> None:
        """Writes help and version, which are all that is left to it, as any other result."""
        del file
        Console(as_json=False).say(message, end="", coloured=True)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    from mythos_edge.model.versions import version_of

    command = _Parser(
        prog="mythos-edge",
        description="Export OpenMythos checkpoints to ONNX and run them locally.",
        epilog="mythos-edge VERB --help shows the options of a verb and an example; help is text, with --json, too. "
        "Exit codes: 0 done, 1 an error that is told in one line or a failed comparison, 2 an unreadable command line.",
    )
    command.add_argument("--version", action="version", version=f"mythos-edge {version_of('mythos-edge')}")
    common = _Parser(add_help=False)
    add_common(common)
    verbs = command.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module_name in VERBS.items():
        module = import_module(f"mythos_edge.scripts.{module_name}")
        verb = verbs.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=f"{_EXAMPLE}{module.EXAMPLE}",
            parents=[common],
            allow_abbrev=False,
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run, error_code=getattr(module, "ERROR_CODE", 1))
    return command


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every verb takes."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the rest on stderr")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def entry() -> NoReturn:
    """Runs the command line of this process, with signals, streams and threads as a program has them."""
    interrupts.install()
    _open_standard_streams()
    _limit_threads()
    # Everything is done and said: to take apart what torch imports would cost a third of a second.
    os._exit(main())


def _open_standard_streams() -> None:
    """Puts the null device in place of closed ones, which the next opened file would become: libraries write there."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free


def _limit_threads() -> None:
    """Tells libraries and children of a quota of CPU time, which they do not see by themselves."""
    usable = processors()
    if usable.cores < usable.affinity:
        for name in _THREADS:
            os.environ.setdefault(name, str(usable.cores))


if __name__ == "__main__":
    entry()
