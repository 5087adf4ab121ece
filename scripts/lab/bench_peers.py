"""Speed beside what people use today: the reference in PyTorch with its cache, interleaved, and llama.cpp after it.

    python -m mythos_edge.scripts.lab.bench_peers --shape 1b -p 512 -n 24
    python -m mythos_edge.scripts.lab.bench_peers --shape d1024 --compile --llama

All decode greedily after the same prompt, with the same random weights. The halting threshold is set, for each target,
so that generated tokens take a quarter of the loop steps on average; the reference runs every step whatever its head
says, because it has a cache. Float32 runs must give the reference's tokens. llama.cpp knows no loops: it runs a
DeepSeek-2 network of the same bytes of weights a token, and only its share of the memory bandwidth compares.
Prints a table, then one line of JSON. Needs the dev extra, for --llama also llama-cpp-python and gguf.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mythos_edge.exporter.export import export_bundle
from mythos_edge.exporter.targets.build import build
from mythos_edge.exporter.targets.ort_cpu import OrtCpuTarget
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.families.openmythos.config import VARIANTS, MythosConfig
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import measuring
from mythos_edge.scripts.bench import threshold_of_mean_depth
from mythos_edge.scripts.doctor import processor
from mythos_edge.scripts.lab import llama_files, peer_llama
from mythos_edge.scripts.lab.llama_files import Network
from mythos_edge.scripts.lab.reference import open_mythos

SHAPES = {
    "1b": VARIANTS["1b"],
    "d1024": replace(
        VARIANTS["1b"], dim=1024, n_heads=8, kv_lora_rank=128, q_lora_rank=256, n_experts=32, expert_dim=1024
    ),
}
# Halting logits with some spread between positions, so that depths differ as they do in a trained model.
_HALT_BIAS, _HALT_SPREAD = -1.5, 0.5
REFERENCE = "torch eager"
_CONTEXT = 4096


@dataclass(frozen=True)
class Run:
    """One generation: the tokens, seconds until the first and seconds per token after it, and what a token read.

    ``accepted`` is the share of drafted tokens that stood verification, NaN where none was drafted.
    """

    ids: list[int]
    prefill_s: float
    token_s: float
    mean_depth: float
    weight_bytes: float
    accepted: float = float("nan")


Runner = Callable[[], Run]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure speed beside the reference and llama.cpp.")
    parser.add_argument("--shape", choices=SHAPES, default="d1024")
    parser.add_argument("--experts", type=int, help="experts of the recurrent block (default: the shape's)")
    parser.add_argument(
        "--weights",
        default="fp32,int8,int4",
        help="targets to build and run, fp32 among them; such as int4-dense-int4, too",
    )
    parser.add_argument("--block", type=int, help="values that share a scale in int8 and int4")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=512)
    parser.add_argument("-n", "--new-tokens", type=int, default=24)
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="run the reference under torch.compile, too")
    parser.add_argument("--llama", action="store_true", help="run llama.cpp, too")
    parser.add_argument("--folder", type=Path, help="where to write checkpoint and bundle (default: temporary)")
    args = parser.parse_args(argv)
    if "fp32" not in args.weights.split(","):
        parser.error("--weights needs fp32, whose tokens are held to the reference's")
    config = replace(SHAPES[args.shape], max_seq_len=_CONTEXT)
    config = replace(config, n_experts=args.experts or config.n_experts)
    bandwidths = [measuring.stream_bandwidth(torch.get_num_threads())]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, ExitStack() as opened:
        model = reference_model(config, seed=0)
        bundle = _bundle(model, Path(folder), args)
        prompt = torch.randint(0, config.vocab_size, (1, args.prompt_tokens))
        runners: dict[str, Runner] = {REFERENCE: lambda: _reference(model, prompt, args.new_tokens)}
        for weights in args.weights.split(","):
            session = opened.enter_context(Session.open(bundle, target=target_of(weights).name))
            tell(f"looking for the threshold of {weights}")
            wanted = config.max_loop_iters / 4
            threshold = threshold_of_mean_depth(session, prompt[0].tolist(), args.new_tokens, wanted)
            runners |= _ours(session, weights, prompt[0].tolist(), args.new_tokens, threshold)
            if weights == "fp32":
                # Its steps are all the same; the threshold decides how it weighs them.
                model.cfg.act_threshold = threshold
        runs = interleaved(runners, args.repetitions)
        if args.compile:
            runs |= _compiled(model, prompt, args)
        llama = llama_runs(_peers(config), Path(folder), args) if args.llama else {}
        bandwidths.append(measuring.stream_bandwidth(torch.get_num_threads()))
    report = report_of(runs, bandwidths) | {"llama.cpp": llama}
    report |= {
        "machine": f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "experts": config.n_experts,
        **{name: value for name, value in vars(args).items() if name != "folder"},
        "stream_gb_per_s": [bandwidth / 1e9 for bandwidth in bandwidths],
    }
    show(report, max(bandwidths), [name for name in runs if name.startswith("fp32")])
    print(json.dumps(report))
    return 0


def reference_model(config: MythosConfig, seed: int) -> Any:
    """The PyPI network with random weights whose activations stay of size 1."""
    main = open_mythos()
    torch.manual_seed(seed)
    model = main.OpenMythos(main.MythosConfig(**config.to_dict())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        model.recurrent.act.halt.weight.normal_(std=_HALT_SPREAD * config.dim**-0.5)
        model.recurrent.act.halt.bias.fill_(_HALT_BIAS)
    return model


def _bundle(model: Any, folder: Path, args: argparse.Namespace) -> Path:
    """A bundle of the model with every target asked for."""
    checkpoint, bundle = folder / "model.pt", folder / "model.bundle"
    tell("exporting")
    torch.save({"model": model.state_dict(), "cfg": model.cfg}, checkpoint)
    with open_checkpoint(checkpoint) as opened:
        export_bundle(opened, bundle)
    checkpoint.unlink()
    for weights in args.weights.split(","):
        tell(f"building {weights}")
        build(bundle, target_of(weights, args.block))
    return bundle


def target_of(weights: str, block: int | None = None) -> OrtCpuTarget:
    """The target of ``weights`` such as int8, or int4-dense-int4; only rounded ones have blocks."""
    target = OrtCpuTarget.from_name(f"{OrtCpuTarget.kind}-{weights}")
    if target is None:
        raise SystemExit(f"--weights has {weights!r}, expected such as fp32, int8, int4 or int4-dense-int4")
    return target if weights == "fp32" else replace(target, block=block)


def _reference(model: Any, prompt: torch.Tensor, count: int) -> Run:
    """The reference's own ``generate``: it takes all loop steps."""
    loops = model.cfg.max_loop_iters
    ends: list[float] = []
    # generate() calls forward() itself, which runs no hooks of the model; the head runs once a token, and last.
    hook = model.head.register_forward_hook(lambda *_: ends.append(time.perf_counter()))
    started = time.perf_counter()
    try:
        # top_k 1 makes its sampling greedy.
        tokens = model.generate(prompt, max_new_tokens=count, n_loops=loops, temperature=1.0, top_k=1)
    finally:
        hook.remove()
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    return Run(tokens[0, prompt.shape[1] :].tolist(), ends[0] - started, seconds, loops, float("nan"))


