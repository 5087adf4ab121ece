"""Routed experts for few rows: every chosen matrix streams through once, with no sum left to the order of programs.

``fc1 (E, 2F, D)`` interleaves gate and up rows, ``fc2 (E, D, F)``; ``hidden (N*K, F)`` float32 lies between the two.
They are plain, or codes with ``fc1_scale (E, 2F, blocks)`` and ``fc2_scale (E, D, blocks)``. Codes are scaled in groups
of 32, so a scale's block must be a multiple of 32 (one scale a row is such a block).
"""

import triton
import triton.language as tl

from mythos_edge.plugins.kernels.codes import group_scales, number_pairs, numbers, silu


@triton.jit
def chosen_expert(chosen, pair, experts):
    """The expert of a (row, choice). TensorRT times plugins on inputs nobody has written: the nearest there is."""
    return tl.minimum(tl.maximum(tl.load(chosen + pair), 0), experts - 1).to(tl.int64)


@triton.jit
def group_sums(
    codes, values, index, length, start, inside, WEIGHTS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr
):
    """Sums (ROWS, DEPTH / 32) of code times value in groups of 32 columns from ``start`` on; ``length`` codes a row."""
    column = start + tl.arange(0, DEPTH)
    value = tl.load(values + column, mask=column < length, other=0.0).to(tl.float32)
    if WEIGHTS == "int4":
        byte = start // 2 + tl.arange(0, DEPTH // 2)
        mask = inside[:, None] & (byte < length // 2)[None, :]
        even, odd = number_pairs(tl.load(codes + index[:, None] * (length // 2) + byte[None, :], mask=mask, other=0))
        even_value, odd_value = tl.split(tl.reshape(value, (DEPTH // 2, 2)))
        product = even * even_value[None, :] + odd * odd_value[None, :]
        return tl.sum(tl.reshape(product, (ROWS, DEPTH // 32, 16)), axis=2)
    mask = inside[:, None] & (column < length)[None, :]
    number = numbers(tl.load(codes + index[:, None] * length + column[None, :], mask=mask, other=0), WEIGHTS)
    return tl.sum(tl.reshape(number * value[None, :], (ROWS, DEPTH // 32, 32)), axis=2)


@triton.jit
def no_sums(WEIGHTS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """What ``dot_rows`` begins with: a sum for each column, or each group of codes, of a tile of weights."""
    return tl.zeros((ROWS, DEPTH if WEIGHTS == "plain" else DEPTH // 32), tl.float32)


@triton.jit
def dot_rows(
    sums,
    values,
    pair,
    pairs,
    share,
    weights,
    scale,
    index,
    inside,
    length,
    blocks,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``sums`` and what adds up to rows ``index`` of the weights times the pair's row of ``values`` times ``share``.

    All are ``length`` long. Each row of ``values`` serves ``pairs`` pairs.
    """
    for start in range(0, length, DEPTH):
        if WEIGHTS == "plain":
            column = start + tl.arange(0, DEPTH)
            mask = inside[:, None] & (column < length)[None, :]
            weight = tl.load(weights + index[:, None] * length + column[None, :], mask=mask, other=0.0)
            # Found before the loop, the row costs kernels for unaligned rows 50 registers more.
            value = tl.load(values + pair // pairs * length + column, mask=column < length, other=0.0)
            sums += weight.to(tl.float32) * (value.to(tl.float32) * share)[None, :]
        else:
            row = values + pair // pairs * length
            part = group_sums(weights, row, index, length, start, inside, WEIGHTS, ROWS, DEPTH)
            sums += part * (share * group_scales(scale, index, length, blocks, start, inside, WEIGHTS, DEPTH))
    return sums


@triton.jit
def decode_gate_up(
    x,
    chosen,
    fc1,
    hidden,
    experts,
    top_k,
    dim,
    units,
    fc1_scale,
    blocks,
    WEIGHTS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``hidden``: SwiGLU of UNITS hidden units for one (row, choice)."""
    pair = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * UNITS
    both = 2 * first + tl.arange(0, 2 * UNITS)
    index = chosen_expert(chosen, pair, experts) * 2 * units + both
    inside = both < 2 * units
    sums = no_sums(WEIGHTS, 2 * UNITS, DEPTH)
    sums = dot_rows(sums, x, pair, top_k, 1.0, fc1, fc1_scale, index, inside, dim, blocks, WEIGHTS, 2 * UNITS, DEPTH)
    gate, up = tl.split(tl.reshape(tl.sum(sums, axis=1), (UNITS, 2)))
    own = first + tl.arange(0, UNITS)
    tl.store(hidden + pair * units + own, silu(gate) * up, mask=own < units)


@triton.jit
def decode_down(
    hidden,
    chosen,
    weights,
    fc2,
    y,
    experts,
    top_k,
    dim,
    units,
    fc2_scale,
    blocks,
    WEIGHTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``y``: CHANNELS channels of one row, the weighted sum over its choices."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < dim
    sums = no_sums(WEIGHTS, CHANNELS, DEPTH)
    for choice in range(top_k):
        pair = row * top_k + choice
        index = chosen_expert(chosen, pair, experts) * dim + channel
        share = tl.load(weights + pair)
        sums = dot_rows(
            sums, hidden, pair, 1, share, fc2, fc2_scale, index, inside, units, blocks, WEIGHTS, CHANNELS, DEPTH
        )
    tl.store(y + row * dim + channel, tl.sum(sums, axis=1).to(y.dtype.element_ty), mask=inside)
