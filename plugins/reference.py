"""Numpy oracle of every custom op, written for reading: float64, one row at a time, nothing shared with the bodies."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Float64 = NDArray[np.float64]


def latent_attention(
    q: Array, rows: Array, past: Array, length: int, first: NDArray[np.int64], *, scale: float, value_dim: int
) -> Float64:
    """The attended values (B, S, H, value_dim) of ``mythos::LatentAttention``; shapes as in ``ops``."""
    batch, chunk, heads, _ = q.shape
    mixed = np.zeros((batch, chunk, heads, value_dim))
    for b in range(batch):
        context = np.concatenate([past[b, :length], rows[b]]).astype(np.float64)
        for s in range(chunk):
            own = length + s
            seen = context[min(int(first[b]), own) : own + 1]
            for h in range(heads):
                mixed[b, s, h] = _softmax(seen @ q[b, s, h].astype(np.float64) * scale) @ seen[:, :value_dim]
    return mixed


def grouped_query_attention(
    q: Array,
    rows: Array,
    past: Array,
    length: int,
    first: NDArray[np.int64],
    *,
    scale: float,
    kv_heads: int,
    window_size: int = 0,
) -> Float64:
    """The attended values (B, S, H, head_dim) of ``mythos::GroupedQueryAttention``; shapes as in ``ops``."""
    batch, chunk, heads, head_dim = q.shape
    mixed = np.zeros(q.shape)
    for b in range(batch):
        context = np.concatenate([past[b, :length], rows[b]]).astype(np.float64)
        keys, values = context.reshape(-1, 2, kv_heads, head_dim).transpose(1, 2, 0, 3)
        for s in range(chunk):
            own = length + s
            oldest = own - window_size + 1 if window_size else 0
            seen = slice(min(max(int(first[b]), oldest), own), own + 1)
            for h in range(heads):
                group = h // (heads // kv_heads)
                weights = _softmax(keys[group, seen] @ q[b, s, h].astype(np.float64) * scale)
                mixed[b, s, h] = weights @ values[group, seen]
    return mixed


def sparse_moe(
    x: Array,
    router: Array,
    router_bias: Array,
    fc1: Array,
    fc2: Array,
    shared_gate_up: Array | None = None,
    shared_down: Array | None = None,
    *,
    top_k: int,
) -> Float64:
    """The expert mixture (N, D) of ``mythos::SparseMoE``; shapes as in ``ops.SPARSE_MOE``."""
    y = np.zeros(x.shape)
    for n, row in enumerate(x.astype(np.float64)):
        logits = router.astype(np.float64) @ row
        chosen = np.argsort(-(logits + router_bias), kind="stable")[:top_k]
        for expert, weight in zip(chosen, _softmax(logits[chosen]), strict=True):
            gate_up = fc1[expert].astype(np.float64) @ row
            y[n] += weight * (fc2[expert].astype(np.float64) @ (_silu(gate_up[0::2]) * gate_up[1::2]))
        if shared_gate_up is not None and shared_down is not None:
            gate, up = np.split(shared_gate_up.astype(np.float64) @ row, 2)
            y[n] += shared_down.astype(np.float64) @ (_silu(gate) * up)
    return y


def quantized_sparse_moe(
    x: Array,
    router: Array,
    router_bias: Array,
    fc1_codes: Array,
    fc1_scale: Array,
    fc2_codes: Array,
    fc2_scale: Array,
    *,
    top_k: int,
) -> Float64:
    """The expert mixture (N, D) of ``mythos::QuantizedSparseMoE``; shapes as in ``ops.QUANTIZED_SPARSE_MOE``."""
    fc1, fc2 = _dequantized(fc1_codes, fc1_scale), _dequantized(fc2_codes, fc2_scale)
    return sparse_moe(x, router, router_bias, fc1, fc2, top_k=top_k)


def _dequantized(codes: Array, scale: Array) -> Float64:
    block = codes.shape[-1] // scale.shape[-1]
    scales: Float64 = np.repeat(scale.astype(np.float64), block, axis=-1)
    return codes.astype(np.float64) * scales


def _softmax(values: Float64) -> Float64:
    exponents: Float64 = np.exp(values - values.max())
    return exponents / float(exponents.sum())


def _silu(values: Float64) -> Float64:
    silu: Float64 = values / (1.0 + np.exp(-values))
    return silu
