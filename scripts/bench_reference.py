"""Decode speed against the reference: the PyPI model's own ``generate()`` with its cache, at equal output.

    python -m mythos_edge.scripts.bench_reference --shape 1b --experts 8

Both run the same random weights in float32 and produce the same tokens, greedily, interleaved in one process. The
halting threshold is set so that the generated tokens take a quarter of the loop steps on average; the reference runs
every step whatever its head says, because it has a cache. Prints a table, then one line of JSON. Needs the dev extra.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mythos_edge.exporter.export import export_bundle
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.config import VARIANTS, MythosConfig
from mythos_edge.model.shapes import expected_shapes
from mythos_edge.runtime.session import Generation, Session
from mythos_edge.scripts.doctor import processor
from mythos_edge.scripts.reference import open_mythos

_D1024 = replace(
    VARIANTS["1b"],
    dim=1024,
    n_heads=8,
    kv_lora_rank=128,
    q_lora_rank=256,
    n_experts=32,
    expert_dim=1024,
)
SHAPES = {"1b": VARIANTS["1b"], "d1024": _D1024}
# Halting logits with some spread between positions, so that depths differ as they do in a trained model.
_HALT_BIAS, _HALT_SPREAD = -1.5, 0.5


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure decode speed against the reference.")
    parser.add_argument("--shape", choices=SHAPES, default="d1024")
    parser.add_argument("--experts", type=int, help="experts of the recurrent block (default: the shape's)")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=512)
    parser.add_argument("-n", "--new-tokens", type=int, default=32)
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    args = parser.parse_args(argv)
    config = replace(SHAPES[args.shape], max_seq_len=4096)
    config = replace(config, n_experts=args.experts or config.n_experts)
    model = reference_model(config, seed=0)
    prompt = torch.randint(0, config.vocab_size, (1, args.prompt_tokens))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = Path(folder) / "model.pt", Path(folder) / "model.bundle"
        torch.save({"model": model.state_dict(), "cfg": model.cfg}, checkpoint)
        with open_checkpoint(checkpoint) as opened:
            export_bundle(opened, bundle)
        checkpoint.unlink()
        with Session.open(bundle) as session:
            threshold = _threshold_of_mean_depth(session, prompt[0].tolist(), args.new_tokens)
            model.cfg.act_threshold = threshold
            report = _measure(args, model, session, prompt, threshold)
    report = {
        "shape": args.shape,
        "experts": config.n_experts,
        "machine": f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        **vars(args),
        **report,
    }
    print(json.dumps(report))
    return 0


def _threshold_of_mean_depth(session: Session, ids: list[int], count: int) -> float:
    """The threshold at which ``count`` generated tokens take a quarter of the loop steps on average, more or less."""
    low, high = 0.0, session.config.act_threshold
    wanted = session.config.max_loop_iters / 4
    for _ in range(8):
        middle = (low + high) / 2
        depth = statistics.fmean(session.generate(ids, max_new_tokens=count, threshold=middle).depths)
        low, high = (middle, high) if depth < wanted else (low, middle)
    return high


def _measure(
    args: argparse.Namespace, model: Any, session: Session, prompt: torch.Tensor, threshold: float
) -> dict[str, Any]:
    ids = prompt[0].tolist()
    loops = session.config.max_loop_iters
    seconds: dict[str, list[float]] = {"reference": [], "exact": [], "full": []}
    equal = True
    for repetition in range(args.repetitions):
        made: dict[str, Generation] = {}
        for policy in ("exact", "full"):
            made[policy] = session.generate(ids, policy=policy, max_new_tokens=args.new_tokens, threshold=threshold)
            rate = made[policy].decode_tokens_per_s
            assert rate is not None
            seconds[policy].append(1 / rate)
        tokens, per_token = _timed_reference(model, prompt, args.new_tokens, loops)
        seconds["reference"].append(per_token)
        equal = equal and all(one.ids == tokens for one in made.values())
        print(f"repetition {repetition + 1}: same tokens {equal}", file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    depths = made["exact"].depths
    depth = statistics.fmean(depths)
    fixed_bytes, step_bytes = weight_bytes(session.config)
    bandwidth = stream_bandwidth()
    # No run in float32 can be faster than reading once what this depth needs.
    bound = (fixed_bytes + depth * step_bytes) / bandwidth
    print(f"mean depth {depth:.2f} of {loops} loop steps, tokens equal: {equal}")
    print(
        f"weights per token: {fixed_bytes / 1e6:.0f} MB + {step_bytes / 1e6:.0f} MB a loop step; stream bandwidth "
        f"{bandwidth / 1e9:.1f} GB/s: at least {bound * 1e3:.1f} ms, at most {medians['reference'] / bound:.1f}x"
    )
    print(f"| {'run':12} | {'ms per token':>12} | {'tokens/s':>9} | {'times the reference':>19} |")
    print(f"|{'-' * 14}|{'-' * 13}:|{'-' * 10}:|{'-' * 20}:|")
    for name, value in medians.items():
        ratio = medians["reference"] / value
        print(f"| {name:12} | {value * 1e3:12.1f} | {1 / value:9.2f} | {ratio:18.1f}x |")
    return {
        "equal_tokens": equal,
        "threshold": threshold,
        "mean_depth": depth,
        "depths": depths,
        "ms_per_token": {name: value * 1e3 for name, value in medians.items()},
        "spread_ms": {name: [min(values) * 1e3, max(values) * 1e3] for name, values in seconds.items()},
        "weight_bytes": [fixed_bytes, step_bytes],
        "stream_bytes_per_s": bandwidth,
        "bound_ms": bound * 1e3,
        "ratio_exact": medians["reference"] / medians["exact"],
        "ratio_full": medians["reference"] / medians["full"],
    }


def _timed_reference(model: Any, prompt: torch.Tensor, count: int, loops: int) -> tuple[list[int], float]:
    """The tokens of the reference's ``generate`` and its seconds per token after the first, prefill left out."""
    ends: list[float] = []
    # generate() calls forward() itself, which runs no hooks of the model; the head runs once a token, and last.
    hook = model.head.register_forward_hook(lambda *_: ends.append(time.perf_counter()))
    try:
        # top_k 1 makes its sampling greedy.
        tokens = model.generate(prompt, max_new_tokens=count, n_loops=loops, temperature=1.0, top_k=1)
    finally:
        hook.remove()
    return tokens[0, prompt.shape[1] :].tolist(), (ends[-1] - ends[0]) / (len(ends) - 1)


def weight_bytes(config: MythosConfig) -> tuple[int, int]:
    """Float32 bytes of the weights one token reads: once, and again at each loop step (chosen experts only)."""
    fixed = step = 0.0
    for name, shape in expected_shapes(config).items():
        size = 4.0 * math.prod(shape)
        if ".routed_experts." in name:
            step += size * config.n_experts_per_tok / config.n_experts
        elif name.startswith("recurrent."):
            step += size
        else:
            fixed += size  # the embedding is read whole, as the head
    return round(fixed), round(step)


def stream_bandwidth() -> float:
    """Bytes per second of reading memory with all threads, the best of several."""
    data = torch.ones(1 << 27)
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - started)
    return data.nbytes / min(seconds)


if __name__ == "__main__":
    sys.exit(main())
