"""The figures of a server for Prometheus."""

from mythos_edge.runtime.serving.engine import Engine


def prometheus(running: Engine) -> str:
    """The engine's figures as Prometheus reads them."""
    active, waiting = running.load
    figures: list[tuple[str, str, str, dict[str, int]]] = [
        ("requests_total", "counter", "requests by how they ended",
         {f'{{how="{how}"}}': running.counts[how] for how in ("done", "failed", "cancelled")}),
        ("stage_runs_total", "counter", "runs of a stage, shared ones once",
         {f'{{stage="{stage}"}}': runs for stage, runs in sorted(running.runs.items())}),
        ("depth_tokens_total", "counter", "generated tokens by their depth",
         {f'{{depth="{depth}"}}': tokens for depth, tokens in sorted(running.depths.items())}),
        ("requests_running", "gauge", "requests in slots", {"": active}),
        ("requests_waiting", "gauge", "requests in the queue", {"": waiting}),
        ("prompt_cache_bytes", "gauge", "bytes of kept sequences", {"": running.cache.nbytes}),
        ("prompt_cache_entries", "gauge", "kept sequences", {"": len(running.cache)}),
    ]  # fmt: skip
    for name in (
        "prompt_tokens",
        "cached_tokens",
        "generated_tokens",
        "block_calls",
        "drafted_tokens",
        "accepted_tokens",
    ):
        figures.append((f"{name}_total", "counter", name.replace("_", " "), {"": running.counts[name]}))
    lines = []
    for name, kind, text, values in figures:
        lines += [f"# HELP mythos_edge_{name} {text}", f"# TYPE mythos_edge_{name} {kind}"]
        lines += [f"mythos_edge_{name}{labels} {value}" for labels, value in values.items()]
    return "\n".join(lines) + "\n"
