"""Which experts a row goes to, and how much of each: float32 logits, then the top k of logit plus bias."""

import triton
import triton.language as tl


@triton.jit
def router_logits(x, router, logits, experts, dim, EXPERTS: tl.constexpr, DEPTH: tl.constexpr):
    """``logits (N, E)`` in float32 from ``x (N, D)`` and ``router (E, D)``; one program per row and EXPERTS experts."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    across = tl.arange(0, DEPTH)
    sums = tl.zeros((EXPERTS, DEPTH), tl.float32)
    for start in range(0, dim, DEPTH):
        column = start + across
        inside = (expert < experts)[:, None] & (column < dim)[None, :]
        weight = tl.load(router + expert[:, None] * dim + column[None, :], mask=inside, other=0.0)
        value = tl.load(x + row * dim + column, mask=column < dim, other=0.0)
        sums += weight.to(tl.float32) * value.to(tl.float32)[None, :]
    tl.store(logits + row * experts + expert, tl.sum(sums, axis=1), mask=expert < experts)


@triton.jit
def router_top_k(logits, router_bias, chosen, weights, experts, top_k, EXPERTS: tl.constexpr):
    """``chosen (N, K)`` int32 and ``weights (N, K)`` float32 from ``logits (N, E)``; one program per row.

    Chosen by logit + bias, the lowest index where that is equal; weighed by the softmax of the logits alone.
    """
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    exists = expert < experts
    logit = tl.load(logits + row * experts + expert, mask=exists, other=0.0)
    biased = logit + tl.load(router_bias + expert, mask=exists, other=0.0).to(tl.float32)
    # A NaN would choose no expert, and memory beyond the last one would be read.
    biased = tl.where(biased == biased, biased, float("-inf"))
    place = tl.full((EXPERTS,), -1, tl.int32)
    for turn in range(top_k):
        open_ = exists & (place < 0)
        best = tl.max(tl.where(open_, biased, float("-inf")), axis=0)
        winner = tl.min(tl.where(open_ & (biased == best), expert, EXPERTS), axis=0)
        place = tl.where(expert == winner, turn, place)
    taken = place >= 0
    largest = tl.max(tl.where(taken, logit, float("-inf")), axis=0)
    share = tl.where(taken, tl.exp(logit - largest), 0.0)
    share = share / tl.sum(share, axis=0)
    tl.store(chosen + row * top_k + place, expert, mask=taken)
    tl.store(weights + row * top_k + place, share, mask=taken)
