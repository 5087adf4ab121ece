"""``mythos-edge bench``: how fast a bundle is on this machine, and where the time goes."""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from mythos_edge.model.errors import UsageError
from mythos_edge.runtime.backend import OrtBackend, cores, graph_runner
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import options
from mythos_edge.scripts.console import Console

HELP = "measure a bundle's speed on this machine"
EXAMPLE = "mythos-edge bench model.bundle -p 512 -n 128 --policy exact"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-p", "--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("-n", "--new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N")
    options.add_depth(parser)
    options.add_threads(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    for name in ("prompt_tokens", "new_tokens", "repetitions"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    started = time.perf_counter()
    with Session.open(args.bundle, threads=args.threads) as session:
        load_ms = (time.perf_counter() - started) * 1e3
        needed, limit = args.prompt_tokens + args.new_tokens, session.bundle.manifest.max_context
        if needed > limit:
            raise UsageError(
                f"{args.prompt_tokens} prompt and {args.new_tokens} new tokens are {needed}; this bundle was exported "
                f"for {limit}: lower -p or -n"
            )
        random = np.random.default_rng(0)
        prompt = random.integers(0, session.config.vocab_size, args.prompt_tokens).tolist()
        runs = []
        for index in range(args.repetitions + 1):
            console.progress("measuring", index / (args.repetitions + 1))
            runs.append(_one(session, prompt, args))
        figures = _loop_graph(session, prompt, args.repetitions, args.threads)
        plan = session.plan(args.prompt_tokens + args.new_tokens, max_depth=args.max_depth)
    # The first run warms caches and is left out.
    figures |= {name: _spread([one[name] for one in runs[1:]]) for name in runs[0]}
    report = {
        "bundle": str(args.bundle),
        "policy": args.policy,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "threads": args.threads or cores(),
        "load_ms": load_ms,
        "cache_bytes": plan.cache_bytes,
        **figures,
    }
    console.say(f"| {'':28} | {'median':>10} | {'min':>10} | {'max':>10} |")
    console.say(f"|{'-' * 30}|{'-' * 11}:|{'-' * 11}:|{'-' * 11}:|")
    for name, figure in figures.items():
        console.say(f"| {name:28} | {figure['median']:10.2f} | {figure['min']:10.2f} | {figure['max']:10.2f} |")
    console.result(report)
    return 0


def _one(session: Session, prompt: list[int], args: argparse.Namespace) -> dict[str, float]:
    assert isinstance(session.backend, OrtBackend)
    stream = session.stream(prompt, max_new_tokens=args.new_tokens + 1, stop_ids=(), **options.depth_of(args))
    next(stream)
    calls, inside, started = (
        session.last_generation.block_calls,
        session.backend.graph_seconds,
        time.perf_counter(),
    )
    for _ in stream:
        pass
    seconds = time.perf_counter() - started
    result = session.last_generation
    tokens = len(result.ids) - 1
    calls = result.block_calls - calls
    host_us = (seconds - (session.backend.graph_seconds - inside)) * 1e6
    return {
        "ttft_ms": result.ttft_ms,
        "prefill_tokens_per_s": len(prompt) / result.ttft_ms * 1e3,
        "decode_tokens_per_s": tokens / seconds,
        "decode_ms_per_loop_step": seconds * 1e3 / calls,
        "host_us_per_loop_step": host_us / calls,
        "mean_depth": statistics.fmean(result.depths),
        "block_calls_per_token": calls / tokens,
    }


def _loop_graph(session: Session, prompt: list[int], repetitions: int, threads: int) -> dict[str, Any]:
    """Milliseconds of ``model.onnx`` over the prompt when every position halts at once, and when none does."""
    run_graph = graph_runner(session.bundle.file(session.bundle.manifest.graphs["model"].file), threads)
    figures = {}
    for name, threshold in (("loop_graph_halting_at_1_ms", 1e-9), ("loop_graph_full_depth_ms", np.inf)):
        feeds = {
            "input_ids": np.array([prompt]),
            "max_depth": np.array(session.config.max_loop_iters),
            "threshold": np.array(threshold, np.float32),
        }
        times = []
        for _ in range(repetitions + 1):
            started = time.perf_counter()
            run_graph(feeds)
            times.append((time.perf_counter() - started) * 1e3)
        figures[name] = _spread(times[1:])
    return figures


def _spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
