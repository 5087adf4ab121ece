"""The golden sample of a bundle: what the network says about a few tokens, computed from the weights as written.

It is computed with torch, not with the runtime it will test, and straight from the weights file with one matrix's
piece in memory at a time, so that an export's memory does not grow with the model.
"""

import math
import mmap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mythos_edge.exporter.weights import BY_ONNX, WeightsPlan
from mythos_edge.model.errors import ExportError
from mythos_edge.model.families.family import Config
from mythos_edge.model.layout import network_of
from mythos_edge.model.manifest import EXACT_TIE_MARGIN, NEAR_TIE_MARGIN, WEIGHTS_FILE, GoldenSample
from mythos_edge.model.network import LoopedNetwork

# How many tokens each attempt at a sample without ties has: the fewer, the fewer ties.
_TOKENS = (4,) * 8 + (2,) * 4 + (1,) * 4
_MAX_DEPTH = 2
_TOP = 8
_CLEAR_MARGIN = 1e-3
_PIECE_BYTES = 32 << 20


def golden_sample(config: Config, plan: WeightsPlan, folder: Path, max_context: int) -> GoldenSample:
    """Depths and largest logits of the network in ``folder`` after a few tokens and at most two loop steps.

    Raises ExportError when the logits are not finite.
    """
    max_depth = min(_MAX_DEPTH, config.looped.max_depth)
    with (folder / WEIGHTS_FILE).open("rb") as file:
        # A private mapping: torch wants writable memory, and nothing is ever written.
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    network = _mapped_network(config, plan, mapping, max_context)
    clearest = -math.inf
    for start, tokens in enumerate(_TOKENS, 3):
        tried = [(7 * index + start) % config.looped.vocab_size for index in range(min(tokens, max_context))]
        with torch.no_grad(), _Streaming(lambda: mapping.madvise(mmap.MADV_DONTNEED)):
            found = network(torch.tensor([tried]), max_depth, logit_rows=torch.tensor([len(tried) - 1]))
        # Another machine's float32 must come to the same depths and experts. A margin that is NaN is none.
        least = float(torch.stack([found.router_margin.min(), found.margin.min()]).nan_to_num(-1.0).min())
        if least > clearest:
            clearest, ids, scored = least, tried, found
        # Where all experts are always equal, other tokens change nothing.
        if clearest > _CLEAR_MARGIN or found.router_margin.max() < EXACT_TIE_MARGIN:
            break
    margins = {"router": scored.router_margin.min(), "halting": scored.margin.min()}
    logits = scored.logits[0, 0]
    if not torch.isfinite(logits).all():
        wrong = logits[~torch.isfinite(logits)][0].item()
        raise ExportError(
            f"the model's logits are not finite: {wrong} after the {len(ids)} tokens of the self-test, as its numbers "
            "overflow float32: it cannot be run; export an earlier checkpoint"
        )
    top = logits.topk(min(_TOP, config.looped.vocab_size))
    return GoldenSample(
        ids=tuple(ids),
        max_depth=max_depth,
        threshold=config.looped.threshold,
        depth=tuple(scored.depth[0].tolist()),
        top_ids=tuple(top.indices.tolist()),
        top_logits=tuple(top.values.tolist()),
        tie=next((decision for decision, margin in margins.items() if margin < NEAR_TIE_MARGIN), ""),
    )


def _mapped_network(config: Config, plan: WeightsPlan, mapping: mmap.mmap, max_context: int) -> LoopedNetwork:
    with torch.device("meta"):
        network = network_of(config, max_context)
    modules = dict(network.named_modules())
    for entry in plan.file.entries.values():
        owner, _, leaf = entry.name.rpartition(".")
        kind, count = BY_ONNX[entry.dtype].torch, math.prod(entry.shape)
        # torch refuses to see nothing: a narrow model has no sine in its loop table.
        flat = (
            torch.frombuffer(mapping, dtype=kind, count=count, offset=entry.offset)
            if count
            else torch.empty(0, dtype=kind)
        )
        setattr(modules[owner], leaf, nn.Parameter(flat.view(entry.shape), requires_grad=False))
    return network


class _Streaming(TorchFunctionMode):
    """Computes in float32 whatever the storage dtype, and drops each matrix from memory once it was used."""

    def __init__(self, evict: Callable[[], None]) -> None:
        super().__init__()
        self._evict = evict

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.linear:
            return self._linear(*args)
        if func is nn.functional.embedding:
            return func(*args, **(kwargs or {})).float()
        if func is Tensor.__getitem__:
            return func(*args)
        return func(*(_widened(argument) for argument in args), **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        height = max(1, _PIECE_BYTES // (weight.shape[1] * weight.element_size()))
        pieces = []
        for start in range(0, weight.shape[0], height):
            pieces.append(x @ weight[start : start + height].float().T)
            self._evict()
        return torch.cat(pieces, dim=-1)


def _widened(argument: Any) -> Any:
    narrow = isinstance(argument, Tensor) and argument.dtype in (torch.float16, torch.bfloat16)
    return argument.float() if narrow else argument
