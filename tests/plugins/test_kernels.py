"""The Triton kernels, through the launch programs that the plugins will run, against the float64 oracle."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from plugins.interpreter import Interpreter, narrowed, widened

from mythos_edge.plugins import reference
from mythos_edge.plugins.kernels.variants import VARIANTS
from mythos_edge.plugins.launches import Launch, Pointer, Program, program

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
    """The case's mixture, the oracle's, and the number of launches; length and padding may be out of range."""
    batch, chunk, capacity, length, heads, values, ropes, first = case
    filled = min(max(length, 0), capacity)
    width, attributes = values + ropes, {"scale": 1.7 / np.sqrt(values), "value_dim": values}
    sizes = {"q": (batch, chunk, heads, width), "rows": (batch, chunk, width), "past": (batch, capacity, width)}
    arrays = {name: narrowed(random.standard_normal(size), dtype) for name, size in sizes.items()}
    # What is beyond the length has never been written.
    arrays["past"][:, filled:] = narrowed(np.array(np.nan), dtype)
    arrays |= {"length": np.array(length), "first": np.array(first)}
    shapes = {name: array.shape for name, array in arrays.items()}
    made = program("LatentAttention", shapes, dict.fromkeys(sizes, dtype), attributes)
    arrays["mixed"] = narrowed(np.full((batch, chunk, heads, values), np.nan), dtype)
    got = interpreter.run(made, arrays)["mixed"]
    wide = [widened(arrays[name], dtype) for name in sizes]
    padding = np.maximum(arrays["first"], 0)
    wanted = reference.latent_attention(*wide, filled, padding, **attributes)
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


@pytest.mark.parametrize(("capacity", "launches"), [(23, 1), (300, 2)])
@pytest.mark.parametrize(
    ("length", "first"),
    [
        (-1, [0, -1]),
        (24, [-3, 7]),
        (301, [0, 302]),
        # Casts to int32 make 5, 0, -1 and 7 of these.
        (2**32 + 5, [2**32, 2**40]),
        (5, [-(2**32), 2**32]),
        (-(2**63), [-(2**63), 2**63 - 1]),
        (2**63 - 1, [2**63 - 1, -(2**63) + 7]),
        (-1 << 32, [2**31, -(2**31)]),
    ],
)
def test_attention_with_a_length_nobody_wrote_stays_inside(
    capacity: int, launches: int, length: int, first: list[int], interpreter: Interpreter, random: np.random.Generator
) -> None:
    """TensorRT times plugins so: the nearest length and padding there can be are computed with."""
    got, wanted, made = _attended(interpreter, random, (2, 4, capacity, length, 3, 16, 8, first), "fp32")
    assert made == launches
    assert _far(got, wanted) < TOLERANCE["fp32"]


def _experts_case(
    random: np.random.Generator, case: tuple[int, ...], dtype: str, favourite: int | None = None
) -> dict[str, np.ndarray]:
    """Narrow arrays; with a ``favourite``, the bias sends every row there first."""
    rows, dim, experts, _, units = case
    sizes = {"x": (rows, dim), "router": (experts, dim), "router_bias": (experts,)}
    sizes |= {"fc1": (experts, 2 * units, dim), "fc2": (experts, dim, units)}
    # Logits of a few units lie further apart than float32 rounds; gate and up of about 1.
    sd = {"x": 1.0, "router": 2 / np.sqrt(dim), "router_bias": 1.0, "fc1": 1 / np.sqrt(dim), "fc2": 1 / np.sqrt(units)}
    arrays = {name: sd[name] * random.standard_normal(size) for name, size in sizes.items()}
    if favourite is not None:
        arrays["router_bias"][favourite] = 100
    return {name: narrowed(array, dtype) for name, array in arrays.items()}


def _mixed(
    interpreter: Interpreter, op: str, arrays: dict[str, np.ndarray], dtypes: dict[str, str], top_k: int, logical: Any
) -> tuple[np.ndarray, list[str]]:
    """The experts' output, and the kernels that made it."""
    shapes = {name: logical.get(name, array.shape) for name, array in arrays.items()}
    made = program(op, shapes, dtypes, {"top_k": top_k})
    arrays = arrays | {"y": narrowed(np.full(arrays["x"].shape, np.nan), dtypes["x"])}
    return widened(interpreter.run(made, arrays)["y"], dtypes["x"]), [launch.kernel for launch in made.launches]