def _ours(session: Session, weights: str, prompt: list[int], count: int, threshold: float) -> dict[str, Runner]:
    """This runtime under both policies."""
    run = partial(generation, session, target_of(weights).name, prompt, count, threshold=threshold)
    return {f"{weights} {policy}": partial(run, policy=policy) for policy in ("exact", "full")}


def generation(session: Session, target: str, prompt: list[int], count: int, **request: Any) -> Run:
    """One generation of this runtime on the ``target`` that ``session`` has open."""
    spec = session.bundle.manifest.targets[target]
    stream = session.stream(prompt, max_new_tokens=count, stop_ids=(), **request)
    started = time.perf_counter()
    next(stream)
    first, calls = time.perf_counter(), session.last_generation.block_calls
    for _ in stream:
        pass
    seconds, made = time.perf_counter() - first, session.last_generation
    calls_per_token = (made.block_calls - calls) / (count - 1)
    read = spec.fixed_bytes + calls_per_token * spec.step_bytes
    accepted = made.accepted / made.drafted if made.drafted else float("nan")
    return Run(made.ids, first - started, seconds / (count - 1), statistics.fmean(made.depths), read, accepted)


def interleaved(runners: dict[str, Runner], repetitions: int) -> dict[str, list[Run]]:
    """Every run in turn, and again, so that the machine's moods fall on all; a first round only warms up."""
    runs: dict[str, list[Run]] = {name: [] for name in runners}
    for repetition in range(repetitions + 1):
        for name, runner in runners.items():
            tell(f"{name}: repetition {repetition}" if repetition else f"{name}: warming up")
            runs[name].append(runner())
    return {name: made[1:] for name, made in runs.items()}


