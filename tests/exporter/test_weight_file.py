"""The stream of a weights file: what safetensors reads of it, in any order of pieces, and what goes wrong."""

import errno
import hashlib
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from mythos_edge.exporter.weight_file import HashingQueue, Piece, StoredTensor, WeightFile, on_all_cores, plan_file
from mythos_edge.model.errors import BuildError, ExportError

DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8, ir.DataType.UINT8)
SHAPES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=6)


def _pieces(plan: WeightFile, arrays: dict[str, np.ndarray]) -> list[Piece]:
    """Three rows at a time, in the order of the file."""
    return [
        Piece(name, start * arrays[name][:1].nbytes, arrays[name][start : start + 3])
        for name in plan.entries
        for start in range(0, len(arrays[name]), 3)
    ]


@settings(max_examples=40, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 99))
def test_safetensors_reads_what_was_written(
    shapes: list[tuple[int, int]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    random, path = np.random.default_rng(seed), tmp_path_factory.mktemp("file") / "w"
    kinds = [DTYPES[index % len(DTYPES)] for index in range(len(shapes))]
    arrays = {
        f"t{index}": (100 * random.random(shape)).astype(kind.numpy())
        for index, (shape, kind) in enumerate(zip(shapes, kinds, strict=True))
    }
    plan = plan_file(
        StoredTensor(name, kind, array.shape) for (name, array), kind in zip(arrays.items(), kinds, strict=True)
    )
    pieces, told = _pieces(plan, arrays), list[float]()
    with HashingQueue() as hashes:
        plan.write(path, pieces, ExportError, told.append, hashes)
    content = path.read_bytes()
    assert hashes.hexdigest() == hashlib.sha256(content).hexdigest()
    assert len(content) == plan.total_bytes
    assert told == sorted(told)
    assert told[-1] == 1
    stored, placed = load(content), plan.tensors("w", path.parent)
    assert stored.keys() == placed.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(stored[name], array)
        # onnx_ir maps no empty tensor.
        if array.size:
            np.testing.assert_array_equal(placed[name].numpy(), array)
    plan.write(path, [pieces[index] for index in random.permutation(len(pieces))], ExportError)
    assert path.read_bytes() == content


def test_tensors_of_whole_lines_are_aligned() -> None:
    sizes = {"odd": (5,), "even": (64, 2), "more": (3,), "wide": (16,)}
    plan = plan_file(StoredTensor(name, ir.DataType.FLOAT, shape) for name, shape in sizes.items())
    assert list(plan.entries) == ["even", "wide", "odd", "more"]
    assert all(plan.entries[name].offset % 64 == 0 for name in ("even", "wide"))


def test_numbers_that_the_format_does_not_know_are_bytes(tmp_path: Path) -> None:
    """Graphs see the 4-bit numbers, readers of the format a vector of bytes."""
    codes = np.arange(-8, 8).reshape(2, 8)
    stored = ir.tensor(codes.astype(ml_dtypes.int4))
    plan = plan_file([StoredTensor("codes", ir.DataType.INT4, (2, 8))])
    plan.write(tmp_path / "w", [Piece("codes", 0, np.frombuffer(stored.tobytes(), np.uint8))], BuildError)
    assert load((tmp_path / "w").read_bytes())["codes"].shape == (8,)
    np.testing.assert_array_equal(plan.tensors("w", tmp_path)["codes"].numpy().astype(int), codes)


def test_a_full_disk_is_one_line_of_the_kind_that_is_asked_for(tmp_path: Path) -> None:
    plan = plan_file([StoredTensor("x", ir.DataType.UINT8, (4,))])
    with pytest.raises(BuildError, match=r"missing: cannot write w: No such file or directory$"):
        plan.write(tmp_path / "missing" / "w", [], BuildError)


def test_a_source_that_cannot_be_read_is_not_told_as_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    def pieces() -> Iterator[Piece]:
        yield Piece("x", 0, np.zeros(2, np.uint8))
        raise OSError(errno.EIO, "Input/output error", "source")

    plan = plan_file([StoredTensor("x", ir.DataType.UINT8, (4,))])
    with pytest.raises(OSError, match="Input/output error") as caught:
        plan.write(tmp_path / "w", pieces(), BuildError)
    assert caught.value.filename == "source"


def test_a_tensor_that_is_not_whole_is_an_error_of_ours(tmp_path: Path) -> None:
    plan = plan_file([StoredTensor("x", ir.DataType.UINT8, (4,))])
    with pytest.raises(AssertionError):
        plan.write(tmp_path / "w", [Piece("x", 0, np.zeros(3, np.uint8))], BuildError)


def test_only_a_few_jobs_are_begun_before_their_results_are_taken() -> None:
    begun: list[int] = []

    def jobs():  # type: ignore[no-untyped-def]
        for index in range(50):
            begun.append(index)
            yield lambda index=index: index

    results = on_all_cores(jobs())
    for expected in range(50):
        assert next(results) == expected
        assert len(begun) <= expected + 6
