"""Rounding to blocks: what the codes stand for, and that each method is at least as good as the simpler one."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mythos_edge.exporter.rounding import (
    ROW,
    Matrix,
    Rounding,
    plan_rounded,
    round_blocks,
    round_symmetrically,
    unpacked,
    write_rounded,
)
from mythos_edge.model.errors import BuildError

KINDS = [(bits, block) for bits in (4, 8) for block in (32, 64, 128)] + [(8, ROW)]


def _error(rows: np.ndarray, rounding: Rounding, weights: np.ndarray | float = 1.0) -> float:
    """Weighted squared error; only calibrated rounding is told the weights."""
    told = weights if rounding.method == "calibrated" and isinstance(weights, np.ndarray) else None
    values, scales = round_blocks(rows, rounding, told)
    return float((((unpacked(values, scales, rounding.bits, rows.shape[1]) - rows) ** 2) * weights).sum())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 9), st.integers(1, 300), st.integers(0, 99))
def test_no_value_is_further_than_half_a_code(kind: tuple[int, int], count: int, columns: int, seed: int) -> None:
    bits, block = kind
    rows = np.random.default_rng(seed).standard_normal((count, columns)).astype(np.float32)
    values, scales = round_blocks(rows, Rounding(bits, block, "rtn"))
    size = block or columns
    step = np.repeat(np.abs(scales.reshape(count, -1)), size, axis=1)[:, :columns]
    error = np.abs(unpacked(values, scales, bits, columns) - rows) / np.where(step == 0, 1, step)
    # The end of the range opposite to the largest value is one code short.
    clipped = np.abs(rows) > (2 ** (bits - 1) - 1) * step
    assert (error <= np.where(clipped, 1.001, 0.501)).all()


@pytest.mark.parametrize(("bits", "block"), KINDS)
def test_searching_and_calibrating_are_no_worse_than_the_simpler_way(
    bits: int, block: int, random: np.random.Generator
) -> None:
    rows = random.standard_t(4, (40, 256)).astype(np.float32)
    importance = random.lognormal(0, 2, 256).astype(np.float32)
    nearest, search = Rounding(bits, block, "rtn"), Rounding(bits, block, "search")
    assert _error(rows, search) <= _error(rows, nearest) * 1.001
    calibrated = Rounding(bits, block, "calibrated")
    assert _error(rows, calibrated, importance) < 0.99 * _error(rows, search, importance)


@pytest.mark.parametrize(("bits", "block"), KINDS)
@pytest.mark.parametrize("method", ["rtn", "search"])
def test_rows_of_zeros_and_single_values_are_exact(bits: int, block: int, method: str) -> None:
    rows = np.zeros((3, 70), np.float32)
    rows[1, 5], rows[2, 69] = -3.25, 1e-6
    values, scales = round_blocks(rows, Rounding(bits, block, method))
    np.testing.assert_allclose(unpacked(values, scales, bits, 70), rows, rtol=1e-6)


@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, ROW)])
def test_what_no_kernel_reads_is_refused(bits: int, block: int) -> None:
    with pytest.raises(BuildError, match="expected"):
        Rounding(bits, block, "rtn")


class _Reader:
    """Tensors by name, which says how many rows were asked for at once."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors, self.most_bytes = tensors, 0

    config = None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        piece = torch.from_numpy(self.tensors[name][start:stop])
        self.most_bytes = max(self.most_bytes, piece.nbytes)
        return piece


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 64), (8, ROW)])
def test_the_file_is_a_safetensors_file_of_the_rounded_matrices(
    bits: int, block: int, random: np.random.Generator, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    tensors = {
        "linear": random.standard_normal((50, 70)).astype(np.float32),
        "a.fc1": random.standard_normal((3, 20, 64)).astype(np.float32),
        "a.fc2": random.standard_normal((3, 64, 10)).astype(np.float32),
    }
    padding = -10 % block if block else 0
    rounding = Rounding(bits, block, "rtn")
    matrices = [
        Matrix("linear", (50, 70), 50, 70, rounding),
        Matrix("a.fc1", (3, 20, 64), 20 + 2 * padding, 64, rounding, halves=not block),
        Matrix("a.fc2", (3, 64, 10), 64, 10 + padding, rounding),
    ]
    plan = plan_rounded(matrices)
    told: list[float] = []
    write_rounded(plan, _Reader(tensors), tmp_path / "file", progress=told.append)
    assert (tmp_path / "file").stat().st_size == plan.total_bytes
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)
    stored = load_file(tmp_path / "file")
    if not block:
        tensors["a.fc1"] = np.concatenate([tensors["a.fc1"][:, 0::2], tensors["a.fc1"][:, 1::2]], axis=1)
    for name, matrix in tensors.items():
        values, scales = stored[f"{name}.q"], stored[f"{name}.scale"]
        for index, one in enumerate(matrix if matrix.ndim == 3 else [matrix]):
            own_values, own_scales = (values[index], scales[index]) if matrix.ndim == 3 else (values, scales)
            found = unpacked(own_values, own_scales, bits, one.shape[1])[: one.shape[0]]
            np.testing.assert_allclose(found, one, atol=0.6 if bits == 4 else 0.04)


def test_large_matrices_are_read_in_pieces(tmp_path: Path) -> None:
    reader = _Reader({"linear": np.zeros((9000, 2048), np.float32)})
    plan = plan_rounded([Matrix("linear", (9000, 2048), 9000, 2048, Rounding(8, ROW, "rtn"))])
    write_rounded(plan, reader, tmp_path / "file")
    assert reader.most_bytes <= 16 << 20


def test_symmetric_rounding(random: np.random.Generator) -> None:
    rows = random.standard_normal((6, 64)).astype(np.float32)
    rows[0] = 0
    rows[1] = 1e-9
    for codes, worst in ((ir.DataType.INT8, 0.01), (ir.DataType.INT4, 0.12), (ir.DataType.FLOAT8E4M3FN, 0.05)):
        for scale in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT):
            made, scales = round_symmetrically(rows, codes, scale)
            assert scales.dtype == scale.numpy()
            assert (scales.astype(np.float32) > 0).all()
            back = made.astype(np.float32) * scales.astype(np.float32)[:, None]
            assert not back[0].any()
            assert np.linalg.norm(back - rows) < worst * np.linalg.norm(rows)
            assert np.abs(made.astype(np.float32)).max() <= {"INT8": 127, "INT4": 8}.get(codes.name, 448)


def test_int4_of_a_search_is_no_worse_than_to_nearest(random: np.random.Generator) -> None:
    rows = random.standard_normal((50, 64)).astype(np.float32)
    codes, scales = round_symmetrically(rows, ir.DataType.INT4, ir.DataType.FLOAT)
    plain = np.abs(rows).max(axis=1, keepdims=True) / 7
    error = np.square(codes * scales[:, None] - rows).sum(axis=1)
    nearest = np.square(np.rint(rows / plain) * plain - rows).sum(axis=1)
    assert (error <= nearest * 1.0001).all()
    assert error.sum() < 0.9 * nearest.sum()
