"""Routed experts for many rows: the (row, choice) pairs sorted by expert, then tiles of rows of one expert.

A pair is ``row * K + choice``. Sorted by expert, the pairs fill ``order (N*K)``; ``starts (E + 1)`` says where an
expert's begin. The tiles of expert e are numbers ``starts[e] // ROWS + e`` and on, which always leaves room for the
expert before it, so each program of ``group_pairs`` knows its tiles from its own count; unused tiles carry -1.
"""

import triton
import triton.language as tl

from mythos_edge.plugins.kernels.codes import group_scales, number_pairs, numbers, silu


@triton.jit
def group_pairs(chosen, order, starts, tile_expert, pairs, experts, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``order``, ``starts`` and ``tile_expert (tiles)`` from ``chosen (N*K)``; one program per expert."""
    expert = tl.program_id(0)
    below, own = 0, 0
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        owner = tl.load(chosen + pair, mask=pair < pairs, other=experts)
        below += tl.sum((owner < expert).to(tl.int32), axis=0)
        own += tl.sum((owner == expert).to(tl.int32), axis=0)
    tl.store(starts + expert, below)
    place = below
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        mine = (tl.load(chosen + pair, mask=pair < pairs, other=experts) == expert).to(tl.int32)
        tl.store(order + place + tl.cumsum(mine, axis=0) - 1, pair, mask=mine > 0)
        place += tl.sum(mine, axis=0)
    first = below // ROWS + expert
    after = place // ROWS + expert + 1
    if expert == experts - 1:
        tl.store(starts + experts, place)
        after = tiles
    for start in range(first, after, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        used = (tile - first) * ROWS < own
        tl.store(tile_expert + tile, tl.where(used, expert, -1), mask=tile < after)


@triton.jit
def tile_pairs(order, starts, expert, ROWS: tl.constexpr):
    """Of the tile of this program: places in ``order``, pairs, and which of them are the expert's own."""
    begin = tl.load(starts + expert)
    tile = tl.program_id(0) - (begin // ROWS + expert)
    place = begin + tile * ROWS + tl.arange(0, ROWS)
    mine = place < tl.load(starts + expert + 1)
    return place.to(tl.int64), tl.load(order + place, mask=mine, other=0).to(tl.int64), mine


@triton.jit
def scaled_tile(
    codes,
    scale,
    index,
    inside,
    length,
    blocks,
    start,
    dtype: tl.constexpr,
    WEIGHTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Weights (DEPTH, COLUMNS) of ``dtype`` from ``start`` on, rows ``index`` of the codes transposed."""
    column = start + tl.arange(0, DEPTH)
    if WEIGHTS == "int4":
        byte = start // 2 + tl.arange(0, DEPTH // 2)
        mask = inside[:, None] & (byte < length // 2)[None, :]
        even, odd = number_pairs(tl.load(codes + index[:, None] * (length // 2) + byte[None, :], mask=mask, other=0))
        number = tl.reshape(tl.join(even, odd), (COLUMNS, DEPTH))
    else:
        mask = inside[:, None] & (column < length)[None, :]
        number = numbers(tl.load(codes + index[:, None] * length + column[None, :], mask=mask, other=0), WEIGHTS)
    each = group_scales(scale, index, length, blocks, start, inside, WEIGHTS, DEPTH)
    each = tl.reshape(tl.broadcast_to(each[:, :, None], (COLUMNS, DEPTH // 32, 32)), (COLUMNS, DEPTH))
    return tl.trans((number * each).to(dtype))


@triton.jit
def product(
    values,
    pair,
    pairs,
    mine,
    weights,
    scale,
    index,
    inside,
    length,
    blocks,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Float32 (ROWS, COLUMNS): the pairs' rows of ``values`` times rows ``index`` of the weights, all ``length`` long.

    Each row of ``values`` serves ``pairs`` pairs.
    """
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, length, DEPTH):
        column = start + tl.arange(0, DEPTH)
        deep = column < length
        mask = mine[:, None] & deep[None, :]
        value = tl.load(values + pair[:, None] // pairs * length + column[None, :], mask=mask, other=0.0)
        if WEIGHTS == "plain":
            mask = inside[None, :] & deep[:, None]
            weight = tl.load(weights + index[None, :] * length + column[:, None], mask=mask, other=0.0)
        else:
            weight = scaled_tile(
                weights, scale, index, inside, length, blocks, start, value.dtype, WEIGHTS, COLUMNS, DEPTH
            )
        sums = tl.dot(value, weight, sums, input_precision="ieee")
    return sums


@triton.jit
def prefill_gate_up(
    x,
    order,
    starts,
    tile_expert,
    fc1,
    hidden,
    top_k,
    dim,
    units,
    fc1_scale,
    blocks,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``hidden (N*K, F)`` in the order of ``order``: SwiGLU of UNITS hidden units for a tile of pairs."""
    expert = tl.load(tile_expert + tl.program_id(0))
    if expert < 0:
        return
    place, pair, mine = tile_pairs(order, starts, expert, ROWS)
    first = tl.program_id(1) * UNITS
    both = 2 * first + tl.arange(0, 2 * UNITS)
    index = expert.to(tl.int64) * 2 * units + both
    sums = product(
        x, pair, top_k, mine, fc1, fc1_scale, index, both < 2 * units, dim, blocks, WEIGHTS, ROWS, 2 * UNITS, DEPTH
    )
    gate, up = tl.split(tl.reshape(sums, (ROWS, UNITS, 2)))
    own = first + tl.arange(0, UNITS)
    inside = mine[:, None] & (own < units)[None, :]
    made = (silu(gate) * up).to(hidden.dtype.element_ty)
    tl.store(hidden + place[:, None] * units + own[None, :], made, mask=inside)


@triton.jit
def prefill_down(
    hidden,
    order,
    starts,
    tile_expert,
    fc2,
    made,
    dim,
    units,
    fc2_scale,
    blocks,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``made (N*K, D)`` float32, pairs in their own order: CHANNELS channels for a tile of pairs."""
    expert = tl.load(tile_expert + tl.program_id(0))
    if expert < 0:
        return
    place, pair, mine = tile_pairs(order, starts, expert, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    index, inside = expert.to(tl.int64) * dim + channel, channel < dim
    sums = product(hidden, place, 1, mine, fc2, fc2_scale, index, inside, units, blocks, WEIGHTS, ROWS, CHANNELS, DEPTH)
    tl.store(made + pair[:, None] * dim + channel[None, :], sums, mask=mine[:, None] & inside[None, :])


@triton.jit
def combine_choices(made, weights, y, top_k, dim, CHANNELS: tl.constexpr):
    """``y (N, D)``: the weighted sum of ``made (N*K, D)`` over the choices of a row."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < dim
    sums = tl.zeros((CHANNELS,), tl.float32)
    for choice in range(top_k):
        pair = row * top_k + choice
        sums += tl.load(weights + pair) * tl.load(made + pair * dim + channel, mask=inside, other=0.0)
    tl.store(y + row * dim + channel, sums.to(y.dtype.element_ty), mask=inside)
