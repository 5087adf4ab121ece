"""One Reshape in the place of several: what is computed stays, and what is looked at does, too."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mythos_edge.exporter.graph_writer import GraphWriter
from mythos_edge.exporter.lowering.joined_reshapes import join_reshapes
from mythos_edge.model.observed import PREFIX


class Chain:
    """A graph of one input ``x`` (1, rows, 8), whose last value is made its output."""

    def __init__(self) -> None:
        self.x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "rows", 8]))
        self.graph = ir.Graph([self.x], [], nodes=[], opset_imports={"": 23}, name="chain")
        self.writer = GraphWriter(self.graph, "made")

    def reshaped(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        return self.writer.add("Reshape", [value, self.writer.integers(shape)])

    def joined(self, output: ir.Value) -> list[str]:
        """The ops that are left."""
        output.type = ir.TensorType(ir.DataType.FLOAT)
        self.graph.outputs.append(output)
        self.model = ir.Model(self.graph, ir_version=10)
        join_reshapes(self.model)
        RemoveUnusedNodesPass()(self.model)
        return [node.op_type for node in self.graph]

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        session = ort.InferenceSession(ir.serde.serialize_model(self.model).SerializeToString())
        (found,) = session.run(None, {"x": x})
        return np.asarray(found)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_several_become_one(rows: int) -> None:
    chain = Chain()
    flat = chain.writer.add("Flatten", [chain.x], axis=2)
    heads = chain.reshaped(chain.reshaped(flat, [1, -1, 2, 4]), [-1, 1, 4, 2])
    assert chain.joined(chain.writer.add("Neg", [heads])) == ["Reshape", "Neg"]
    x = np.arange(8 * rows, dtype=np.float32).reshape(1, rows, 8)
    assert np.array_equal(chain.run(x), -x.reshape(rows, 1, 4, 2))


def test_there_and_back_becomes_none() -> None:
    chain = Chain()
    back = chain.reshaped(chain.reshaped(chain.x, [1, -1, 2, 4]), [1, -1, 8])
    assert chain.joined(chain.writer.add("Neg", [back])) == ["Neg"]


def test_another_width_is_another_shape() -> None:
    chain = Chain()
    other = chain.reshaped(chain.x, [1, -1, 4])
    assert chain.joined(chain.writer.add("Neg", [other])) == ["Reshape", "Neg"]
    assert chain.run(np.zeros((1, 3, 8), np.float32)).shape == (1, 6, 4)


def test_an_output_and_a_value_to_be_looked_at_stay() -> None:
    chain = Chain()
    assert chain.joined(chain.reshaped(chain.x, [1, -1, 8])) == ["Reshape"]
    looked_at = Chain()
    seen = looked_at.reshaped(looked_at.x, [-1, 8])
    seen.name = f"{PREFIX}attention.0"
    assert looked_at.joined(looked_at.reshaped(seen, [1, -1, 8])) == ["Reshape", "Reshape"]


def test_a_shape_that_hangs_on_what_comes_before_stays() -> None:
    chain = Chain()
    kept = chain.reshaped(chain.reshaped(chain.x, [-1, 8]), [0, 2, 4])
    assert chain.joined(kept) == ["Reshape", "Reshape"]
    computed = Chain()
    shape = computed.writer.sizes(computed.x, 0, 3)
    flat = computed.reshaped(computed.x, [-1, 8])
    assert computed.joined(computed.writer.add("Reshape", [flat, shape])) == ["Shape", "Reshape", "Reshape"]
