"""Long runs: random schedules of everything a session does, until so many tokens came, and a server beside leavers.

    python -m mythos_edge.scripts.lab.long_run -n 20000
    python -m mythos_edge.scripts.lab.long_run -n 0 --server 2000

For each family it exports a tiny model of random weights and runs a schedule (``schedules``) on it, with each form of
cache. At random points
every cached row, the logits and the depths are held against a session that is opened for the same tokens. Memory must
stay flat from the first tenth on, and what Python holds is traced in the last; the pace of a fixed request is told,
first quarter against last, and never judged, as other programs run, too. Prints a table, then one line of JSON; the
exit code says whether all held.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mythos_edge.model.families.family import Config
from mythos_edge.model.machine import cores
from mythos_edge.runtime.session import Session
from mythos_edge.scripts.doctor import processor
from mythos_edge.scripts.lab.leavers import run_server
from mythos_edge.scripts.lab.schedules import ALLOWED, ALLOWED_TIPPED, ANSWER, Found, Schedule
from mythos_edge.scripts.measuring import resident_bytes

_CONTEXT = 768
# Between two measurements of pace.
_TOKENS_A_MARK = 100
# Of the tokens: before memory is first looked at, and with memory traced, which takes time.
_WARM_SHARE, _TRACED_SHARE = 0.1, 0.1
_CHECK_SHARE = 0.15
# The request whose pace is measured.
_PACE_PROMPT, _PACE_TOKENS = 16, 24
# Allowed growth of memory after the first tenth: tables of the interpreter double at times, and one small object keeps
# a whole page.
_RSS_FACTOR, _RSS_BYTES, _TRACED_BYTES = 1.1, 16 << 20, 2 << 20
_MEGA = 1e6


@dataclass(frozen=True)
class Run:
    """The figures of one family with one form of cache.

    Bytes are those after the first tenth and at the ninth, the pace is seconds a token of a fixed request.
    """

    family: str
    cache: str
    found: Found
    rss_bytes: tuple[int, int]
    traced_growth: int
    top_growth: list[str]
    pace_s: tuple[float, float]
    seconds: float

    @property
    def is_flat(self) -> bool:
        """Whether memory did not grow."""
        before, after = self.rss_bytes
        return after <= before * _RSS_FACTOR + _RSS_BYTES and self.traced_growth <= _TRACED_BYTES

    @property
    def held(self) -> bool:
        """Whether memory is flat, and everything was as it would be anew."""
        found = self.found
        return self.is_flat and not found.wrong and found.tipped <= ALLOWED_TIPPED * found.compared_depths


def tiny_configs() -> dict[str, Config]:
    """Tiny models of the families: with latent caches and halting, with a gate, and with windows."""
    from mythos_edge.model.families.openmythos.config import VARIANTS
    from mythos_edge.scripts.lab.random_checkpoints import DORY_4B, OURO_1_4B

    small: dict[str, Any] = {"vocab_size": 97, "max_position_embeddings": _CONTEXT, "hidden_size": 64}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return {
        "mla": replace(
            VARIANTS["1b"], vocab_size=97, dim=64, n_heads=4, max_seq_len=_CONTEXT, max_loop_iters=5, kv_lora_rank=24,
            q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_experts=8, n_experts_per_tok=2,
            expert_dim=32, prelude_layers=1, coda_layers=1,
        ),
        "ouro": replace(OURO_1_4B, **small, **heads, intermediate_size=96, num_hidden_layers=3),
        "dory": replace(
            DORY_4B, **small, **heads, intermediate_size=96, layer_types=DORY_4B.layer_types[:6], sliding_window=8,
            n_input_layers=1, n_recurrent_layers=4, n_output_layers=1,
        ),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the schedules and the server; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run random schedules for long, and look at caches, memory and pace.")
    parser.add_argument("-n", "--tokens", type=int, default=20_000, help="tokens to generate, shared by the families")
    parser.add_argument("--family", choices=("mla", "ouro", "dory"), action="append", help="this one alone; repeatable")
    parser.add_argument("--cache", choices=list(ALLOWED), action="append", help="this form alone; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server", type=int, default=0, metavar="N", help="requests to a server, leavers beside them")
    args = parser.parse_args(argv)
    families = args.family or ["mla", "ouro", "dory"]
    kinds = list(product(families, args.cache or ALLOWED))
    with tempfile.TemporaryDirectory() as name:
        # In a process of its own, whose memory is not that of what runs.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            bundles = {one: pool.submit(export_tiny, one, Path(name)).result() for one in families}
        share = args.tokens // len(kinds)
        runs = [run_family(one, bundles[one], share, args.seed, cache=cache) for one, cache in kinds if share]
        print(table(runs), flush=True)
        served = run_server(bundles[families[0]], args.server, args.seed) if args.server else None
    if served is not None:
        print(served.line())
    figures = {"machine": f"{processor()}, {cores()} cores", "runs": [asdict(one) for one in runs]}
    print(json.dumps(figures | {"server": None if served is None else asdict(served)}))
    return 0 if all(one.held for one in runs) and (served is None or served.held) else 1


def export_tiny(family: str, folder: Path) -> Path:
    """The bundle of a tiny model of random weights."""
    from mythos_edge.exporter.export import export_bundle
    from mythos_edge.model.checkpoint import open_checkpoint
    from mythos_edge.scripts.lab.random_checkpoints import write_checkpoint

    write_checkpoint(tiny_configs()[family], folder / family)
    with open_checkpoint(folder / family) as checkpoint:
        return export_bundle(checkpoint, folder / f"{family}.bundle").path


def run_family(
    family: str,
    bundle: Path,
    tokens: int,
    seed: int,
    check_share: float = _CHECK_SHARE,
    answer: int = ANSWER,
    cache: str = "fp32",
) -> Run:
    """Runs a schedule until ``tokens`` were generated, and looks at memory and pace on the way."""
    random, started = np.random.default_rng(seed), time.perf_counter()

    def opened() -> Session:
        return Session.open(bundle, threads=1, cache=cache)

    with tempfile.TemporaryDirectory() as name, opened() as steady:
        schedule = Schedule(opened, Path(name), random, answer)
        paces: list[float] = []

        def run_until(count: float, measured: bool = True) -> None:
            while schedule.found.tokens < count:
                schedule.act()
                if random.random() < check_share:
                    schedule.check()
                if measured and schedule.found.tokens >= len(paces) * _TOKENS_A_MARK:
                    paces.append(_pace_s(steady))

        run_until(tokens * _WARM_SHARE)
        before = _resident(schedule)
        run_until(tokens * (1 - _TRACED_SHARE))
        after = _resident(schedule)
        growth = _traced(schedule, lambda: run_until(tokens, measured=False))
        schedule.close()
    quarter = max(1, len(paces) // 4)
    return Run(
        family=family,
        cache=cache,
        found=schedule.found,
        rss_bytes=(before, after),
        traced_growth=sum(one.size_diff for one in growth),
        top_growth=[_growth(one) for one in growth[:5]],
        pace_s=(statistics.median(paces[:quarter]), statistics.median(paces[-quarter:])),
        seconds=time.perf_counter() - started,
    )


def table(runs: list[Run]) -> str:
    """The figures as a table to paste, and a line on each thing that is wrong."""
    lines = [
        "| model | cache | tokens | checks | tipped | logits off | rows off | RSS MB | traced | pace, last to first |"
    ]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for one in runs:
        found, (before, after), (first, last) = one.found, one.rss_bytes, one.pace_s
        ratio = f"{last / first:.2f}" if first else "-"
        lines.append(
            f"| {one.family} | {one.cache} | {found.tokens:,} | {found.checks} | "
            f"{found.tipped} of {found.compared_depths:,} | {found.worst_logit:.1e} | {found.worst_row:.1e} | "
            f"{before / _MEGA:.0f} to {after / _MEGA:.0f} | {one.traced_growth / 1e3:+.0f} kB | {ratio} |"
        )
    lines += [f"wrong: {one.family}, {one.cache}: {what}" for one in runs for what in one.found.wrong[:20]]
    lines += [f"memory grew: {one.family}, {one.cache}: {'; '.join(one.top_growth)}" for one in runs if not one.is_flat]
    allowed = ", ".join(f"{share:.1g} in {cache}" for cache, share in ALLOWED.items())
    lines.append(f"(of the largest is allowed: {allowed}; of narrow caches' depths {ALLOWED_TIPPED:.0%} may be tipped)")
    return "\n".join(lines)


def _growth(one: tracemalloc.StatisticDiff) -> str:
    place = one.traceback[0]
    return f"{'/'.join(Path(place.filename).parts[-2:])}:{place.lineno} {one.size_diff:+}"


def _pace_s(session: Session) -> float:
    """Seconds a token of the fixed request."""
    started = time.perf_counter()
    made = session.generate([*range(1, _PACE_PROMPT + 1)], max_new_tokens=_PACE_TOKENS, stop_ids=[], policy="full")
    return (time.perf_counter() - started) / len(made.ids)


def _resident(schedule: Schedule) -> int:
    """Resident bytes of this process with one short sequence in another session, but for free pages of malloc.

    ONNX Runtime's arena keeps the most that its session ever needed at once. What piles up in a session is traced.
    """
    schedule.reopen()
    schedule.rest()
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
    return resident_bytes()


def _traced(schedule: Schedule, run: Callable[[], None]) -> list[tracemalloc.StatisticDiff]:
    """The growth, by line, of what Python holds while ``run`` runs."""
    mine = (tracemalloc.Filter(False, tracemalloc.__file__), tracemalloc.Filter(False, __file__))
    tracemalloc.start()
    try:
        schedule.rest()
        gc.collect()
        before = tracemalloc.take_snapshot().filter_traces(mine)
        run()
        schedule.rest()
        gc.collect()
        return tracemalloc.take_snapshot().filter_traces(mine).compare_to(before, "lineno")
    finally:
        tracemalloc.stop()


if __name__ == "__main__":
    sys.exit(main())
