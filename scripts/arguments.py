"""Arguments of the command line that need no model: places, texts, and how a checkpoint is read.

Imports nothing that takes time, since optimum-cli reads the options of an export at every start.
"""

import argparse
from pathlib import Path

from mythos_edge.model.errors import UsageError


def path(text: str) -> Path:
    """A file or folder that is named in an argument. Raises UsageError for an empty name, which would be ``.``."""
    return Path(file_name(text))


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """Adds the place of the bundle that a verb works on."""
    parser.add_argument("bundle", type=path, help="a folder that mythos-edge export made")


def file_name(text: str) -> str:
    """A name that is not empty. Raises UsageError."""
    if not text:
        raise UsageError("the name of a file or folder is empty: name one, or leave its option out")
    return text


def target_names(text: str, option: str = "--target") -> list[str]:
    """The names of targets in the argument of an option. Raises UsageError where there is none."""
    names = [name for name in text.split(",") if name]
    if not names:
        raise UsageError(f"{option} is {text!r}, expected names of targets, with commas between")
    return names


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises UsageError for an option that is given and less than 1."""
    for name in names:
        number = getattr(args, name)
        if number is not None and number < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {number}, expected at least 1")


def text_of(text: str, option: str) -> str:
    """A text as it stands in the command line. Raises UsageError for bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{option} is not UTF-8, from character {error.start + 1} on: give it in UTF-8") from None
    return text


def add_checkpoint(parser: argparse.ArgumentParser, rope_table: str | None) -> None:
    """How a checkpoint is read; ``rope_table`` is the help of --rope-table, which is left out where it is None."""
    parser.add_argument("--config", type=path, metavar="JSON", help="config fields the checkpoint does not tell")
    text = "where the model's tensors are in the file (dotted where nested), if not under a key that trainers use"
    parser.add_argument("--key", metavar="NAME", help=text)
    if rope_table is not None:
        parser.add_argument("--rope-table", choices=("config", "stored"), help=rope_table)
