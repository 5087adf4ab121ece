"""The Triton kernels, through the launch programs that the plugins will run, against the float64 oracle."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mythos_edge.plugins import reference
from mythos_edge.plugins.launches import program
from plugins.interpreter import Interpreter, narrowed, widened

# Rounding of the inputs is in the oracle too; what is left is rounding of the result, and in the kernels with
# products of tiles of what lies between two of them.
TOLERANCE = {"fp32": 2e-6, "fp16": 1e-3, "bf16": 8e-3}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    worker = Interpreter()
    yield worker
    worker.close()


def _far(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest error, relative to the largest value."""
    assert np.isfinite(got).all()
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def _attended(
    interpreter: Interpreter, random: np.random.Generator, case: tuple[Any, ...], dtype: str
) -> tuple[np.ndarray, np.ndarray, int]:
    batch, chunk, capacity, length, heads, values, ropes, first = case
    width, attributes = values + ropes, {"scale": 1.7 / np.sqrt(values), "value_dim": values}
    sizes = {"q": (batch, chunk, heads, width), "rows": (batch, chunk, width), "past": (batch, capacity, width)}
    arrays = {name: narrowed(random.standard_normal(size), dtype) for name, size in sizes.items()}
    # What is beyond the length has never been written.
    arrays["past"][:, length:] = narrowed(np.array(np.nan), dtype)
    arrays |= {"length": np.array(length), "first": np.array(first)}
    shapes = {name: array.shape for name, array in arrays.items()}
    made = program("LatentAttention", shapes, dict.fromkeys(sizes, dtype), attributes)
    arrays["mixed"] = narrowed(np.full((batch, chunk, heads, values), np.nan), dtype)
    got = interpreter.run(made, arrays)["mixed"]
    wide = [widened(arrays[name], dtype) for name in sizes]
    wanted = reference.latent_attention(*wide, length, arrays["first"], **attributes)  # type: ignore[arg-type]
    return widened(got, dtype), wanted, len(made.launches)


ATTENTION = [
    # batch, new rows, capacity, filled, heads, latent rank, rotary channels, padding
    ((1, 1, 0, 0, 1, 32, 8, [0]), 1),
    ((1, 1, 300, 300, 4, 32, 8, [0]), 2),
    ((1, 1, 300, 17, 4, 32, 16, [0]), 2),
    ((1, 1, 1000, 0, 4, 32, 16, [0]), 2),
    ((1, 7, 40, 21, 5, 32, 16, [0]), 1),
    ((2, 3, 300, 130, 4, 40, 8, [0, 50]), 2),
    ((3, 7, 11, 4, 2, 13, 7, [6, 0, 5]), 1),
    ((2, 6, 200, 0, 3, 13, 7, [5, 0]), 2),
    ((2, 9, 200, 150, 3, 24, 0, [158, 3]), 2),
    ((1, 1, 130, 100, 16, 256, 32, [0]), 2),
    ((1, 2, 60, 50, 9, 384, 64, [0]), 1),
    ((1, 1, 70, 30, 3, 70, 100, [4]), 1),
]


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize(("case", "launches"), ATTENTION)
def test_latent_attention(
    case: tuple[Any, ...], launches: int, dtype: str, interpreter: Interpreter, random: np.random.Generator
) -> None:
    got, wanted, made = _attended(interpreter, random, case, dtype)
    assert made == launches
    assert _far(got, wanted) < TOLERANCE[dtype]
