"""Narrow caches inside a graph: what is kept and what is read of it, against an oracle in numpy that shares no code."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mythos_edge.exporter.graph_writer import GraphWriter
from mythos_edge.exporter.lowering import narrow_caches as module
from mythos_edge.exporter.lowering.halved_caches import halve_caches
from mythos_edge.exporter.lowering.narrow_caches import narrow_caches
from mythos_edge.model.looped import LoopedModel
from mythos_edge.plugins import ops
from mythos_edge.runtime.backends.ort_session import import_onnxruntime

PARTS = ((5, 5, 5, 5), (6, 2), (3,), (8,), (2, 4, 2), (2, 4, 3, 3))
# Keys and values that are cached apart.
HALVED = ((5, 5, 5, 5), (2, 4, 3, 3))
Run = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def looped(parts: Sequence[int], attention: str) -> LoopedModel:
    return LoopedModel(10, 4, sum(parts), 0, 1, 0, 2, 0.9, attention, 4, 0, cache_parts=tuple(parts))


def stage(width: int, halves: bool) -> ir.Model:
    """A stage that keeps ``x`` and shows all that attention would see: past rows, then its own."""
    names = {"past_0": [1, "context", width], "x": [1, "chunk", width]}
    values = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(s)) for name, s in names.items()
    ]
    graph = ir.Graph(values, [], nodes=[], name="step", opset_imports={"": ops.OPSET})
    writer = GraphWriter(graph, "made")
    rows = writer.add("Mul", [values[1], writer.number(1.0)])
    rows.name, rows.type, rows.shape = "rows_0", values[1].type, values[1].shape
    parts = writer.add_many("Split", [values[0]], 2, axis=2, num_outputs=2) if halves else [values[0]]
    past = writer.add("Concat", parts, axis=2) if halves else values[0]
    seen = writer.add("Concat", [past, rows], axis=1)
    count = writer.sizes(parts[0], 1)
    for value, kind, shape in ((seen, ir.DataType.FLOAT, [1, "all", width]), (count, ir.DataType.INT64, [1])):
        value.type, value.shape = ir.TensorType(kind), ir.Shape(shape)
    graph.outputs.extend([rows, seen, count])
    return ir.Model(graph, ir_version=10)


def runner(cache: str, parts: Sequence[int], halves: bool = False) -> Run:
    """Runs such a stage with its caches in ``cache`` on kept rows and new ones: what it keeps, and what it sees.

    What the halves of a row keep is told as a whole row would keep it.
    """
    made = stage(sum(parts), halves)
    model = narrow_caches(halve_caches(made), cache, looped(parts, "grouped" if halves else "latent"))
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    ort = import_onnxruntime()
    names = [value.name for value in model.graph.outputs]
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])

    values, count = sum(parts), 0 if cache == "fp16" else len(parts)
    cuts = list(np.cumsum([values // 2, values // 2, *[count // 2] * 3]))

    def run(past: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not halves:
            kept, seen, columns = session.run(None, {"past_0": past, "x": x})
        else:
            pieces = np.split(past, cuts, axis=-1)
            of_half = [np.concatenate(pieces[place::2], axis=-1) for place in (0, 1)]
            feeds = {"past_0.keys": of_half[0], "past_0.values": of_half[1], "x": x}
            *both, seen, columns = session.run(["rows_0.keys", "rows_0.values", *names[2:]], feeds)
            apart = [np.split(rows, [values // 2, (values + count) // 2], axis=-1) for rows in both]
            kept = np.concatenate([rows for pair in zip(*apart, strict=True) for rows in pair], axis=-1)
        assert columns == [past.shape[1]]
        return kept, seen

    return run


RUN = {(parts, halves): runner("int8", parts, halves) for parts in PARTS for halves in {False, parts in HALVED}}


def oracle(part: np.ndarray) -> tuple[int, int]:
    """Mantissa and exponent of the scale of one part, with the bits of float64: the least that leaves codes in 127."""
    fraction, exponent = np.frexp(np.abs(part.astype(np.float64)).max() / 127)
    mantissa, exponent = int(np.ceil(fraction * 128)), int(exponent) - 7
    mantissa, exponent = (64, exponent + 1) if mantissa == 128 else (mantissa, exponent)
    return (mantissa, exponent) if mantissa and exponent >= -100 else (64, -100)


def check(run: Run, x: np.ndarray, parts: Sequence[int]) -> None:
    """Raises AssertionError unless rows ``x (S, C)`` are kept and read as they should be."""
    width = sum(parts)
    kept, seen = run(np.zeros((1, 0, width + 2 * len(parts)), np.int8), x[None])
    assert (kept.shape, kept.dtype, seen.dtype) == ((1, len(x), width + 2 * len(parts)), np.int8, np.float32)
    # A row means in later chunks what it means in its own.
    again = run(kept, x[None])[1]
    np.testing.assert_array_equal(again[:, : len(x)], seen)
    codes, mantissas, exponents = np.split(kept[0].astype(np.int64), [width, width + len(parts)], axis=1)
    ends = np.cumsum([0, *parts])
    for row in range(len(x)):
        for index, (start, end) in enumerate(pairwise(ends)):
            part, scale = x[row, start:end], np.ldexp(float(mantissas[row, index]), int(exponents[row, index]))
            wanted = np.ldexp(float(oracle(part)[0]), oracle(part)[1])
            assert 64 <= mantissas[row, index] <= 127
            # The next mantissa where the largest value is within a few 1e-5 of what this one holds.
            assert wanted <= scale <= wanted * (128 / 127) * (1 + 1e-9), (part, scale, wanted)
            assert np.abs(codes[row, start:end]).max() <= 127
            np.testing.assert_array_equal(codes[row, start:end], np.rint(part / np.float32(scale)))
            np.testing.assert_array_equal(seen[0, row, start:end], codes[row, start:end].astype(np.float32) * scale)
            assert np.abs(seen[0, row, start:end] - part.astype(np.float64)).max() <= scale * (0.5 + 1e-4)


VALUES = st.one_of(
    st.floats(-4, 4, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 1e-38, 3.4028235e38, -3.4028235e38, 127.0, 63.5, 1 / 3]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), parts=st.sampled_from(PARTS))
def test_rows_are_kept_as_the_oracle_says(data: st.DataObject, parts: tuple[int, ...]) -> None:
    rows = data.draw(arrays(np.float32, (data.draw(st.integers(1, 3)), sum(parts)), elements=VALUES))
    for halves in {False, parts in HALVED}:
        check(RUN[parts, halves], rows, parts)


def test_scales_of_every_size(random: np.random.Generator) -> None:
    """Every exponent, and largest values just around what a mantissa holds, where a logarithm decides."""
    parts = PARTS[0]
    tops = np.ldexp(127 * random.integers(64, 128, 40_000).astype(np.float64), random.integers(-99, 115, 40_000))
    tops = (tops * (1 + random.choice([-1e-4, -1e-5, -1e-7, 0, 1e-7, 1e-5, 1e-4], tops.shape))).astype(np.float32)
    x = (random.uniform(-1, 1, (10_000, 4, 5)) * tops.reshape(-1, 4, 1)).astype(np.float32)
    x[:, :, 2] = tops.reshape(-1, 4)
    kept, seen = RUN[parts, False](np.zeros((1, 0, 28), np.int8), x.reshape(1, -1, 20))
    assert kept[0, :, 20:24].min() == 64
    assert kept[0, :, 20:24].max() == 127
    assert np.abs(kept[0, :, :20].astype(np.int64)).max() == 127
    scale = np.ldexp(kept[0, :, 20:24].astype(np.float64), kept[0, :, 24:])[..., None]
    assert (np.abs(seen[0].reshape(x.shape) - x.astype(np.float64)) <= scale * (0.5 + 1e-4)).all()
    assert (scale[..., 0] * 127 <= np.abs(x.astype(np.float64)).max(-1) * (128 / 127 + 1 / 64) * (1 + 1e-4)).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_part_that_is_not_finite_says_so_and_spares_the_others(value: float) -> None:
    x = np.linspace(-1, 1, 20, dtype=np.float32)[None, None].repeat(2, 1)
    x[0, 0, 7] = value
    kept, seen = RUN[PARTS[0], True](np.zeros((1, 0, 28), np.int8), x)
    assert not np.isfinite(seen[0, 0, 5:10]).any()
    assert np.isfinite(np.delete(seen[0, 0], np.s_[5:10])).all()
    assert np.isfinite(seen[0, 1]).all()
    again = RUN[PARTS[0], True](kept, x)[1]
    np.testing.assert_array_equal(again[:, :2], seen)


def test_no_rows_at_all() -> None:
    for run in RUN.values():
        for cache_rows in (0, 3):
            width = next(sum(parts) for (parts, _), one in RUN.items() if one is run)
            scales = next(2 * len(parts) for (parts, _), one in RUN.items() if one is run)
            seen = run(np.full((1, cache_rows, width + scales), 64, np.int8), np.zeros((1, 1, width), np.float32))[1]
            assert seen.shape == (1, cache_rows + 1, width)


def test_float16_is_bounded_and_not_infinite() -> None:
    x = np.array([[[1e9, -1e9, 65504.0, 65519.0, 1 / 3, 0.0, -0.0, 1e-9]]], np.float32)
    for halves in (False, True):
        run = runner("fp16", (4, 4), halves)
        kept, seen = run(np.zeros((1, 0, 8), np.float16), x)
        assert kept.dtype == np.float16
        assert kept[0, 0, :4].tolist() == [65504.0, -65504.0, 65504.0, 65504.0]
        np.testing.assert_array_equal(kept, np.clip(x, -65504, 65504).astype(np.float16))
        np.testing.assert_array_equal(seen, kept.astype(np.float32))
        np.testing.assert_array_equal(run(kept, x)[1][:, :1], seen)


def test_the_scale_of_a_neighbour_is_seen(random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: values read by the scale of the next part."""
    x = (random.standard_normal((3, 4, 5)) * np.array([1, 2, 4, 8])[:, None]).astype(np.float32).reshape(3, 20)
    check(runner("int8", PARTS[0]), x, PARTS[0])
    widened = module._widened

    def shifted(writer: GraphWriter, codes: ir.Value, scales: ir.Value, run: module._Run) -> ir.Value:
        turned = writer.add("Gather", [scales, writer.integers([1, 2, 3, 0])], axis=2)
        return widened(writer, codes, turned, run)

    monkeypatch.setattr(module, "_widened", shifted)
    with pytest.raises(AssertionError):
        check(runner("int8", PARTS[0]), x, PARTS[0])
