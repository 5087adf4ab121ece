"""Routed experts for few rows: every chosen matrix streams through once, with no sum left to the order of programs.

``fc1 (E, 2F, D)`` interleaves gate and up rows, ``fc2 (E, D, F)``; ``hidden (N*K, F)`` float32 lies between the two.
Codes are scaled in groups of 32, so a scale's block must be a multiple of 32 (one scale a row is such a block).
"""

import triton
import triton.language as tl

from mythos_edge.plugins.kernels.codes import number_pairs, numbers, silu, unit


@triton.jit
def decode_gate_up(x, chosen, fc1, hidden, top_k, dim, units, UNITS: tl.constexpr, DEPTH: tl.constexpr):
    """``hidden``: SwiGLU of UNITS hidden units for one (row, choice)."""
    pair = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * UNITS
    expert = tl.load(chosen + pair).to(tl.int64)
    both = 2 * first + tl.arange(0, 2 * UNITS)
    rows = fc1 + (expert * 2 * units + both[:, None]) * dim
    sums = tl.zeros((2 * UNITS, DEPTH), tl.float32)
    for start in range(0, dim, DEPTH):
        column = start + tl.arange(0, DEPTH)
        inside = (both < 2 * units)[:, None] & (column < dim)[None, :]
        weight = tl.load(rows + column[None, :], mask=inside, other=0.0)
        value = tl.load(x + pair // top_k * dim + column, mask=column < dim, other=0.0)
        sums += weight.to(tl.float32) * value.to(tl.float32)[None, :]
    gate, up = tl.split(tl.reshape(tl.sum(sums, axis=1), (UNITS, 2)))
    own = first + tl.arange(0, UNITS)
    tl.store(hidden + pair * units + own, silu(gate) * up, mask=own < units)


@triton.jit
def decode_down(hidden, chosen, weights, fc2, y, top_k, dim, units, CHANNELS: tl.constexpr, DEPTH: tl.constexpr):
    """``y``: CHANNELS channels of one row, the weighted sum over its choices."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    sums = tl.zeros((CHANNELS, DEPTH), tl.float32)
    for choice in range(top_k):
        pair = row * top_k + choice
        expert, share = tl.load(chosen + pair).to(tl.int64), tl.load(weights + pair)
        rows = fc2 + (expert * dim + channel[:, None]) * units
        for start in range(0, units, DEPTH):
            column = start + tl.arange(0, DEPTH)
            inside = (channel < dim)[:, None] & (column < units)[None, :]
            weight = tl.load(rows + column[None, :], mask=inside, other=0.0)
            value = tl.load(hidden + pair * units + column, mask=column < units, other=0.0) * share
            sums += weight.to(tl.float32) * value[None, :]
    tl.store(y + row * dim + channel, tl.sum(sums, axis=1).to(y.dtype.element_ty), mask=channel < dim)


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
def group_scales(scale, index, length, blocks, start, inside, DEPTH: tl.constexpr):
    """The scales (ROWS, DEPTH / 32) of those groups."""
    column = start + 32 * tl.arange(0, DEPTH // 32)
    mask = inside[:, None] & (column < length)[None, :]
    block = column // (length // blocks)
    return tl.load(scale + index[:, None] * blocks + block[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def decode_gate_up_codes(
    x,
    chosen,
    fc1_codes,
    fc1_scale,
    hidden,
    top_k,
    dim,
    units,
    blocks,
    WEIGHTS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """As ``decode_gate_up``, from codes with ``fc1_scale (E, 2F, blocks)``."""
    pair = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * UNITS
    expert = tl.load(chosen + pair).to(tl.int64)
    both = 2 * first + tl.arange(0, 2 * UNITS)
    inside = both < 2 * units
    index = expert * 2 * units + both
    sums = tl.zeros((2 * UNITS, DEPTH // 32), tl.float32)
    for start in range(0, dim, DEPTH):
        part = group_sums(fc1_codes, x + pair // top_k * dim, index, dim, start, inside, WEIGHTS, 2 * UNITS, DEPTH)
        sums += part * group_scales(fc1_scale, index, dim, blocks, start, inside, DEPTH)
    gate, up = tl.split(tl.reshape(tl.sum(sums, axis=1) * unit(WEIGHTS), (UNITS, 2)))
    own = first + tl.arange(0, UNITS)
    tl.store(hidden + pair * units + own, silu(gate) * up, mask=own < units)


@triton.jit
def decode_down_codes(
    hidden,
    chosen,
    weights,
    fc2_codes,
    fc2_scale,
    y,
    top_k,
    dim,
    units,
    blocks,
    WEIGHTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """As ``decode_down``, from codes with ``fc2_scale (E, D, blocks)``."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < dim
    sums = tl.zeros((CHANNELS, DEPTH // 32), tl.float32)
    for choice in range(top_k):
        pair = row * top_k + choice
        index = tl.load(chosen + pair).to(tl.int64) * dim + channel
        share = tl.load(weights + pair) * unit(WEIGHTS)
        for start in range(0, units, DEPTH):
            part = group_sums(fc2_codes, hidden + pair * units, index, units, start, inside, WEIGHTS, CHANNELS, DEPTH)
            sums += part * (share * group_scales(fc2_scale, index, units, blocks, start, inside, DEPTH))
    tl.store(y + row * dim + channel, tl.sum(sums, axis=1).to(y.dtype.element_ty), mask=inside)
