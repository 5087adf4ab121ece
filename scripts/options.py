"""Command-line options that several verbs share."""

import argparse
import io
import math
import os
from collections.abc import Callable, Mapping
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bounded_files import open_regular, size_text
from mythos_edge.model.errors import UsageError
from mythos_edge.model.foreign_files import foreign_kind
from mythos_edge.runtime.halting import Policy
from mythos_edge.runtime.session import Session
from mythos_edge.runtime.speculation import AUTO

# What numpy and torch both take, and a few more after it.
_LARGEST_SEED = (1 << 32) - 1
# Of a .npy file: what numpy itself reads at most, and how, by version of the format.
_MOST_HEADER_BYTES = 1 << 14
_HEADER_READERS: Mapping[tuple[int, int], Callable[..., tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# numpy reads a header as Python text, which can fail in each of these ways.
_NO_ARRAY = (ValueError, EOFError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError)
_DEPTH = ("policy", "min_depth", "max_depth", "threshold")
_DRAFTS = ("draft_depth", "draft_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


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


def add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", metavar="NAME", help="what mythos-edge build made (default: the bundle's first)")
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


def check_nats(limit: float) -> None:
    """Raises UsageError for a --max-kl that nothing or everything would pass."""
    if not 0 <= limit < math.inf:  # written so that NaN fails
        raise UsageError(f"--max-kl is {limit}, expected 0 or more nats")


def check_seed(seed: int) -> None:
    """Raises UsageError for a --seed that no generator of random numbers takes."""
    if not 0 <= seed <= _LARGEST_SEED:
        raise UsageError(f"--seed is {seed}, expected 0 to {_LARGEST_SEED}")


def ids_from_text(text: str) -> list[int]:
    """Token ids from ``1,2,3``; UsageError for anything else."""
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise UsageError(f"--ids is {text!r}, expected numbers like 1,2,3") from None


def ids_from_file(path: str) -> NDArray[Any]:
    """The array in a .npy file; UsageError when it is missing, is not one, or is not as long as its header says."""
    try:
        with open_regular(path) as file:
            _check_array_header(file, path)
            array: NDArray[Any] = np.load(file, allow_pickle=False)
            return array
    except OSError as error:
        raise UsageError(f"{path}: cannot read the ids: {error.strerror or error}") from error
    except _NO_ARRAY as error:
        with open_regular(path) as file:
            known = foreign_kind(file.read(512))
        # A .npy file that is damaged begins as one.
        if known and not known.startswith("a NumPy"):
            raise UsageError(f"{path}: is {known}") from error
        raise UsageError(f"{path}: not a .npy file of numbers: save the ids with numpy.save") from error


def _check_array_header(file: BinaryIO, path: str) -> None:
    """Raises UsageError or ValueError unless an open .npy file holds the numbers that its header tells of."""
    # A header may claim any length and any shape, and numpy would believe both.
    head = io.BytesIO(file.read(_MOST_HEADER_BYTES))
    if head.getvalue().startswith(b"PK"):
        raise UsageError(f"{path}: expected a .npy file with one array, got an archive: save the ids with numpy.save")
    version = np.lib.format.read_magic(head)
    if version not in _HEADER_READERS:
        raise ValueError(f"version {version}")
    shape, _, dtype = _HEADER_READERS[version](head)
    if dtype.kind not in "biufc":
        raise ValueError(f"dtype {dtype}")
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {shape}")
    needed, found = math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size - head.tell()
    if needed != found:
        raise UsageError(
            f"{path}: {dtype} of shape {shape} takes {size_text(needed)}, the file holds {size_text(found)} of it: "
            "save the ids with numpy.save again"
        )
    file.seek(0)
