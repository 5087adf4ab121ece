"""``mythos-edge bench``: how fast a bundle's targets are on this machine, and how near to what its memory allows."""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import numpy as np

from mythos_edge.exporter.targets.ort_cpu import OrtCpuTarget
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.errors import UsageError
from mythos_edge.model.machine import free_memory_bytes
from mythos_edge.model.output_files import check_output, writing
from mythos_edge.runtime.backends.opening import require_cache
from mythos_edge.runtime.backends.ort_cpu import OrtCpuBackend
from mythos_edge.runtime.backends.ort_session import graph_runner, thread_count
from mythos_edge.runtime.caches import plan_cache, require_memory
from mythos_edge.runtime.options import Options
from mythos_edge.runtime.session import Session
from mythos_edge.runtime.speculation import check_draft
from mythos_edge.scripts import arguments, bench_report, measuring, options
from mythos_edge.scripts.console import Console
from mythos_edge.scripts.doctor import processor

HELP = "measure a bundle's speed on this machine"
EXAMPLE = "mythos-edge bench model.bundle -p 512 -n 128 --target ort-cpu,ort-cpu-int4"
_PAGE = "the page"
_DEPTH_ROUNDS = 6
_PROMPT_TOKENS, _NEW_TOKENS = 512, 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_bundle(parser)
    parser.add_argument(
        "-p", "--prompt-tokens", type=int, metavar="N", help=f"default: {_PROMPT_TOKENS}, or what the context holds"
    )
    parser.add_argument("-n", "--new-tokens", type=int, metavar="N", help=f"default: {_NEW_TOKENS}, or fewer likewise")
    parser.add_argument("-d", "--depth", type=float, metavar="X", help="set the threshold for this mean depth")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="default: 5")
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--target", metavar="NAMES", help="one or more, separated by commas; or all")
    wanted.add_argument("--weights", metavar="KINDS", help="fp32, int8, int4: the targets that build makes of them")
    parser.add_argument("--format", choices=("md", "csv"), default="md", help="the table's form (default: md)")
    parser.add_argument("--html", type=arguments.path, metavar="FILE", help="write the figures as a page, too")
    parser.add_argument("-b", "--batch", type=int, metavar="N", help="N prompts together, and one after another, too")
    parser.add_argument("--loop-graph", action="store_true", help="measure model.onnx over the prompt, too")
    options.add_depth(parser)
    options.add_drafts(parser)
    options.add_cache(parser)
    options.add_threads(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    arguments.require_positive(args, "prompt_tokens", "new_tokens", "repetitions", "batch")
    if args.draft_tokens is not None and args.draft_depth is None:
        raise UsageError(f"--draft-tokens is {args.draft_tokens} without --draft-depth: give both")
    if args.depth is not None and (args.threshold is not None or not args.depth >= 1):
        raise UsageError(f"--depth {args.depth:g} looks for a threshold: expected 1 or more, and no --threshold")
    names = _targets(args, console)
    threads = thread_count(args.threads)
    chosen = choose_lengths(args, open_bundle(args.bundle).manifest.max_context)
    _check_before(args, names)
    if args.html is not None:
        check_output(args.html, _PAGE)
        console.leave_stdout_to(args.html)
    if chosen is not None:
        console.note(chosen)
    bandwidths = [measuring.stream_bandwidth(threads)]
    targets: dict[str, dict[str, Any]] = {}
    for name in names:
        targets |= _measure(args, name, bandwidths, console)
    report = {
        "bundle": str(args.bundle),
        "machine": f"{processor()}, {threads} threads",
        "policy": args.policy,
        "cache": args.cache,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "repetitions": args.repetitions,
        "stream_gb_per_s": max(bandwidths) / 1e9,
        "targets": targets,
    }
    if args.loop_graph:
        report["loop_graph"] = _loop_graph(args)
    if args.html is not None:
        with writing(args.html, _PAGE) as file:
            file.write(bench_report.page(report).encode())
    console.say(bench_report.csv_of(targets) if args.format == "csv" else bench_report.markdown(targets, console.width))
    for name, target in targets.items():
        if target["noise"] is not None:
            console.note(f"{name}: {target['noise']}")
    console.result(report if args.html is None else {**report, "html": str(args.html)})
    return 0


def _targets(args: argparse.Namespace, console: Console) -> list[str]:
    bundle = open_bundle(args.bundle)
    manifest, default = bundle.manifest, bundle.manifest.default_target
    if args.weights is not None:
        return [OrtCpuTarget(weights).name for weights in args.weights.split(",")]
    asked = default if args.target is None else args.target
    names = list(manifest.targets) if asked == "all" else arguments.target_names(asked)
    # There runs are queued: what a graph takes is not seen from here.
    on_gpu = [name for name in names if bundle.target(name).kind != OrtCpuTarget.kind]
    if on_gpu and args.target != "all":
        raise UsageError(
            f"bench compares with the memory of a CPU, and {on_gpu[0]!r} is for a GPU: run scripts/gpu_check"
        )
    if on_gpu:
        console.note(f"left out, as they are for a GPU: {', '.join(on_gpu)}")
    return [name for name in names if name not in on_gpu]


def choose_lengths(args: argparse.Namespace, context: int) -> str | None:
    """Puts defaults that fit the bundle's context in place of -p and -n that were not given; a note where smaller."""
    asked = args.prompt_tokens, args.new_tokens
    if args.new_tokens is None:
        # A fifth, as where nothing is short; beside a prompt that was asked for, what it leaves.
        args.new_tokens = max(1, min(_NEW_TOKENS, context - asked[0] if asked[0] else context // 5))
    if args.prompt_tokens is None:
        args.prompt_tokens = max(1, min(_PROMPT_TOKENS, context - args.new_tokens))
    usual = asked[0] or _PROMPT_TOKENS, asked[1] or _NEW_TOKENS
    if usual == (args.prompt_tokens, args.new_tokens):
        return None
    return f"note: this bundle's context is {context} tokens: measuring -p {args.prompt_tokens} -n {args.new_tokens}"


def _measure(
    args: argparse.Namespace, name: str, bandwidths: list[float], console: Console
) -> dict[str, dict[str, Any]]:
    """A target's figures, and with drafts those of drafting beside them, repetition by repetition.

    The memory bandwidth is measured again after it, in the same run.
    """
    started = time.perf_counter()
    with Session.open(args.bundle, target=name, threads=args.threads, cache=args.cache) as session:
        load_ms = (time.perf_counter() - started) * 1e3
        prompt = np.random.default_rng(0).integers(0, session.model.vocab_size, args.prompt_tokens).tolist()
        depth = options.depth_of(args)
        if args.depth is not None:
            if not session.model.halts:
                raise UsageError(f"--depth is {args.depth:g}, but no position of this model halts: use --max-depth")
            console.progress(f"{name}: looking for the threshold", 0.0)
            depth["threshold"] = threshold_of_mean_depth(session, prompt, args.new_tokens, args.depth)
        requests = {name: depth}
        if args.draft_depth is not None:
            requests[f"{name} drafting"] = depth | options.drafts_of(args)
        runs: dict[str, list[dict[str, float]]] = {one: [] for one in requests}
        for index in range(args.repetitions + 1):
            console.progress(f"{name}: measuring", index / (args.repetitions + 1))
            for one, request in requests.items():
                runs[one].append(_one(session, name, prompt, args.new_tokens, request))
        resident = measuring.resident_bytes()
        batch = _batch(args, session, depth, console) if args.batch else {}
        plan = session.plan(args.prompt_tokens + args.new_tokens, max_depth=args.max_depth)
    bandwidths.append(measuring.stream_bandwidth(thread_count(args.threads)))
    common = {
        "load_ms": load_ms,
        "resident_mb": resident / 1e6,
        "cache_mb": plan.cache_bytes / 1e6,
        "threshold": depth["threshold"],
        **batch,
    }
    return {one: common | _figures(made[1:], bandwidths) for one, made in runs.items()}


def _figures(runs: list[dict[str, float]], bandwidths: list[float]) -> dict[str, Any]:
    """Spreads over the repetitions, without the first, which warmed caches; ``noise`` says when not to trust them."""
    bandwidth = max(bandwidths)
    for one in runs:
        one["stream_percent"] = one["weight_mb_per_token"] * 1e8 / (one["ms_per_token"] / 1e3) / bandwidth
        one["loop_step_stream_percent"] = 100 * one.pop("step_bytes_per_s") / bandwidth
    figures = {figure: measuring.spread_of([one[figure] for one in runs]) for figure in bench_report.UNITS}
    spreads = {figure: dataclasses.asdict(spread) for figure, spread in figures.items()}
    return spreads | {"noise": measuring.noise(bandwidths[-2:], figures["ms_per_token"])}


def _batch(args: argparse.Namespace, session: Session, depth: dict[str, Any], console: Console) -> dict[str, Any]:
    """Tokens per second, prompts included, of several sequences together and one after another, taking turns."""
    random = np.random.default_rng(1)
    prompts = random.integers(0, session.model.vocab_size, (args.batch, args.prompt_tokens)).tolist()
    request = {"max_new_tokens": args.new_tokens, "stop_ids": (), **depth}
    seconds: dict[str, list[float]] = {"together": [], "one_by_one": []}
    equal = True
    for index in range(args.repetitions + 1):
        console.progress("batch", index / (args.repetitions + 1))
        started = time.perf_counter()
        together = session.generate(prompts, **request)
        between = time.perf_counter()
        alone = [session.generate(prompt, **request) for prompt in prompts]
        seconds["together"].append(between - started)
        seconds["one_by_one"].append(time.perf_counter() - between)
        equal = equal and [one.ids for one in together] == [one.ids for one in alone]
    tokens = args.batch * args.new_tokens
    rates = {f"batch_{how}_tokens_per_s": tokens / statistics.median(times[1:]) for how, times in seconds.items()}
    ratio = rates["batch_together_tokens_per_s"] / rates["batch_one_by_one_tokens_per_s"]
    return {**rates, "batch_ratio": ratio, "batch_equal_tokens": equal}


def _check_before(args: argparse.Namespace, names: list[str]) -> None:
    """Raises UsageError, BundleError for what would be refused after minutes of measuring."""
    bundle = open_bundle(args.bundle)
    for name in names:
        record = bundle.target(name)
        require_cache(bundle, name, record, args.cache or record.own_cache)
    wanted = Options(**options.depth_of(args), **options.drafts_of(args))
    depth = wanted.depth.resolve(bundle.manifest.model)
    check_draft(wanted.draft_depth, depth)
    needed, limit = args.prompt_tokens + args.new_tokens, bundle.manifest.max_context
    if needed > limit:
        raise UsageError(
            f"{args.prompt_tokens} prompt and {args.new_tokens} new tokens are {needed}; this bundle was exported "
            f"for {limit}: lower -p or -n"
        )
    deepest = depth.max_depth
    if args.depth is not None and args.depth > deepest:
        raise UsageError(f"--depth is {args.depth:g}, expected at most {deepest}, the largest number of loop steps")
    if args.batch is not None:
        model = bundle.manifest.model
        plan = plan_cache(model, deepest, needed, args.batch, row_bytes=model.row_bytes(args.cache or "fp32"))
        require_memory(plan, 0, free_memory_bytes())


def threshold_of_mean_depth(session: Session, prompt: list[int], count: int, wanted: float) -> float:
    """The halting threshold at which ``count`` generated tokens take about ``wanted`` loop steps on average.

    Tokens change with the threshold, so the nearest of a few is taken.
    """
    low, high = 0.0, session.model.threshold
    found = []
    for _ in range(_DEPTH_ROUNDS):
        middle = (low + high) / 2
        depth = statistics.fmean(session.generate(prompt, max_new_tokens=count, threshold=middle, stop_ids=()).depths)
        found.append((abs(depth - wanted), middle))
        low, high = (middle, high) if depth < wanted else (low, middle)
    return min(found)[1]


def _one(session: Session, target: str, prompt: list[int], count: int, request: dict[str, Any]) -> dict[str, float]:
    """One generation: the prompt until the first token, then decoding alone."""
    assert isinstance(session.backend, OrtCpuBackend)
    stream = session.stream(prompt, max_new_tokens=count + 1, stop_ids=(), **request)
    next(stream)
    backend, first = session.backend, session.last_generation.block_calls
    inside, in_step, started = backend.graph_seconds(), backend.graph_seconds("step"), time.perf_counter()
    for _ in stream:
        pass
    seconds = time.perf_counter() - started
    inside, in_step = backend.graph_seconds() - inside, backend.graph_seconds("step") - in_step
    result = session.last_generation
    tokens, calls = len(result.ids) - 1, result.block_calls - first
    spec = session.bundle.manifest.targets[target]
    return {
        "ttft_ms": result.ttft_ms,
        "prefill_tokens_per_s": len(prompt) / result.ttft_ms * 1e3,
        "decode_tokens_per_s": tokens / seconds,
        "ms_per_token": seconds * 1e3 / tokens,
        "ms_per_loop_step": seconds * 1e3 / calls,
        "graph_ms_per_loop_step": in_step * 1e3 / calls,
        "host_us_per_loop_step": (seconds - inside) * 1e6 / calls,
        "mean_depth": statistics.fmean(result.depths),
        "block_calls_per_token": calls / tokens,
        # The roofline: once a token what is outside the loop, and once a call of the block what is inside.
        "weight_mb_per_token": (spec.fixed_bytes + spec.step_bytes * calls / tokens) / 1e6,
        "step_bytes_per_s": spec.step_bytes * calls / in_step,
        "drafted_tokens_accepted": result.accepted / result.drafted if result.drafted else float("nan"),
    }


def _loop_graph(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of ``model.onnx`` over the prompt when every position halts at once, and when none does."""
    with Session.open(args.bundle) as session:
        bundle, config = session.bundle, session.model
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, args.prompt_tokens)
    run_graph = graph_runner(bundle, "model", args.threads)
    figures = {}
    for name, threshold in (("halting_at_1_ms", 1e-9), ("full_depth_ms", np.inf)):
        feeds = {
            "input_ids": prompt[None],
            "max_depth": np.array(config.max_depth),
            "threshold": np.array(threshold, np.float32),
        }
        times = []
        for _ in range(args.repetitions + 1):
            started = time.perf_counter()
            run_graph(feeds)
            times.append((time.perf_counter() - started) * 1e3)
        figures[name] = dataclasses.asdict(measuring.spread_of(times[1:]))
    return figures
