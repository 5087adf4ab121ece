"""Runs ``validate --level deep`` on healthy models of random shapes, on fp32, int8 and int4: nothing may be named.

    python -m mythos_edge.scripts.lab.deep_health --configs 50 --seed 0

The last line is JSON: how many were compared, and every false alarm with the seed that makes it again.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mythos_edge.exporter.export import export_bundle
from mythos_edge.exporter.targets.build import build
from mythos_edge.exporter.targets.ort_cpu import OrtCpuTarget
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import BuildError
from mythos_edge.model.families.dory.config import FULL, SLIDING
from mythos_edge.model.families.family import Config
from mythos_edge.model.families.openmythos.config import VARIANTS
from mythos_edge.runtime.backends.opening import open_backend
from mythos_edge.scripts.deep_check import Deep
from mythos_edge.scripts.lab.random_checkpoints import DORY_4B, NANBEIGE_3B, OURO_1_4B, write_checkpoint

_POSITIONS = 14
_FORMS = ("fp32", "int8", "int4")


def random_config(random: np.random.Generator) -> Config:
    """A small model of any family."""
    return (_openmythos, _openmythos, _llama, _dory)[int(random.integers(4))](random)


def _of(random: np.random.Generator, *choices: Any) -> Any:
    return choices[int(random.integers(len(choices)))]


def _openmythos(random: np.random.Generator) -> Config:
    experts = _of(random, 4, 8)
    heads = _of(random, 2, 4)
    return dataclasses.replace(
        VARIANTS["1b"],
        attn_type=_of(random, "mla", "gqa"),
        vocab_size=int(random.integers(50, 400)),
        dim=_of(random, 64, 96, 128),
        n_heads=heads,
        n_kv_heads=_of(random, 1, heads),
        max_loop_iters=int(random.integers(2, 6)),
        prelude_layers=_of(random, 1, 2),
        coda_layers=_of(random, 1, 2),
        kv_lora_rank=32,
        q_lora_rank=_of(random, 24, 48),
        qk_rope_head_dim=8,
        qk_nope_head_dim=_of(random, 16, 24),
        v_head_dim=_of(random, 16, 24),
        n_experts=experts,
        n_shared_experts=1,
        n_experts_per_tok=_of(random, 1, 2),
        expert_dim=_of(random, 32, 64),
        lora_rank=_of(random, 2, 4),
        max_seq_len=64,
    )


def _llama(random: np.random.Generator) -> Config:
    heads = _of(random, 2, 4)
    common = {
        "vocab_size": int(random.integers(50, 400)),
        "hidden_size": _of(random, 64, 96),
        "intermediate_size": _of(random, 96, 128),
        "num_hidden_layers": int(random.integers(1, 4)),
        "num_attention_heads": heads,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    if random.integers(2):
        steps = {"total_ut_steps": int(random.integers(2, 5)), "num_key_value_heads": heads}
        return dataclasses.replace(OURO_1_4B, **common, **steps)
    return dataclasses.replace(NANBEIGE_3B, **common, num_key_value_heads=_of(random, 1, heads))


def _dory(random: np.random.Generator) -> Config:
    layers = int(random.integers(1, 3))
    return dataclasses.replace(
        DORY_4B,
        vocab_size=int(random.integers(50, 400)),
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=_of(random, 1, 2),
        head_dim=16,
        max_position_embeddings=64,
        layer_types=(SLIDING, FULL) * (layers + 2),
        sliding_window=8,
        n_input_layers=2,
        n_recurrent_layers=2 * layers,
        n_output_layers=2,
        n_recurrent_loops=2,
    )


def alarms(seed: int, folder: Path, forms: tuple[str, ...] = _FORMS) -> Iterator[tuple[str, Any]]:
    """The first divergence that is named for each form of the random model of ``seed``; None where none is."""
    random = np.random.default_rng(seed)
    config = random_config(random)
    write_checkpoint(config, folder / "checkpoint", seed=seed)
    with open_checkpoint(folder / "checkpoint") as checkpoint:
        export_bundle(checkpoint, folder / "model.bundle")
        ids = random.integers(0, config.looped.vocab_size, _POSITIONS)
        for form in forms:
            bundle = open_bundle(folder / "model.bundle")
            if form != "fp32":
                try:
                    bundle = build(bundle, OrtCpuTarget(form)).bundle
                except BuildError:
                    continue  # blocks that the shape does not divide into, which it says
            target = bundle.manifest.default_target if form == "fp32" else f"ort-cpu-{form}"
            backend = open_backend(bundle, target)
            try:
                yield form, Deep(bundle, target, backend, checkpoint, seed).report(ids).first_divergence
            finally:
                backend.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=int, default=50, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first one's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts = dict.fromkeys(_FORMS, 0)
    found = []
    for seed in range(args.seed, args.seed + args.configs):
        with tempfile.TemporaryDirectory() as folder:
            for form, divergence in alarms(seed, Path(folder)):
                counts[form] += 1
                if divergence is not None:
                    found.append({"seed": seed, "form": form, **divergence.to_dict()})
                    print(found[-1], flush=True)
        print(f"{seed}: {counts}", flush=True)
    print(json.dumps({"compared": counts, "false_alarms": found}))


if __name__ == "__main__":
    main()
