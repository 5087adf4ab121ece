"""Activations rounded to 8 bits: each row by itself, and products of them."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from mythos_edge.exporter.graph_writer import GraphWriter
from mythos_edge.exporter.lowering.ort_kernels import MICROSOFT, integer_product, rounded

_WIDTH, _HEIGHT = 96, 24


@pytest.fixture
def weights(random: np.random.Generator) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    values = random.integers(-127, 128, (_HEIGHT, _WIDTH)).astype(np.int8)
    return values, random.uniform(0.001, 0.01, _HEIGHT).astype(np.float32)


def products(
    weights: tuple[NDArray[np.int8], NDArray[np.float32]], x: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes and product of the rows of ``x``."""
    given = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", _WIDTH]))
    graph = ir.Graph([given], [], nodes=[], opset_imports={"": 23, MICROSOFT: 1}, name="product")
    writer = GraphWriter(graph, "made")
    rows = rounded(writer, given)
    product = integer_product(writer, rows, *map(writer.constant, weights))
    for value, dtype in ((rows.codes, ir.DataType.UINT8), (product, ir.DataType.FLOAT)):
        value.type = ir.TensorType(dtype)
        graph.outputs.append(value)
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()
    codes, found = ort.InferenceSession(model).run(None, {"x": x})
    return np.asarray(codes), np.asarray(found)


def test_a_row_is_rounded_to_127_codes_of_each_sign(
    weights: tuple[NDArray[np.int8], NDArray[np.float32]], random: np.random.Generator
) -> None:
    x = (random.standard_normal((5, _WIDTH)) * 10.0 ** np.arange(-20, 5, 5)[:, None]).astype(np.float32)
    codes, found = products(weights, x)
    shares = x.astype(np.float64) / np.abs(x).max(1, keepdims=True) * 127
    assert np.abs(codes - 128.0 - shares).max() < 0.5001
    assert {int(row.max()) for row in np.abs(codes.astype(int) - 128)} == {127}
    values, scales = (one.astype(np.float64) for one in weights)
    exact = (codes - 128.0) / 127 * np.abs(x).max(1, keepdims=True) @ (values * scales[:, None]).T
    assert (np.abs(found - exact).max(1) <= 1e-5 * np.abs(exact).max(1)).all()


def test_a_row_of_zeros_gives_zeros(weights: tuple[NDArray[np.int8], NDArray[np.float32]]) -> None:
    codes, found = products(weights, np.zeros((2, _WIDTH), np.float32))
    assert (codes == 128).all()
    assert (found == 0).all()


def test_a_row_does_not_hang_on_its_neighbours(
    weights: tuple[NDArray[np.int8], NDArray[np.float32]], random: np.random.Generator
) -> None:
    x = random.standard_normal((40, _WIDTH)).astype(np.float32)
    together = products(weights, x)
    alone = [products(weights, row[None]) for row in x]
    for found, rows in zip(together, zip(*alone, strict=True), strict=True):
        assert np.array_equal(found, np.concatenate(rows))