EXPERTS = [
    # rows, dim, experts, top-k, hidden units
    (1, 8, 1, 1, 8),
    (1, 528, 7, 2, 24),
    (3, 17, 5, 5, 7),
    (8, 40, 8, 2, 16),
    (9, 96, 16, 1, 32),
    (33, 72, 8, 2, 136),
    (70, 96, 4, 4, 48),
    (10, 33, 3, 2, 9),
]


@pytest.mark.parametrize(
    ("case", "dtype"),
    # Triton's interpreter gets products of bf16 tiles wrong, so no prefill in that.
    [(case, dtype) for case in EXPERTS for dtype in ("fp16", "fp32", "bf16") if dtype != "bf16" or case[0] <= 8],
)
def test_sparse_moe(case: tuple[int, ...], dtype: str, interpreter: Interpreter, random: np.random.Generator) -> None:
    rows, dim, _, top_k, units = case
    many = rows > 8 and dim % 8 == 0 and units % 8 == 0
    arrays = _experts_case(random, case, dtype)
    got, kernels = _mixed(interpreter, "SparseMoE", arrays, dict.fromkeys(arrays, dtype), top_k, {})
    wanted = reference.sparse_moe(**{name: widened(array, dtype) for name, array in arrays.items()}, top_k=top_k)
    assert _far(got, wanted) < TOLERANCE[dtype]
    assert many == ("group_pairs" in kernels)


@pytest.mark.parametrize("favourite", [0, 5])
def test_all_rows_to_one_expert(favourite: int, interpreter: Interpreter, random: np.random.Generator) -> None:
    arrays = _experts_case(random, (70, 16, 6, 1, 8), "fp32", favourite)
    got, _ = _mixed(interpreter, "SparseMoE", arrays, dict.fromkeys(arrays, "fp32"), 1, {})
    assert _far(got, reference.sparse_moe(**arrays, top_k=1)) < TOLERANCE["fp32"]


@pytest.mark.parametrize("rows", [2, 12])
def test_equal_logits_choose_the_lowest_expert(
    rows: int, interpreter: Interpreter, random: np.random.Generator
) -> None:
    arrays = _experts_case(random, (rows, 16, 9, 4, 8), "fp32")
    arrays["router"][:] = 0.0
    arrays["router_bias"][:] = [0, 1, 0, 1, 0, 1, 0, 0, 0]
    got, _ = _mixed(interpreter, "SparseMoE", arrays, dict.fromkeys(arrays, "fp32"), 4, {})
    assert _far(got, reference.sparse_moe(**arrays, top_k=4)) < TOLERANCE["fp32"]


def test_nan_rows_stay_apart(interpreter: Interpreter, random: np.random.Generator) -> None:
    """NaN in a row neither reads beyond the experts nor touches the other rows."""
    arrays = _experts_case(random, (12, 16, 4, 2, 8), "fp32")
    arrays["x"][3] = np.nan
    shapes, dtypes = {name: array.shape for name, array in arrays.items()}, dict.fromkeys(arrays, "fp32")
    made = program("SparseMoE", shapes, dtypes, {"top_k": 2})
    got = interpreter.run(made, arrays | {"y": np.zeros((12, 16), np.float32)})["y"]
    assert np.isnan(got[3]).all()
    arrays["x"][3] = 0.0
    rest = np.arange(12) != 3
    assert _far(got[rest], reference.sparse_moe(**arrays, top_k=2)[rest]) < TOLERANCE["fp32"]


