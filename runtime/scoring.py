"""Logits and depth of given tokens, and the work of computing them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mythos_edge.runtime.decoding import TokenSequence
from mythos_edge.runtime.staircase import Fed
from mythos_edge.runtime.together import Work

# Positions whose logits are held in float64.
_NATS_AT_ONCE = 64


@dataclass(frozen=True)
class Score:
    """``logits (B, S, V)`` float32 and ``depth (B, S)`` int32 of given tokens, and the work it took.

    ``block_calls``, ``block_rows`` and ``catch_up_calls`` are sums over the sequences; ``batch_runs`` counts a run of
    the recurrent block that several shared once.
    """

    logits: NDArray[np.float32]
    depth: NDArray[np.int32]
    block_calls: int
    block_rows: int
    catch_up_calls: int
    batch_runs: int


def score_of(scored: Sequence[Fed], sequences: Sequence[TokenSequence], batch_runs: int) -> Score:
    """The figures of sequences that were scored together."""
    stairs = [sequence.staircase for sequence in sequences]
    return Score(
        np.concatenate([fed.logits for fed in scored]),
        np.concatenate([fed.depth for fed in scored]).astype(np.int32),
        sum(one.block_calls for one in stairs),
        sum(one.block_rows for one in stairs),
        sum(one.catch_up_calls for one in stairs),
        batch_runs,
    )


def nats_of(logits: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Minus the natural-log probability (B, S - 1) that ``logits (B, S, V)`` give to all ``ids (B, S)`` but the first
    of a row, which nothing predicts. NaN where logits are not finite."""
    nats = np.empty((len(ids), ids.shape[1] - 1))
    with np.errstate(invalid="ignore"):
        for row, start in np.ndindex(len(ids), -(-nats.shape[1] // _NATS_AT_ONCE)):
            at = slice(start * _NATS_AT_ONCE, min((start + 1) * _NATS_AT_ONCE, nats.shape[1]))
            wide = logits[row, at].astype(np.float64)
            wide -= wide.max(axis=-1, keepdims=True)
            nats[row, at] = np.log(np.exp(wide).sum(axis=-1)) - wide[np.arange(len(wide)), ids[row, 1:][at]]
    return nats


def spans_of(prefill: int, positions: int) -> Iterator[tuple[int, int]]:
    """The chunks that the positions are fed in: the first ``prefill`` at once, the rest one at a time."""
    if prefill:
        yield 0, prefill
    for position in range(prefill, positions):
        yield position, position + 1


def scoring(sequence: TokenSequence, spans: list[tuple[int, int]], progress: Callable[[float], None]) -> Work[Fed]:
    """The work of feeding a sequence in ``spans``: logits and depth of every position."""
    ids = np.array([sequence.ids], np.int64)
    fed = []
    for start, stop in spans:
        progress(start / ids.shape[1])
        fed.append((yield from sequence.staircase.feeding(ids[:, start:stop], np.arange(stop - start))))
    return Fed(np.concatenate([one.logits for one in fed], axis=1), np.concatenate([one.depth for one in fed], axis=1))
