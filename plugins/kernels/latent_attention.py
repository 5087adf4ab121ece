"""Absorbed latent attention over a cache buffer: a row is key (latent | rope) and value (latent) at once.

The context of a batch row is ``past[0:length]`` and then the chunk's own rows. Queries (s, h) are flattened, so that
one tile of the cache serves all heads. The visible span of a query tile is cut into ``splits`` parts; with several,
each leaves a normalised partial and its log-sum-exp (base 2), and ``merge_splits`` joins them.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def latent_attention(
    q,
    rows,
    past,
    length,
    first,
    mixed,
    partials,
    sums_log,
    scale,
    chunk,
    heads,
    columns,
    values,
    ropes,
    splits,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUES: tl.constexpr,
    ROPES: tl.constexpr,
):
    """``mixed (B, S, H, R)``, or with splits ``partials (B, S*H, splits, R)`` and ``sums_log (B, S*H, splits)``."""
    batch, split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    width = values + ropes
    # TensorRT times plugins on inputs nobody has written: limited as int64, of which a cast may make anything.
    filled = tl.minimum(tl.maximum(tl.load(length), 0), columns).to(tl.int32)
    padding = tl.minimum(tl.maximum(tl.load(first + batch), 0), columns + chunk).to(tl.int32)
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    exists = query < chunk * heads
    own = filled + query // heads
    lowest = tl.minimum(padding, own)
    # What any query of this tile can see, and this program's part of it.
    begin = tl.minimum(padding, filled + tl.program_id(0) * QUERIES // heads)
    end = filled + tl.minimum((tl.program_id(0) * QUERIES + QUERIES - 1) // heads + 1, chunk)
    part = tl.cdiv(tl.cdiv(end - begin, splits), COLUMNS) * COLUMNS
    begin += split * part
    end = tl.minimum(end, begin + part)

    value, rope = tl.arange(0, VALUES), tl.arange(0, ROPES)
    value_exists, rope_exists = value < values, rope < ropes
    flat = batch * chunk * heads + query
    own_q = q + flat[:, None] * width
    q_value = tl.load(own_q + value[None, :], mask=exists[:, None] & value_exists[None, :], other=0.0)
    q_rope = tl.load(own_q + values + rope[None, :], mask=exists[:, None] & rope_exists[None, :], other=0.0)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixture = tl.zeros((QUERIES, VALUES), tl.float32)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < end
        # One tile may begin in the cache and end in the chunk.
        cached = past + (batch * columns + column)[:, None] * width
        fresh = rows + (batch * chunk + column - filled)[:, None] * width
        row = tl.where((column < filled)[:, None], cached, fresh)
        latent = tl.load(row + value[None, :], mask=inside[:, None] & value_exists[None, :], other=0.0)
        key = tl.load(row + values + rope[None, :], mask=inside[:, None] & rope_exists[None, :], other=0.0)
        score = tl.dot(q_rope, tl.trans(key), input_precision="ieee")
        score = tl.dot(q_value, tl.trans(latent), score, input_precision="ieee") * (scale * LOG2_E)
        seen = (column[None, :] >= lowest[:, None]) & (column[None, :] <= own[:, None]) & inside[None, :]
        score = tl.where(seen, score, float("-inf"))
        highest = tl.maximum(largest, tl.max(score, axis=1))
        # A tile in which a query sees nothing yet must not make inf - inf.
        level = tl.where(highest == float("-inf"), 0.0, highest)
        share = tl.exp2(score - level[:, None])
        fade = tl.exp2(largest - level)
        total = total * fade + tl.sum(share, axis=1)
        mixture = mixture * fade[:, None]
        mixture = tl.dot(share.to(latent.dtype), latent, mixture, input_precision="ieee")
        largest = highest
    mixture = mixture / tl.where(total == 0.0, 1.0, total)[:, None]
    inside = exists[:, None] & value_exists[None, :]
    if splits == 1:
        tl.store(mixed + flat[:, None] * values + value[None, :], mixture.to(mixed.dtype.element_ty), mask=inside)
    else:
        place = flat * splits + split
        # Nothing seen: the log says so, and nobody reads the partial.
        tl.store(sums_log + place, largest + tl.log2(total), mask=exists)
        inside = inside & (total > 0.0)[:, None]
        tl.store(partials + place[:, None] * values + value[None, :], mixture, mask=inside)


@triton.jit
def merge_splits(partials, sums_log, mixed, values, splits, SPLITS: tl.constexpr, VALUES: tl.constexpr):
    """``mixed`` from the partials of one query; every query sees at least its own row."""
    query = tl.program_id(0).to(tl.int64)
    split, value = tl.arange(0, SPLITS), tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    log = tl.load(sums_log + query * splits + split, mask=split < splits, other=float("-inf"))
    share = tl.exp2(log - tl.max(log, axis=0))
    seen = (log > float("-inf"))[:, None] & (value < values)[None, :]
    part = tl.load(partials + (query * splits + split)[:, None] * values + value[None, :], mask=seen, other=0.0)
    result = tl.sum(part * share[:, None], axis=0) / tl.sum(share, axis=0)
    tl.store(mixed + query * values + value, result.to(mixed.dtype.element_ty), mask=value < values)