def _codes(random: np.random.Generator, kind: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Random codes as memory holds them, and their numbers; every int8 and int4 code and every finite float8 occurs."""
    if kind == "int8":
        code = random.integers(-128, 128, shape).astype(np.int8)
        return code, code
    if kind == "int4":
        code = random.integers(-8, 8, shape).astype(np.int8)
        low, high = code[..., 0::2] & 0xF, code[..., 1::2] & 0xF
        return (low | (high << 4)).astype(np.uint8).view(np.int8), code
    bits = random.integers(0, 256, shape)
    bits = np.where(bits & 0x7F == 0x7F, 0x38, bits)
    mantissa, exponent = bits & 7, (bits >> 3) & 15
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return bits.astype(np.uint8).view(np.int8), np.where(bits & 0x80, -size, size)


def _coded(
    case: tuple[int, ...], kind: str, dtype: str, random: np.random.Generator
) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, tuple[int, ...]], dict[str, np.ndarray]]:
    """Arrays, dtypes and logical shapes of an op's inputs, and the numbers of the codes; no ``kind``, no codes."""
    arrays = _experts_case(random, case[:5], dtype)
    numbers: dict[str, np.ndarray] = {}
    shapes = {name: array.shape for name, array in arrays.items()}
    for name, count in zip(("fc1", "fc2"), case[5:], strict=True) if kind else ():
        del arrays[name]
        shape = shapes.pop(name)
        shapes[f"{name}_codes"], shapes[f"{name}_scale"] = shape, (*shape[:2], count)
        arrays[f"{name}_codes"], numbers[f"{name}_codes"] = _codes(random, kind, shape)
        small = {"int8": 60.0, "int4": 4.0, "fp8": 60.0}[kind] * np.sqrt(shape[-1])
        arrays[f"{name}_scale"] = narrowed(random.uniform(0.5, 1.5, (*shape[:2], count)) / small, dtype)
    return arrays, {name: kind if name.endswith("_codes") else dtype for name in arrays}, shapes, numbers


CODED = [
    # rows, dim, experts, top-k, hidden units, blocks of fc1 and fc2
    (1, 64, 4, 2, 32, 1, 1),
    (2, 64, 4, 2, 96, 2, 3),
    (1, 544, 2, 1, 32, 17, 1),
    (1, 32, 2, 1, 1056, 1, 33),
    (9, 96, 4, 2, 64, 3, 1),
    (12, 160, 3, 2, 96, 1, 3),
]


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    # One case for each of the other types: their programs differ in nothing but the type.
    [(case, dtype) for case in CODED for dtype in ("fp16", "fp32", "bf16") if dtype == "fp16" or case[0] == 2],
)
def test_quantized_sparse_moe(
    case: tuple[int, ...], kind: str, dtype: str, interpreter: Interpreter, random: np.random.Generator
) -> None:
    rows, top_k = case[0], case[3]
    many = rows > 8 and dtype != "fp32"
    arrays, dtypes, shapes, numbers = _coded(case, kind, dtype, random)
    got, kernels = _mixed(interpreter, "QuantizedSparseMoE", arrays, dtypes, top_k, shapes)
    wide = {name: widened(array, dtype) for name, array in arrays.items() if name not in numbers}
    wanted = reference.quantized_sparse_moe(**wide, **numbers, top_k=top_k)
    assert _far(got, wanted) < TOLERANCE[dtype]
    assert many == ("group_pairs" in kernels)


