"""The same maths as ``kernel_cases`` in torch, eager and compiled: what the kernels are measured against.

It is given an advantage: experts are chosen beforehand, and its inputs may stay in the GPU's cache.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mythos_edge.model.errors import one_line
from mythos_edge.scripts.lab.kernel_cases import Array, Case

_REPEATS = 20
_REASON_LETTERS = 160


def runner(case: Case, device: str) -> Callable[[], Tensor] | None:
    """Computes the case once a call; None for rounded weights, which torch has no kernels for."""
    if case.op == "SparseMoE":
        return _experts(case, device)
    return _attention(case, device) if case.op == "LatentAttention" else None


def seconds(run: Callable[[], Tensor]) -> float:
    """Median time of a run on the GPU, as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for _ in range(10):
            run()
    times = []
    for _ in range(_REPEATS + 3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / 10)
    return statistics.median(times[3:])


def best_time(
    case: Case, device: str = "cuda", *, compiled: bool = True, timer: Callable[[Callable[[], Tensor]], float] = seconds
) -> dict[str, Any]:
    """Columns of the report: ``torch_us``, the time of the faster way, which way that is, and the time of each.

    Empty for rounded weights. A way that does not work has the reason in place of its time.
    """
    run = runner(case, device)
    if run is None:
        return {}
    ways: dict[str, Callable[[], Any]] = {"eager": lambda: run}
    if compiled:
        # Each case is a function of its own to the compiler, which gives up on functions it meets too often.
        torch.compiler.reset()
        ways["compiled"] = lambda: torch.compile(run, dynamic=False)
    times: dict[str, float] = {}
    failed: dict[str, str] = {}
    for way, made in ways.items():
        try:
            times[way] = round(timer(made()) * 1e6, 2)
        except Exception as error:  # the compiler's own, a missing Triton, a GPU that is full or too old
            failed[way] = f"{type(error).__name__}: {one_line(error)[:_REASON_LETTERS]}"
    columns: dict[str, Any] = {f"{way}_us": times.get(way, failed.get(way)) for way in ways}
    if not times:
        return {"torch": "neither way works", **columns}
    best = min(times, key=times.__getitem__)
    return {"torch_us": times[best], "torch": best, **columns}


def _experts(case: Case, device: str) -> Callable[[], Tensor]:
    x, router, bias, fc1, fc2 = (
        _tensor(case.inputs[name], device) for name in ("x", "router", "router_bias", "fc1", "fc2")
    )
    logits = x.float() @ router.float().T
    chosen = (logits + bias.float()).topk(int(case.attributes["top_k"])).indices
    weights = logits.gather(1, chosen).softmax(-1).to(x.dtype)
    parts = []
    for expert in chosen.unique().tolist():
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        # Gate and up rows apart, as torch's own layers have them.
        gate, up = (fc1[expert, first::2].contiguous() for first in (0, 1))
        parts.append((rows, weights[rows, place, None], gate, up, fc2[expert]))
    whole = len(x) == 1

    def run() -> Tensor:
        y = torch.zeros_like(x)
        for rows, weight, gate, up, down in parts:
            taken = x if whole else x[rows]
            hidden = functional.silu(functional.linear(taken, gate)) * functional.linear(taken, up)
            made = functional.linear(hidden, down) * weight
            y = y + made if whole else y.index_add(0, rows, made)
        return y

    return run


def _attention(case: Case, device: str) -> Callable[[], Tensor]:
    q, rows, past = (_tensor(case.inputs[name], device) for name in ("q", "rows", "past"))
    values, scale = int(case.attributes["value_dim"]), float(case.attributes["scale"])
    by_head = q.transpose(1, 2).contiguous()
    keys = torch.cat([past, rows], dim=1)[:, None]
    count, columns = q.shape[1], keys.shape[2]
    position = torch.arange(columns, device=device)
    mask = None if count == 1 else position <= (past.shape[1] + torch.arange(count, device=device))[:, None]

    def run() -> Tensor:
        attended = functional.scaled_dot_product_attention(
            by_head, keys, keys[..., :values], attn_mask=mask, scale=scale, enable_gqa=True
        )
        return attended.transpose(1, 2)

    return run


def _tensor(array: Array, device: str) -> Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)
