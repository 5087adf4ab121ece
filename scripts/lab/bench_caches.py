"""Memory, speed and cost in KL of the forms of caches at a long context, side by side in one run.

    python -m mythos_edge.scripts.lab.bench_caches model.bundle --contexts 512,2048
    python -m mythos_edge.scripts.lab.bench_caches ouro-width --inner-layers 2 --contexts 512,4096

Decodes random tokens one by one, at full depth, after a context of random tokens; the forms take turns. The KL
divergence to fp32 is of these tokens. ``ouro-width`` stands for a model of random weights at the width of Ouro-1.4B.
Prints a table, then one line of JSON. Not here: what a cache costs on your text, which ``validate --cache`` tells.
"""

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mythos_edge.exporter.export import export_bundle
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.looped import NARROW_CACHES
from mythos_edge.runtime.quality import kl_divergence
from mythos_edge.runtime.session import Session
from mythos_edge.scripts.doctor import processor
from mythos_edge.scripts.lab.random_checkpoints import OURO_1_4B, write_checkpoint

WIDTH_OF_OURO = "ouro-width"
_FORMS = ("fp32", *NARROW_CACHES)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure caches in fp32, fp16 and int8 beside each other.")
    parser.add_argument("bundle", help=f"a bundle, or {WIDTH_OF_OURO}")
    parser.add_argument("--contexts", default="512,2048", metavar="N,N", help="tokens before those that are timed")
    parser.add_argument("--inner-layers", type=int, default=2, metavar="N", help=f"of {WIDTH_OF_OURO} (default: 2)")
    parser.add_argument("--target", metavar="NAME", help="default: the bundle's first")
    parser.add_argument("-n", "--new-tokens", type=int, default=16, metavar="N", help="tokens that are timed")
    args = parser.parse_args(argv)
    contexts = [int(number) for number in args.contexts.split(",")]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        bundle = _random_bundle(Path(folder), args, max(contexts)) if args.bundle == WIDTH_OF_OURO else args.bundle
        sessions = {form: opened.enter_context(Session.open(bundle, target=args.target, cache=form)) for form in _FORMS}
        rows = [_measured(sessions, context, args.new_tokens) for context in contexts]
    print("| context | cache | MB | ms a token | of fp32 | KL, nats | top-1 the same |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for context, row in zip(contexts, rows, strict=True):
        for form, one in row.items():
            ratio = one["ms_per_token"] / row["fp32"]["ms_per_token"]
            figures = f"{one['cache_mb']:.1f} | {one['ms_per_token']:.1f} | {ratio:.2f} | {one['kl']:.2g}"
            print(f"| {context} | {form} | {figures} | {one['top1']:.1%} |")
    report = {"machine": processor(), **vars(args), "contexts": dict(zip(map(str, contexts), rows, strict=True))}
    print(json.dumps(report))
    return 0


def _random_bundle(folder: Path, args: argparse.Namespace, context: int) -> Path:
    limit = context + args.new_tokens
    shape = replace(OURO_1_4B, num_hidden_layers=args.inner_layers, vocab_size=4096, max_position_embeddings=limit)
    write_checkpoint(shape, folder / "checkpoint", "fp32")
    with open_checkpoint(folder / "checkpoint") as checkpoint:
        export_bundle(checkpoint, folder / "bundle")
    return folder / "bundle"


def _measured(sessions: dict[str, Session], context: int, count: int) -> dict[str, dict[str, Any]]:
    """The figures of each form; tokens are timed in turns, so that the machine's moods are everybody's."""
    model = next(iter(sessions.values())).model
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (1, context + count))
    for session in sessions.values():
        session.generate(ids[0, :context].tolist(), max_new_tokens=1, policy="full", stop_ids=())
        session.rollback(context)
    stairs = {form: session._sequences[0].staircase for form, session in sessions.items()}
    for staircase in stairs.values():
        staircase.rollback(context)
    times: dict[str, list[float]] = {form: [] for form in sessions}
    logits: dict[str, list[Any]] = {form: [] for form in sessions}
    for at in range(context, context + count):
        for form, staircase in stairs.items():
            started = time.perf_counter()
            fed = staircase.feed(ids[:, at : at + 1], np.zeros(1, np.int64))
            times[form].append(time.perf_counter() - started)
            logits[form].append(fed.logits[0, 0])
    wanted = np.array(logits["fp32"])
    return {
        form: {
            "cache_mb": session.plan(context).cache_bytes / 1e6,
            "ms_per_token": median(times[form]) * 1e3,
            "kl": float(kl_divergence(wanted, np.array(logits[form])).mean()),
            "top1": float((wanted.argmax(-1) == np.array(logits[form]).argmax(-1)).mean()),
        }
        for form, session in sessions.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
