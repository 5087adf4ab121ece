"""``mythos-edge score``: logits and depth of given tokens, as a file."""

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.errors import UsageError
from mythos_edge.model.output_files import check_output, writing
from mythos_edge.runtime.loop_engine import LoopEngine
from mythos_edge.runtime.scoring import Score
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import arguments, given_tokens, options
from mythos_edge.scripts.console import Console

HELP = "write the logits and depth of given tokens"
EXAMPLE = "mythos-edge score model.bundle --ids ids.npy -o scores.npz --prefill 24"
_SCORES = "the scores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_bundle(parser)
    tokens = parser.add_mutually_exclusive_group(required=True)
    tokens.add_argument("--ids", type=arguments.file_name, metavar="NPY", help="int64 array (batch, positions)")
    given_tokens.add_text(tokens)
    given_tokens.add_row_tokens(parser)
    parser.add_argument("-o", "--output", type=arguments.path, required=True, metavar="NPZ")
    parser.add_argument("--prefill", type=int, metavar="N", help="positions fed as one chunk (default: all)")
    options.add_depth(parser)
    options.add_target(parser)
    options.add_threads(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    given_tokens.are_given(args, "--ids", args.ids)
    bundle = open_bundle(args.bundle, trust_engines=args.trust)
    ids = given_tokens.tokens_of(args, args.ids, bundle).ids
    check_output(args.output, _SCORES)
    console.leave_stdout_to(args.output)
    score = _score(args, bundle, ids, console)
    with writing(args.output, _SCORES) as file:
        np.savez(
            file,
            ids=ids,
            logits=score.logits,
            depth=score.depth,
            block_calls=np.array(score.block_calls),
            block_rows=np.array(score.block_rows),
        )
    console.say(
        f"{args.output}: {ids.shape[0]} x {ids.shape[1]} positions, mean depth {score.depth.mean():.2f}, "
        f"{score.block_calls} block calls"
    )
    console.result(
        {
            "output": str(args.output),
            "mean_depth": float(score.depth.mean()),
            "block_calls": score.block_calls,
            "block_rows": score.block_rows,
            "catch_up_calls": score.catch_up_calls,
        }
    )
    return 0


def _score(args: argparse.Namespace, bundle: Bundle, ids: NDArray[Any], console: Console) -> Score:
    spec = None if args.target is None else bundle.target(args.target)
    if spec is not None and spec.has_loop_inside:
        if args.prefill is not None:
            raise UsageError("--prefill is for a cache, and this target has none: leave it out")
        with LoopEngine(bundle, args.target, trust=args.trust) as engine:
            return engine.score(ids, **options.depth_of(args))
    with Session.of(bundle, target=args.target, preset=args.preset, threads=args.threads, trust=args.trust) as session:
        return session.score(
            ids,
            prefill=args.prefill,
            progress=lambda fraction: console.progress("scoring", fraction),
            **options.depth_of(args),
        )