def _launched_on(
    interpreter: Interpreter, launches: Sequence[Launch], arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """``arrays`` after ``launches``, which find in them what else would be workspace."""
    named = []
    for launch in launches:
        kinds = zip(VARIANTS[launch.kernel].arguments, launch.arguments, strict=True)
        arguments = (Pointer(name) if kind.startswith("*") else number for (name, kind), number in kinds)
        named.append(replace(launch, arguments=tuple(arguments)))
    return interpreter.run(Program(tuple(named), 0), arrays)


@pytest.mark.parametrize("kind", ["", "int8", "int4", "fp8"])
def test_experts_nobody_chose_stay_inside(kind: str, interpreter: Interpreter, random: np.random.Generator) -> None:
    """TensorRT times plugins of one kernel so: the nearest expert there is computes, and nothing beyond is read."""
    rows, dim, experts, top_k, units = 3, 64, 4, 2, 32
    op = "QuantizedSparseMoE" if kind else "SparseMoE"
    arrays, dtypes, shapes, _ = _coded((rows, dim, experts, top_k, units, 1, 1), kind, "fp32", random)
    made = program(op, shapes, dtypes, {"top_k": top_k}).launches[2:]
    assert [launch.kernel.split("_fp32")[0] for launch in made] == ["decode_gate_up", "decode_down"]
    arrays |= {"weights": np.ones((rows, top_k), np.float32), "hidden": np.zeros((rows * top_k, units), np.float32)}
    arrays["y"] = np.full((rows, dim), np.nan, np.float32)
    chosen = np.array([[-1, experts], [0, experts - 1], [-(2**31), 2**31 - 1]], np.int32)
    got = _launched_on(interpreter, made, arrays | {"chosen": chosen})
    wanted = _launched_on(interpreter, made, arrays | {"chosen": np.clip(chosen, 0, experts - 1)})
    for name in ("hidden", "y"):
        assert np.isfinite(got[name]).all()
        assert (got[name] == wanted[name]).all()


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_any_logits_choose_different_experts_there_are(top_k: int, interpreter: Interpreter) -> None:
    """Kernels for many rows sort by what is chosen, and all read weights there."""
    inf, nan = np.inf, np.nan
    logits = np.array(
        [
            [nan, nan, nan, nan, nan],
            [inf, inf, inf, inf, inf],
            [-inf, -inf, -inf, -inf, -inf],
            [nan, inf, -inf, nan, 0.0],
            [-inf, nan, -inf, 1.0, nan],
            [0.0, -0.0, 3e38, -3e38, 1e-45],
        ],
        np.float32,
    )
    rows, experts = logits.shape
    shapes = {"x": (rows, 8), "router": (experts, 8), "router_bias": (experts,)}
    shapes |= {"fc1": (experts, 16, 8), "fc2": (experts, 8, 8)}
    (launch,) = program("SparseMoE", shapes, dict.fromkeys(shapes, "fp32"), {"top_k": top_k}).launches[1:2]
    for bias in ([0.0] * 5, [inf, -inf, inf, 1.0, 0.0], [nan, 3e38, -inf, -3e38, nan]):
        arrays = {"logits": logits, "router_bias": np.array(bias, np.float32)}
        arrays["chosen"] = np.full((rows, top_k), experts, np.int32)
        arrays["weights"] = np.full((rows, top_k), nan, np.float32)
        chosen = _launched_on(interpreter, [launch], arrays)["chosen"]
        assert ((chosen >= 0) & (chosen < experts)).all()
        assert all(len(set(row)) == top_k for row in chosen.tolist())


@pytest.mark.parametrize(
    ("mass", "wanted"),
    [([0.2], 1), ([0.99], 0), ([1.0] * 1500, 0), ([1.0] * 1300 + [0.5] + [1.0] * 9, 1301), ([0.1, 1.0, 0.98, 2.0], 3)],
)
def test_running_columns(mass: list[float], wanted: int, interpreter: Interpreter) -> None:
    arrays = {"halt_mass": np.array([mass], np.float32), "threshold": np.array(0.99, np.float32)}
    made = program("RunningColumns", {"halt_mass": (1, len(mass))}, {"halt_mass": "fp32"}, {})
    got = interpreter.run(made, arrays | {"count": np.array(-7, np.int32)})["count"]
    assert got == wanted


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "bf16"])
@pytest.mark.parametrize("dim", [7, 1100])
def test_output_so_far(dim: int, dtype: str, interpreter: Interpreter, random: np.random.Generator) -> None:
    mass = np.array([[0.0, 0.25, 0.989, 0.99, 1.0, np.nan]], np.float32)
    arrays = {"out": narrowed(random.standard_normal((1, 6, dim)), dtype), "halt_mass": mass}
    shapes = {name: array.shape for name, array in arrays.items()}
    made = program("OutputSoFar", shapes, {"out": dtype, "halt_mass": "fp32"}, {})
    arrays |= {"threshold": np.array(0.99, np.float32), "so_far": np.zeros_like(arrays["out"])}
    got = widened(interpreter.run(made, arrays)["so_far"], dtype)
    share = np.array([1.0, 0.25, 0.989, 1.0, 1.0, 1.0])
    assert _far(got, widened(arrays["out"], dtype) / share[:, None]) < TOLERANCE[dtype]