def _compiled(model: Any, prompt: torch.Tensor, args: argparse.Namespace) -> dict[str, list[Run]]:
    """The reference under torch.compile, if that works."""
    eager = model.forward
    model.forward = torch.compile(eager, dynamic=True)
    tell("torch.compile")
    try:
        return interleaved({"torch.compile": lambda: _reference(model, prompt, args.new_tokens)}, args.repetitions)
    except Exception as error:  # the compiler has no common base class for its errors
        tell(f"torch.compile does not work: {str(error).splitlines()[0]}")
        return {}
    finally:
        model.forward = eager


def _peers(config: MythosConfig) -> dict[str, tuple[Network, str]]:
    """The networks of llama.cpp with the same bytes of weights a token at the mean depth."""
    depth = config.max_loop_iters / 4
    return {weights: (peer_llama.shape_from_config(config, depth, weights), weights) for weights in ("int8", "int4")}


def llama_runs(networks: Mapping[str, tuple[Network, str]], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The speed of llama.cpp on each of ``networks``, stored as the quantisation beside it says, and what it reads."""
    found = {}
    for name, (network, weights) in networks.items():
        tell(f"llama.cpp {name}")
        path = folder / f"{weights}.gguf"
        llama_files.write_gguf(path, network, weights)
        made = llama_files.measure(path, args.prompt_tokens, args.new_tokens, torch.get_num_threads())
        path.unlink()
        found[name] = {
            "ms_per_token": made.ms_per_token,
            "prefill_s": made.prompt_tokens / made.prompt_tokens_per_s,
            "weight_mb_per_token": made.active_bytes / 1e6,
        }
    return found


def report_of(runs: dict[str, list[Run]], bandwidths: list[float]) -> dict[str, Any]:
    """Medians of every run, as a share of the largest of ``bandwidths`` and beside the reference's."""
    bandwidth = max(bandwidths)
    base = {field: _median(runs[REFERENCE], field) for field in ("token_s", "prefill_s")}
    rows = {}
    for name, made in runs.items():
        token_s, prefill_s = _median(made, "token_s"), _median(made, "prefill_s")
        spread = measuring.spread_of([one.token_s * 1e3 for one in made])
        read = _median(made, "weight_bytes")
        rows[name] = {
            "ms_per_token": asdict(spread),
            "prefill_s": prefill_s,
            "mean_depth": _median(made, "mean_depth"),
            "weight_mb_per_token": read / 1e6 if read == read else None,
            "stream_percent": 100 * read / token_s / bandwidth if read == read else None,
            "decode_ratio": base["token_s"] / token_s,
            "prefill_ratio": base["prefill_s"] / prefill_s,
            "noise": measuring.noise(bandwidths, spread),
            "drafts_accepted": None if math.isnan(made[0].accepted) else _median(made, "accepted"),
            "equal_tokens": made[0].ids == runs[REFERENCE][0].ids,
        }
    return {"runs": rows}


def _median(runs: list[Run], field: str) -> float:
    values: list[float] = [getattr(run, field) for run in runs]
    return statistics.median(values)


def show(report: dict[str, Any], bandwidth: float, held: Collection[str]) -> None:
    """Prints the table, and tells what speaks against its figures; runs ``held`` must give the reference's tokens."""
    print(f"stream bandwidth {bandwidth / 1e9:.1f} GB/s")
    print("| run | ms per token | times torch | prefill, s | times torch | mean depth | MB a token | % of stream |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, row in report["runs"].items():
        tail = "| | |"
        if row["stream_percent"] is not None:
            tail = f"| {row['weight_mb_per_token']:.0f} | {row['stream_percent']:.0f} |"
        print(
            f"| {name} | {row['ms_per_token']['median']:.1f} | {row['decode_ratio']:.1f}x | {row['prefill_s']:.2f} "
            f"| {row['prefill_ratio']:.1f}x | {row['mean_depth']:.2f} {tail}"
        )
    for name, row in report["runs"].items():
        if row["noise"] is not None:
            tell(f"{name}: {row['noise']}")
        if name in held and not row["equal_tokens"]:
            tell(f"{name}: other tokens than the reference's: look at validate before trusting its speed")
    for name, row in report.get("llama.cpp", {}).items():
        share = row["weight_mb_per_token"] * 1e6 / (row["ms_per_token"] / 1e3) / bandwidth
        print(
            f"| llama.cpp {name}, as many bytes | {row['ms_per_token']:.1f} | | {row['prefill_s']:.2f} | | "
            f"| {row['weight_mb_per_token']:.0f} | {100 * share:.0f} |"
        )


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
