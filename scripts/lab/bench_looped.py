"""Speed of Ouro, Nanbeige and Dory at their published widths beside transformers eager, and of drafts.

    python -m mythos_edge.scripts.lab.bench_looped --shape ouro -p 64 -n 24 -r 2
    python -m mythos_edge.scripts.lab.bench_looped --shape dory --weights int8 --draft-depths 1,2,3
    python -m mythos_edge.scripts.lab.bench_looped --shape ouro --weights int8,int4 --draft-depths '' --llama

Models of random weights with few inner layers, see ``SHAPES``. All decode greedily after the same prompt. The reference
is the layers of transformers in PyTorch eager, in float32, with a cache for each loop step and layer. It always takes
every loop step. Float32 runs at full depth must give its tokens. Where there is a gate, the halting threshold is set
for each target so that generated tokens take ``--depth`` loop steps on average. Drafts run on the last target.
With ``--llama``, after all others, llama.cpp runs a Llama without loops that reads the same bytes of weights a token:
its layers are the inner layers of all loop steps, each with weights of its own.
Prints tables, then one line of JSON. Needs the dev extra, for --llama also llama-cpp-python and gguf.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mythos_edge.exporter.export import export_bundle
from mythos_edge.exporter.targets.build import build
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.families.dory.config import DoryConfig
from mythos_edge.model.families.looped_llama.config import StackConfig
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import measuring
from mythos_edge.scripts.bench import threshold_of_mean_depth
from mythos_edge.scripts.doctor import processor
from mythos_edge.scripts.lab.bench_peers import (
    REFERENCE,
    Run,
    Runner,
    generation,
    interleaved,
    llama_runs,
    report_of,
    show,
    target_of,
    tell,
)
from mythos_edge.scripts.lab.llama_files import Network
from mythos_edge.scripts.lab.peer_llama import dense_peer
from mythos_edge.scripts.lab.random_checkpoints import DORY_4B, NANBEIGE_3B, OURO_1_4B, write_checkpoint

_CONTEXT = 1024
SHAPES: dict[str, StackConfig | DoryConfig] = {
    "ouro": replace(OURO_1_4B, num_hidden_layers=6, max_position_embeddings=_CONTEXT),
    "nanbeige": replace(NANBEIGE_3B, num_hidden_layers=4, max_position_embeddings=_CONTEXT),
    "dory": replace(
        DORY_4B,
        layer_types=DORY_4B.layer_types[:8],
        n_input_layers=2,
        n_recurrent_layers=4,
        n_output_layers=2,
        n_recurrent_loops=4,
        max_position_embeddings=_CONTEXT,
    ),
}
# Takes ids (1, S) and the cache, None at first; gives logits (V) of the last position and the cache.
Reference = Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]


def main(argv: list[str] | None = None) -> int:
    args = _parsed(argv)
    config = SHAPES[args.shape]
    bandwidths = [measuring.stream_bandwidth(torch.get_num_threads())]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, ExitStack() as opened, torch.inference_mode():
        bundle = _bundle(config, Path(folder), args.weights)
        reference = reference_of(config, Path(folder) / "checkpoint")
        prompt = torch.randint(0, config.vocab_size, (1, args.prompt_tokens)).tolist()[0]
        runners: dict[str, Runner] = {REFERENCE: partial(_reference, reference, config, prompt, args.new_tokens)}
        for weights in args.weights:
            session = opened.enter_context(Session.open(bundle, target=target_of(weights).name))
            runners |= _ours(session, weights, prompt, args)
        for depth in args.draft_depths:
            run = partial(generation, session, target_of(weights).name, prompt, args.new_tokens)
            runners[_drafting(weights, depth)] = partial(run, draft_depth=depth, draft_tokens=args.draft_tokens)
        runs = interleaved(runners, args.repetitions)
        llama = llama_runs(_peers(config, args), Path(folder), args) if args.llama else {}
        bandwidths.append(measuring.stream_bandwidth(torch.get_num_threads()))
    report = report_of(runs, bandwidths) | {
        "llama.cpp": llama,
        "machine": f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "config": config.to_dict(),
        **{name: value for name, value in vars(args).items() if name != "folder"},
        "stream_gb_per_s": [bandwidth / 1e9 for bandwidth in bandwidths],
    }
    show(report, max(bandwidths), [_at_full_depth("fp32")])
    _show_drafts(report)
    print(json.dumps(report))
    return 0


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure speed of looped families beside transformers eager.")
    parser.add_argument("--shape", choices=SHAPES, default="ouro")
    parser.add_argument("--weights", default="fp32,int8,int4", help="targets to build and run")
    parser.add_argument("--depth", type=float, default=2.0, help="mean loop steps, where a gate halts (default: 2)")
    parser.add_argument("--draft-depths", metavar="NUMBERS", help="loop steps of drafts, '' for none (default: 1,2)")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("-p", "--prompt-tokens", type=int, default=64)
    parser.add_argument("-n", "--new-tokens", type=int, default=24)
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--llama", action="store_true", help="run llama.cpp, too")
    parser.add_argument("--folder", type=Path, help="where to write checkpoint and bundle (default: temporary)")
    args = parser.parse_args(argv)
    args.weights = args.weights.split(",")
    for weights in args.weights:
        target_of(weights)
    most = SHAPES[args.shape].looped.max_depth - 1
    known = {str(depth): depth for depth in range(1, most + 1)}
    asked = list(known)[:2] if args.draft_depths is None else list(filter(None, args.draft_depths.split(",")))
    if not set(asked) <= set(known):
        parser.error(f"--draft-depths is {args.draft_depths!r}, expected numbers of 1 to {most}, separated by commas")
    args.draft_depths = [known[depth] for depth in asked]
    if args.llama and not isinstance(SHAPES[args.shape], StackConfig):
        parser.error(f"--llama is for looped Llamas, --shape is {args.shape}")
    if args.new_tokens < 2 or args.prompt_tokens + args.new_tokens > _CONTEXT:
        parser.error(f"-n is {args.new_tokens}, expected 2 or more, and at most {_CONTEXT} with the prompt")
    return args


def _bundle(config: Any, folder: Path, weights: list[str]) -> Path:
    """A bundle of random weights with every target asked for, beside its checkpoint."""
    checkpoint, bundle = folder / "checkpoint", folder / "model.bundle"
    tell("writing a checkpoint")
    write_checkpoint(config, checkpoint, "bf16")
    tell("exporting")
    with open_checkpoint(checkpoint) as opened:
        export_bundle(opened, bundle, dtype="fp32" if "fp32" in weights else "bf16")
    for one in weights:
        tell(f"building {one}")
        build(bundle, target_of(one))
    return bundle


def _ours(session: Session, weights: str, prompt: list[int], args: argparse.Namespace) -> dict[str, Runner]:
    """This runtime at full depth, and at the mean depth asked for where a gate halts."""
    run = partial(generation, session, target_of(weights).name, prompt, args.new_tokens)
    runners: dict[str, Runner] = {_at_full_depth(weights): run}
    if session.model.halts:
        tell(f"looking for the threshold of {weights}")
        threshold = threshold_of_mean_depth(session, prompt, args.new_tokens, args.depth)
        runners[f"{weights}, mean depth {args.depth:g}"] = partial(run, threshold=threshold)
    return runners


def _peers(config: Any, args: argparse.Namespace) -> dict[str, tuple[Network, str]]:
    """The networks of llama.cpp with the same bytes of weights a token, at full depth and the mean depth asked for."""
    depths = {"full depth": config.max_depth, f"mean depth {args.depth:g}": args.depth}
    rounded = [weights for weights in args.weights if weights in ("int8", "int4")]
    return {
        f"{weights}, {name}": (dense_peer(config, depth), weights)
        for weights in rounded
        for name, depth in depths.items()
    }


def _at_full_depth(weights: str) -> str:
    return f"{weights}, full depth"


def _drafting(weights: str, depth: int) -> str:
    return f"{weights}, full depth, drafts at depth {depth}"


def reference_of(config: StackConfig | DoryConfig, folder: Path) -> Reference:
    """The network of transformers with the weights in ``folder``, in float32."""
    from transformers import DoryConfig as TheirDory
    from transformers import DoryForCausalLM

    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    if isinstance(config, StackConfig):
        return _looped_llama(config, weights)
    theirs = config.to_dict()
    del theirs["n_recurrent_layers"]
    model = DoryForCausalLM(TheirDory(**theirs, num_hidden_layers=len(config.layer_types))).eval()
    model.load_state_dict(weights, assign=True)

    def logits(ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        made = model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
        return made.logits[0, -1], made.cache

    return logits


def _looped_llama(config: StackConfig, weights: dict[str, torch.Tensor]) -> Reference:
    """The layers of transformers' Llama in a loop; keys and values of each loop step are layers of its cache."""
    from transformers import DynamicCache, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

    names = [name for name in config.to_dict() if name in LlamaConfig().to_dict()]
    theirs = LlamaConfig(**{name: config.to_dict()[name] for name in names}, attn_implementation="sdpa")
    theirs.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_theta}
    rotary, layers = LlamaRotaryEmbedding(theirs), []
    post_norms = ("input_layernorm_2", "post_attention_layernorm_2") if config.post_norms else ()
    for index in range(config.num_hidden_layers):
        with torch.device("meta"):
            layer = LlamaDecoderLayer(theirs, index).eval()
            for name in post_norms:
                layer.add_module(name, LlamaRMSNorm(config.hidden_size, config.rms_norm_eps))
        prefix = f"model.layers.{index}."
        found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        layer.load_state_dict(found, assign=True)
        layers.append(layer)
    # Only to be called: the weight is assigned.
    norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.load_state_dict({"weight": weights["model.norm.weight"]}, assign=True)

    def logits(ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        cache = DynamicCache() if cache is None else cache
        seen = cache.get_seq_length()
        h = weights["model.embed_tokens.weight"][ids]
        angles = rotary(h, torch.arange(seen, seen + ids.shape[1])[None])
        for step in range(config.max_depth):
            for index, layer in enumerate(layers):
                layer.self_attn.layer_idx = step * len(layers) + index
                h = _layer(layer, h, angles, cache, config.post_norms)
            if config.norm_in_step or step == config.max_depth - 1:
                h = norm(h)
        return torch.nn.functional.linear(h[0, -1], weights["lm_head.weight"]), cache

    return logits


def _layer(layer: Any, h: torch.Tensor, angles: Any, cache: Any, post_norms: bool) -> torch.Tensor:
    """One layer. Source: ByteDance/Ouro-1.4B, ``modeling_ouro.py`` ``OuroDecoderLayer``; Llama's without post-norms."""
    made, _ = layer.self_attn(layer.input_layernorm(h), position_embeddings=angles, cache=cache)
    h = h + (layer.input_layernorm_2(made) if post_norms else made)
    made = layer.mlp(layer.post_attention_layernorm(h))
    out: torch.Tensor = h + (layer.post_attention_layernorm_2(made) if post_norms else made)
    return out


def _reference(reference: Reference, config: Any, prompt: list[int], count: int) -> Run:
    """One greedy generation of the reference."""
    ids, cache, made, ends = torch.tensor([prompt]), None, [], [time.perf_counter()]
    for _ in range(count):
        logits, cache = reference(ids, cache)
        made.append(int(logits.argmax()))
        ids = torch.tensor([[made[-1]]])
        ends.append(time.perf_counter())
    seconds = (ends[-1] - ends[1]) / (count - 1)
    return Run(made, ends[1] - ends[0], seconds, config.looped.max_depth, float("nan"))


def _show_drafts(report: dict[str, Any]) -> None:
    """Prints how many drafted tokens stood verification, and what drafting brought."""
    if not report["draft_depths"]:
        return
    weights, rows = report["weights"][-1], report["runs"]
    without = rows[_at_full_depth(weights)]
    print(f"| {report['draft_tokens']} tokens drafted at depth | accepted | ms per token | times without drafts |")
    print("|---:|---:|---:|---:|")
    for depth in report["draft_depths"]:
        row = rows[_drafting(weights, depth)]
        median, ratio = row["ms_per_token"]["median"], row["decode_ratio"] / without["decode_ratio"]
        print(f"| {depth} | {row['drafts_accepted']:.0%} | {median:.1f} | {ratio:.2f}x |")


if __name__ == "__main__":
    sys.exit(main())
