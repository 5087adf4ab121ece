"""Command-line options that several verbs share."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.errors import UsageError
from mythos_edge.runtime.halting import Policy
from mythos_edge.runtime.session import Session
from mythos_edge.runtime.speculation import AUTO

_DEPTH = ("policy", "min_depth", "max_depth", "threshold")
_DRAFTS = ("draft_depth", "draft_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def path(text: str) -> Path:
    """A file or folder that is named in an argument. Raises UsageError for an empty name, which would be ``.``."""
    return Path(file_name(text))


def file_name(text: str) -> str:
    """A name that is not empty. Raises UsageError."""
    if not text:
        raise UsageError("the name of a file or folder is empty: name one, or leave its option out")
    return text


def text_of(text: str, option: str) -> str:
    """A text as it stands in the command line. Raises UsageError for bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{option} is not UTF-8, from character {error.start + 1} on: give it in UTF-8") from None
    return text


def add_depth(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("depth")
    group.add_argument("--policy", choices=[str(policy) for policy in Policy], default="exact", help="default: exact")
    group.add_argument(
        "--min-depth", type=int, default=1, metavar="N", help="loop steps every position takes (default: 1)"
    )
    group.add_argument("--max-depth", type=int, metavar="N", help="largest number of loop steps (default: as trained)")
    group.add_argument(
        "--threshold", type=float, metavar="X", help="halting mass that ends a position's loop (default: as trained)"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default)")
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="0 is all (default)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="X", help="1 is all (default)")
    group.add_argument("--min-p", type=float, default=0.0, metavar="X", help="0 is all (default)")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1 is none (default)")
    group.add_argument("--seed", type=int, metavar="N", help="of the draws (default: another every time)")


def add_drafts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("self-speculation")
    group.add_argument(
        "--draft-depth", type=_number_or_auto, metavar="N", help="loop steps of a draft, or auto (default: none)"
    )
    group.add_argument("--draft-tokens", type=_number_or_auto, metavar="N", help="tokens of a draft, or auto (default)")


def add_checkpoint(parser: argparse.ArgumentParser, rope_table: str | None) -> None:
    """How a checkpoint is read; ``rope_table`` is the help of --rope-table, which is left out where it is None."""
    parser.add_argument("--config", type=path, metavar="JSON", help="config fields the checkpoint does not tell")
    text = "where the model's tensors are in the file (dotted where nested), if not under a key that trainers use"
    parser.add_argument("--key", metavar="NAME", help=text)
    if rope_table is not None:
        parser.add_argument("--rope-table", choices=("config", "stored"), help=rope_table)


def add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", metavar="NAME", help="what mythos-edge build made (default: ort-cpu)")
    parser.add_argument("--preset", metavar="NAME", help="target and depth that mythos-edge tune found")
    add_trust(parser)


def add_trust(parser: argparse._ActionsContainer) -> None:
    text = "load TensorRT engines even if they are not the files the manifest lists"
    parser.add_argument("--trust", action="store_true", help=text)


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: all cores)")


def session_of(args: argparse.Namespace) -> Session:
    """The bundle on the target and preset asked for."""
    return Session.open(args.bundle, target=args.target, preset=args.preset, threads=args.threads, trust=args.trust)


def depth_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _DEPTH}


def drafts_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _DRAFTS}


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _SAMPLING}


def _number_or_auto(text: str) -> int | str:
    if text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def ids_from_text(text: str) -> list[int]:
    """Token ids from ``1,2,3``; UsageError for anything else."""
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise UsageError(f"--ids is {text!r}, expected numbers like 1,2,3") from None


def ids_from_file(path: str) -> NDArray[Any]:
    """The array in a .npy file; UsageError when it is missing or not one."""
    try:
        loaded = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UsageError(f"{path}: can not read the ids: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise UsageError(f"{path}: not a .npy file of numbers: save the ids with numpy.save") from error
    if not isinstance(loaded, np.ndarray):
        raise UsageError(f"{path}: expected a .npy file with one array, got an archive")
    return loaded
