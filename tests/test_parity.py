"""Every way to run a bundle against the independent reference: goldens, and the PyPI model on random configs.

The standard: within 3x of the reference's own float32 error against float64, and equal depths apart from near ties.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from golden_runs import Run, chunked, model_onnx, model_with_past, runtime_runs

from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.families.table import config_of
from mythos_edge.model.layout import load_network
from mythos_edge.model.network import Scored
from mythos_edge.runtime import parity
from mythos_edge.runtime.session import Session
from mythos_edge.scripts.lab.reference import open_mythos


def test_goldens(golden_bundle: Path, golden: dict[str, np.ndarray], golden_name: str) -> None:
    ids, loops, prefill = golden["ids"], int(golden["n_loops"]), int(golden["prefill"])
    allowed = parity.NOISE_FACTOR * golden["upstream_fp32_error"].max()
    runs: dict[str, Run] = {}
    with Session.open(golden_bundle) as session, open_checkpoint(FIXTURES / golden_name) as checkpoint:
        threshold, positions = config_of(session.bundle.manifest).act_threshold, ids.shape[1]
        eager = load_network(checkpoint)(torch.from_numpy(ids), loops)
        runs["eager"] = (eager.logits.numpy(), eager.depth.numpy())
        runs["model.onnx"] = model_onnx(golden_bundle, ids, loops, threshold)
        assert loops == config_of(session.bundle.manifest).max_loop_iters
        runs["model_with_past.onnx"] = model_with_past(session, ids, [prefill, 1, 1, positions - prefill - 2])
        runs |= dict(runtime_runs(session, ids, loops, [0, 1, 7, prefill, positions]))
        runs |= {f"chunks of {size}": chunked(session, ids, loops, size) for size in (1, 7, positions)}
    for name, (logits, depth) in runs.items():
        assert np.abs(logits - golden["logits"]).max() <= allowed, name
        assert (depth == golden["depth"]).all(), name


BASE: dict[str, Any] = {
    "vocab_size": 61,
    "dim": 40,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_seq_len": 32,
    "max_loop_iters": 4,
    "prelude_layers": 1,
    "coda_layers": 1,
    "attn_type": "mla",
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 7,
    "n_experts": 5,
    "n_shared_experts": 1,
    "n_experts_per_tok": 2,
    "expert_dim": 9,
    "act_threshold": 0.97,
    "rope_theta": 500.0,
    "lora_rank": 3,
}
# What differs from BASE; with the batch and the loop counts to run.
CONFIGS: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    "mla-odd-3-shared": ({"dim": 35, "vocab_size": 67, "n_shared_experts": 3, "expert_dim": 7}, 3, (1, 4, 7)),
    "mla-no-shared-16": ({"n_shared_experts": 0, "max_loop_iters": 16, "prelude_layers": 2}, 2, (1, 4, 16)),
    "gqa-narrow": ({"attn_type": "gqa", "dim": 12, "n_heads": 2, "n_kv_heads": 1, "coda_layers": 2}, 1, (4, 16)),
    "gqa-odd-2-shared": (
        {"attn_type": "gqa", "dim": 36, "n_heads": 6, "n_shared_experts": 2, "n_experts": 3},
        2,
        (1, 6),
    ),
}


def save_random_model(path: Path, changes: dict[str, Any], seed: int) -> Any:
    """A model of the PyPI package with weights large enough to matter, saved the way its trainer does."""
    main = open_mythos()
    torch.manual_seed(seed)
    model = main.OpenMythos(main.MythosConfig(**{**BASE, **changes}))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("embed.weight"):
                value.normal_()
            elif value.ndim == 2:
                value.normal_(std=value.shape[1] ** -0.5)
            elif "norm" in name:
                value.uniform_(0.5, 1.5)
        model.recurrent.injection.log_A.normal_(std=0.5)
        model.recurrent.injection.B.normal_(std=0.3)
        model.recurrent.act.halt.weight.normal_(std=0.4)
        model.recurrent.act.halt.bias.fill_(-1.0)
        model.recurrent.block.ffn.router_bias.normal_()
    saved = {
        "step": 7,
        "model": model.state_dict(),
        "optimizer": {},
        "cfg": model.cfg,
        "vocab_size": BASE["vocab_size"],
    }
    torch.save(saved, path)
    return model


@torch.no_grad()
def reference_runs(model: Any, ids: torch.Tensor, loops: int, prefill: int) -> list[np.ndarray]:
    """The reference in float32: whole, and with its cache."""
    cache: dict[str, Any] = {}
    parts = [model(ids[:, :prefill], n_loops=loops, kv_cache=cache)]
    for position in range(prefill, ids.shape[1]):
        parts.append(model(ids[:, position : position + 1], n_loops=loops, kv_cache=cache, start_pos=position))
    return [model(ids, n_loops=loops).numpy(), torch.cat(parts, dim=1).numpy()]


@pytest.mark.parametrize("name", CONFIGS)
def test_random_configs_against_the_pypi_model(
    name: str, exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    changes, batch, depths = CONFIGS[name]
    checkpoint = tmp_path_factory.mktemp("random") / f"{name}.pt"
    seed = sorted(CONFIGS).index(name)
    model = save_random_model(checkpoint, changes, seed)
    positions = 17
    ids = np.random.default_rng(seed).integers(0, model.cfg.vocab_size, (batch, positions))
    bundle = exported(checkpoint)
    with Session.open(bundle) as session, open_checkpoint(checkpoint) as opened, torch.no_grad():
        double = load_network(opened, dtype=torch.float64)
        for loops in depths:
            with pytest.warns() if loops > config_of(session.bundle.manifest).max_loop_iters else _no_warning():
                truth: Scored = double(torch.from_numpy(ids), loops)
                exact = truth.logits.numpy()
                references = reference_runs(model, torch.from_numpy(ids), loops, 9)
                own_error = max(float(np.abs(logits - exact).max()) for logits in references)
                # The float64 network is ours: the independent reference vouches for it here.
                assert own_error < 1e-3 * np.abs(exact).max()
                allowed = parity.tolerance(own_error, float(np.abs(exact).max()))
                runs = dict(runtime_runs(session, ids, loops, [1, 7, positions]))
                runs["model.onnx"] = model_onnx(bundle, ids, loops, config_of(session.bundle.manifest).act_threshold)
                runs["chunks of 7"] = chunked(session, ids, loops, 7)
                if loops == config_of(session.bundle.manifest).max_loop_iters:
                    runs["model_with_past.onnx"] = model_with_past(session, ids, [9, 1, 7])
                for route, (logits, depth) in runs.items():
                    report = parity.compare(exact, logits, truth.depth.numpy(), depth, truth.margin.numpy())
                    assert parity.passes(report, allowed), (name, loops, route, allowed, report)


class _no_warning:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_narrow_bundles_are_in_parity_with_the_rounded_weights(dtype: str, exported: Callable[..., Path]) -> None:
    checkpoint = FIXTURES / "mla-small"
    bundle = exported(checkpoint, dtype=dtype)
    ids = np.random.default_rng(1).integers(0, 331, (1, 12))
    stored = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    with Session.open(bundle) as session, open_checkpoint(checkpoint) as opened, torch.no_grad():
        double = load_network(opened, stored=stored, dtype=torch.float64)(torch.from_numpy(ids))
        single = load_network(opened, stored=stored)(torch.from_numpy(ids))
        score = session.score(ids, prefill=5)
        assert session.bundle.manifest.targets["ort-cpu"].compute_dtype == "fp32"
        logits, depth = model_onnx(
            bundle,
            ids,
            config_of(session.bundle.manifest).max_loop_iters,
            config_of(session.bundle.manifest).act_threshold,
        )
    golden = np.load(checkpoint / "golden.npz")
    own_error = max(float((single.logits - double.logits).abs().max()), float(golden["upstream_fp32_error"].max()))
    for made in ((score.logits, score.depth), (logits, depth)):
        report = parity.compare(double.logits.numpy(), made[0], double.depth.numpy(), made[1], double.margin.numpy())
        assert parity.passes(report, parity.NOISE_FACTOR * own_error), report
