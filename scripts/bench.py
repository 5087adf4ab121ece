"""``mythos-edge bench``: how fast a bundle's targets are on this machine, and how near to what its memory allows."""

import argparse
import csv
import dataclasses
import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from mythos_edge.model.errors import UsageError
from mythos_edge.runtime.backend import TARGET, OrtBackend, cores, graph_runner
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import measuring, options
from mythos_edge.scripts.console import Console
from mythos_edge.scripts.doctor import processor

HELP = "measure a bundle's speed on this machine"
EXAMPLE = "mythos-edge bench model.bundle -p 512 -n 128 --target ort-cpu,ort-cpu-int4"
# The columns of the table, in order; every repetition gives one of each.
_UNITS = {
    "ttft_ms": "ms",
    "prefill_tokens_per_s": "1/s",
    "decode_tokens_per_s": "1/s",
    "ms_per_token": "ms",
    "ms_per_loop_step": "ms",
    "host_us_per_loop_step": "us",
    "mean_depth": "loop steps",
    "block_calls_per_token": "",
    "weight_mb_per_token": "MB",
    "stream_percent": "%",
}
_DEPTH_ROUNDS, _DEPTH_PROMPT = 8, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-p", "--prompt-tokens", type=int, default=512, metavar="N")
    parser.add_argument("-n", "--new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("-d", "--depth", type=float, metavar="X", help="set the threshold for this mean depth")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N")
    parser.add_argument("--target", default=TARGET, metavar="NAMES", help="one or more, separated by commas; or all")
    parser.add_argument("--format", choices=("md", "csv"), default="md", help="the table's form (default: md)")
    parser.add_argument("--loop-graph", action="store_true", help="measure model.onnx over the prompt, too")
    options.add_depth(parser)
    options.add_threads(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    for name in ("prompt_tokens", "new_tokens", "repetitions"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    threads = args.threads or cores()
    bandwidths = [measuring.stream_bandwidth(threads)]
    targets = {name: _measure(args, name, bandwidths, console) for name in _targets(args)}
    report = {
        "bundle": str(args.bundle),
        "machine": f"{processor()}, {threads} threads",
        "policy": args.policy,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "repetitions": args.repetitions,
        "stream_gb_per_s": max(bandwidths) / 1e9,
        "targets": targets,
    }
    if args.loop_graph:
        report["loop_graph"] = _loop_graph(args)
    console.say(_table(targets, args.format))
    for name, target in targets.items():
        if target["noise"] is not None:
            console.note(f"{name}: {target['noise']}")
    if not console.as_json:
        console.say(json.dumps(report))
    console.result(report)
    return 0


def _targets(args: argparse.Namespace) -> list[str]:
    if args.target != "all":
        return [name for name in args.target.split(",") if name]
    with Session.open(args.bundle) as session:
        return list(session.bundle.manifest.targets)


def _measure(args: argparse.Namespace, name: str, bandwidths: list[float], console: Console) -> dict[str, Any]:
    """One target's figures; the memory bandwidth is measured again after it, in the same run."""
    started = time.perf_counter()
    with Session.open(args.bundle, target=name, threads=args.threads) as session:
        load_ms = (time.perf_counter() - started) * 1e3
        _check_length(args, session)
        prompt = np.random.default_rng(0).integers(0, session.config.vocab_size, args.prompt_tokens).tolist()
        depth = options.depth_of(args)
        if args.depth is not None:
            console.progress(f"{name}: looking for the threshold", 0.0)
            depth["threshold"] = threshold_of_mean_depth(session, prompt, args.new_tokens, args.depth)
        runs = []
        for index in range(args.repetitions + 1):
            console.progress(f"{name}: measuring", index / (args.repetitions + 1))
            runs.append(_one(session, name, prompt, args.new_tokens, depth))
        resident = measuring.resident_bytes()
        plan = session.plan(args.prompt_tokens + args.new_tokens, max_depth=args.max_depth)
    bandwidths.append(measuring.stream_bandwidth(args.threads or cores()))
    for one in runs:
        one["stream_percent"] = one["weight_mb_per_token"] * 1e8 / (one["ms_per_token"] / 1e3) / max(bandwidths)
    # The first run warms caches and is left out.
    figures = {figure: measuring.spread_of([one[figure] for one in runs[1:]]) for figure in runs[0]}
    return {
        "load_ms": load_ms,
        "resident_mb": resident / 1e6,
        "cache_mb": plan.cache_bytes / 1e6,
        "threshold": depth["threshold"],
        "noise": measuring.noise(bandwidths[-2:], figures["ms_per_token"]),
        **{figure: dataclasses.asdict(spread) for figure, spread in figures.items()},
    }


def _check_length(args: argparse.Namespace, session: Session) -> None:
    needed, limit = args.prompt_tokens + args.new_tokens, session.bundle.manifest.max_context
    if needed > limit:
        raise UsageError(
            f"{args.prompt_tokens} prompt and {args.new_tokens} new tokens are {needed}; this bundle was exported "
            f"for {limit}: lower -p or -n"
        )


def threshold_of_mean_depth(session: Session, prompt: list[int], count: int, wanted: float) -> float:
    """The halting threshold at which ``count`` generated tokens take about ``wanted`` loop steps on average.

    Looked for after the end of the prompt only, which is quicker.
    """
    low, high = 0.0, session.config.act_threshold
    for _ in range(_DEPTH_ROUNDS):
        middle = (low + high) / 2
        tail = prompt[-_DEPTH_PROMPT:]
        depths = session.generate(tail, max_new_tokens=count, threshold=middle, stop_ids=()).depths
        low, high = (middle, high) if statistics.fmean(depths) < wanted else (low, middle)
    return high


def _one(session: Session, target: str, prompt: list[int], count: int, depth: dict[str, Any]) -> dict[str, float]:
    """One generation: the prompt until the first token, then decoding alone."""
    assert isinstance(session.backend, OrtBackend)
    stream = session.stream(prompt, max_new_tokens=count + 1, stop_ids=(), **depth)
    next(stream)
    first, inside, started = session.last_generation.block_calls, session.backend.graph_seconds, time.perf_counter()
    for _ in stream:
        pass
    seconds = time.perf_counter() - started
    result = session.last_generation
    tokens, calls = len(result.ids) - 1, result.block_calls - first
    host_us = (seconds - (session.backend.graph_seconds - inside)) * 1e6
    spec = session.bundle.manifest.targets[target]
    return {
        "ttft_ms": result.ttft_ms,
        "prefill_tokens_per_s": len(prompt) / result.ttft_ms * 1e3,
        "decode_tokens_per_s": tokens / seconds,
        "ms_per_token": seconds * 1e3 / tokens,
        "ms_per_loop_step": seconds * 1e3 / calls,
        "host_us_per_loop_step": host_us / calls,
        "mean_depth": statistics.fmean(result.depths),
        "block_calls_per_token": calls / tokens,
        # The roofline: once a token what is outside the loop, and once a call of the block what is inside.
        "weight_mb_per_token": (spec.fixed_bytes + spec.step_bytes * calls / tokens) / 1e6,
    }


def _loop_graph(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of ``model.onnx`` over the prompt when every position halts at once, and when none does."""
    with Session.open(args.bundle) as session:
        bundle, config = session.bundle, session.config
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, args.prompt_tokens)
    run_graph = graph_runner(bundle.file(bundle.manifest.graphs["model"].file), args.threads)
    figures = {}
    for name, threshold in (("halting_at_1_ms", 1e-9), ("full_depth_ms", np.inf)):
        feeds = {
            "input_ids": prompt[None],
            "max_depth": np.array(config.max_loop_iters),
            "threshold": np.array(threshold, np.float32),
        }
        times = []
        for _ in range(args.repetitions + 1):
            started = time.perf_counter()
            run_graph(feeds)
            times.append((time.perf_counter() - started) * 1e3)
        figures[name] = dataclasses.asdict(measuring.spread_of(times[1:]))
    return figures


def _table(targets: dict[str, dict[str, Any]], form: str) -> str:
    """A line for each figure; in Markdown a column for each target, as median (least to largest)."""
    if form == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["target", "figure", "unit", "median", "min", "max"])
        for name, target in targets.items():
            for figure, unit in _UNITS.items():
                writer.writerow([name, figure, unit, *(target[figure][part] for part in ("median", "min", "max"))])
        return text.getvalue().rstrip("\n")
    rows = [["", *targets]]
    for figure, unit in (("load_ms", "ms"), ("resident_mb", "MB"), *_UNITS.items()):
        label = figure.removesuffix("_ms").removesuffix("_mb").removesuffix("_percent").replace("_", " ")
        cells = [_cell(target[figure]) for target in targets.values()]
        rows.append([f"{label}, {unit}" if unit and not label.startswith("ms") else label, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [[rows[0][0].ljust(widths[0]), *_right(rows[0], widths)]]
    lines += [["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]]
    lines += [[row[0].ljust(widths[0]), *_right(row, widths)] for row in rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(figure: Any) -> str:
    if not isinstance(figure, dict):
        return f"{figure:.4g}"
    return f"{figure['median']:.4g} ({figure['min']:.4g} to {figure['max']:.4g})"


def _right(row: list[str], widths: list[int]) -> list[str]:
    return [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
