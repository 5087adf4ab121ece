"""Command-line options that several verbs share."""

import argparse
import math
from typing import Any

from mythos_edge.model.errors import UsageError
from mythos_edge.model.looped import NARROW_CACHES
from mythos_edge.runtime.halting import Policy
from mythos_edge.runtime.session import Session
from mythos_edge.runtime.speculation import AUTO

# What numpy and torch both take, and a few more after it.
_LARGEST_SEED = (1 << 32) - 1
DEPTH = ("policy", "min_depth", "max_depth", "threshold")
_DRAFTS = ("draft_depth", "draft_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


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
    add_cache(parser)


def add_trust(parser: argparse._ActionsContainer) -> None:
    text = "load TensorRT engines even if they are not the files the manifest lists"
    parser.add_argument("--trust", action="store_true", help=text)


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: all cores)")


def add_cache(parser: argparse._ActionsContainer) -> None:
    text = "keep cached rows in this: a half or about a quarter of the memory of fp32 (default: the target's own form)"
    parser.add_argument("--cache", choices=("fp32", *NARROW_CACHES), help=text)


def add_selftest(parser: argparse.ArgumentParser) -> None:
    text = "first make sure that this machine computes what the exporter saw, and else end with an error"
    parser.add_argument("--selftest", action="store_true", help=text)


def session_of(args: argparse.Namespace) -> Session:
    """The bundle on the target and preset asked for, with its caches in the form asked for."""
    return Session.open(args.bundle, selftest=args.selftest, **target_of(args))


def target_of(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of a Session that ``add_target`` and ``add_threads`` ask for."""
    return {name: getattr(args, name) for name in ("target", "preset", "threads", "trust", "cache")}


def depth_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in DEPTH}


def drafts_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _DRAFTS}


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SAMPLING}


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
