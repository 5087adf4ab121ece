"""Streaming column addition: a task whose difficulty is known for every token. Needs numpy only.

A token is one digit column (a, b) of two numbers, least significant first, and the model says the digit of the sum
at that position. That digit depends on the columns below only through the carry, and the carry only through the
columns that sum to 9 in a row directly below: the length of this chain is the number of loop steps needed.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.errors import UsageError

VOCAB_SIZE = 110
DIGIT_BASE = 100
MAX_DIGITS = 200
Int64 = NDArray[np.int64]


def columns_of(a: int, b: int, width: int | None = None) -> list[int]:
    """Column ids 10 * digit of a + digit of b, least significant first; by default with room for the last carry."""
    width = width or max(len(str(a)), len(str(b))) + 1
    return [10 * (a // 10**place % 10) + b // 10**place % 10 for place in range(width)]


def stream_of(a: int, b: int) -> list[int]:
    """The columns of a + b after one of zeros, which marks the start.

    Without it the second column cannot be told from the first when both are alike: attention over equal values gives
    the same value, whatever the position. The digit of the added column is 0 and says nothing.
    """
    return [0, *columns_of(a, b)]


def sum_from_ids(ids: list[int]) -> int:
    """The number whose digit ids (DIGIT_BASE + digit, least significant first) are given."""
    return sum((number - DIGIT_BASE) * 10**place for place, number in enumerate(ids))


def chain_lengths(columns: NDArray[Any]) -> Int64:
    """How many columns below each of ``columns (..., S)`` must be looked at for its digit, at least 1."""
    sums = columns // 10 + columns % 10
    lengths = np.ones(columns.shape, np.int64)
    for place in range(1, columns.shape[-1]):
        propagates = sums[..., place - 1] == 9
        lengths[..., place] = np.where(propagates, lengths[..., place - 1] + 1, 1)
    return lengths


def digits(columns: NDArray[Any], reach: int | None = None) -> Int64:
    """Digits of the sum at each of ``columns (..., S)``, with carries from at most ``reach`` columns below."""
    sums = columns // 10 + columns % 10
    carry = np.zeros(columns.shape, np.int64)
    for place in range(1, columns.shape[-1]):
        below = sums[..., place - 1]
        carry[..., place] = np.where(below == 9, carry[..., place - 1], below > 9)
    if reach is not None:
        carry = np.where(chain_lengths(columns) <= reach, carry, 0)
    result: Int64 = (sums + carry) % 10
    return result


def random_columns(random: np.random.Generator, batch: int, length: int) -> Int64:
    """Columns (batch, length) with chains of every length: a sum of 9 is drawn more often the longer it goes on."""
    columns = random.integers(0, 100, (batch, length))
    nines = 9 * random.integers(0, 10, (batch, length)) + 9  # 10 a + (9 - a)
    share = random.uniform(0.0, 0.9, (batch, 1))
    chosen: Int64 = np.where(random.random((batch, length)) < share, nines, columns)
    return chosen


def random_streams(random: np.random.Generator, batch: int, length: int) -> Int64:
    """Whole additions (batch, length + 2) of numbers with ``length`` digits, as ``stream_of`` makes them."""
    return np.pad(random_columns(random, batch, length), ((0, 0), (1, 1)))


def check_operand(text: str) -> int:
    """The number in ``text``; UsageError unless it is a whole number of at least 0."""
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"{text!r} cannot be added here: expected a whole number, 0 or more, in digits")
    if len(text) > MAX_DIGITS:
        raise UsageError(f"a number has {len(text)} digits, the demo adds up to {MAX_DIGITS}: give a shorter one")
    return int(text)
