"""``mythos-edge completion``: the script with which a shell completes verbs, options, their choices and files."""

import argparse
from collections.abc import Iterator

from mythos_edge.model.errors import unavailable
from mythos_edge.scripts import arguments
from mythos_edge.scripts.console import Console

HELP = "print the script with which a shell completes verbs and options"
EXAMPLE = "mythos-edge completion bash > mythos-edge.bash && source mythos-edge.bash"
# Those that shtab writes for and that were tried.
SHELLS = ("bash", "zsh", "fish")
_FILES = (arguments.path, arguments.file_name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = (
        "to stay it belongs, for bash, into ~/.local/share/bash-completion/completions as mythos-edge, for zsh into a "
        "folder of $fpath as _mythos-edge, for fish into ~/.config/fish/completions as mythos-edge.fish; write it "
        "again after an upgrade"
    )
    parser.add_argument("shell", choices=SHELLS, help=text)


def run(args: argparse.Namespace, console: Console) -> int:
    try:
        import shtab
    except ImportError as error:
        raise unavailable(error, "shell completion", "pip install 'mythos-edge[completion]'") from error
    # Of the verb's own parser nothing is known here, and the whole is made by who imports the verbs.
    from mythos_edge.scripts import cli

    command = cli.parser()
    for action in _actions(command):
        if action.type in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    script = shtab.complete(command, args.shell)
    console.text(script.removesuffix("\n") + "\n")
    console.result({"shell": args.shell, "script": script})
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of those below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from _actions(one)
