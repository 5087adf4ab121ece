"""Writes ONNX nodes: constants by name, weights as initializers, subgraphs, products on ONNX Runtime's kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

MICROSOFT = "com.microsoft"
# Int8 products of int8-rounded activations with the rounded weights; the other levels were 40 times slower.
_ACCURACY_LEVEL = 4
# The middle of uint8 stands for 0.
_ZERO = 128


@dataclass(frozen=True)
class Pack:
    """A matrix (or a stack of matrices) rounded in blocks of ``block`` values along its rows, one scale each.

    With block 0 a row is a block: ``values`` int8 (N, K) or (E, N, K), ``scales`` (N,) or (E, N), and an expert's rows
    of gate all stand before those of up. Otherwise
    ``values`` uint8: (N, blocks, block * bits / 8), or (E, N, K * bits / 8) for stacked experts; zero is the middle of
    the range. ``scales`` float32 (N, blocks) or (E, N, blocks). ``columns`` is K, the length of a row.
    """

    bits: int
    block: int
    columns: int
    values: ir.TensorProtocol
    scales: ir.TensorProtocol


class Rounded(NamedTuple):
    """Rows of activations rounded to 8 bits, each row with a scale: a value is (code - 128) * scale.

    ``codes`` uint8 (N, K), ``scales`` float32 (N, 1). A row's codes depend on that row alone, so what is computed of
    it does not depend on the rows beside it.
    """

    codes: ir.Value
    scales: ir.Value


def sizes_of(value: ir.Value) -> list[int]:
    """The shape, with -1 for free axes."""
    assert value.shape is not None
    return [size if isinstance(size, int) else -1 for size in value.shape]


def piece_of(whole: ir.TensorProtocol, index: int) -> ir.TensorProtocol:
    """``whole[index]``, of a tensor in a file as a place in the same file."""
    if not isinstance(whole, ir.ExternalTensor):
        return ir.tensor(whole.numpy()[index])
    assert whole.offset is not None
    assert whole.length is not None
    count, *shape = whole.shape.numpy()
    length = whole.length // count
    start = whole.offset + index * length
    return ir.ExternalTensor(
        whole.location, start, length, whole.dtype, shape=ir.Shape(shape), name="", base_dir=whole.base_dir
    )


class GraphWriter:
    """Writes nodes into ``graph``, before ``anchor`` or at the end; constants and weights go to ``home``."""

    def __init__(self, graph: ir.Graph, home: ir.Graph, prefix: str, anchor: ir.Node | None = None) -> None:
        self._graph, self._home, self._prefix, self._anchor = graph, home, prefix, anchor
        self._count = 0

    def branch(self, name: str) -> "GraphWriter":
        """A writer of a new subgraph; ``closed`` gives it."""
        name = f"{self._prefix}/{name}"
        return GraphWriter(ir.Graph([], [], nodes=[], name=name), self._home, name)

    def closed(self, output: ir.Value) -> ir.Graph:
        self._graph.outputs.append(output)
        return self._graph

    def add(self, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        return self.add_many(op_type, inputs, 1, domain, **attributes)[0]

    def add_many(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        made = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
        for value in made.outputs:
            self._count += 1
            value.name = f"{self._prefix}/{op_type.lower()}_{self._count}"
        made.name = str(made.outputs[0].name)
        if self._anchor is None:
            self._graph.append(made)
        else:
            self._graph.insert_before(self._anchor, made)
        return made.outputs

    def blocked_product(self, x: ir.Value, name: str, pack: Pack) -> ir.Value:
        """``x @ matrix.T`` of a matrix rounded in blocks."""
        return self.add(
            "MatMulNBits",
            [x, self.tensor(pack.values, f"{name}.q"), self.tensor(pack.scales, f"{name}.scale")],
            MICROSOFT,
            K=pack.columns,
            N=pack.scales.shape.numpy()[0],
            bits=pack.bits,
            block_size=pack.block,
            accuracy_level=_ACCURACY_LEVEL,
        )

    def rounded(self, x: ir.Value) -> Rounded:
        """The rows of ``x (N, K)`` rounded to 8 bits."""
        last = self.integers([1])
        largest = self.add("ReduceMax", [self.add("Abs", [x]), last], keepdims=1)
        # A row of zeros has no scale of its own.
        scales = self.add("Max", [self.add("Mul", [largest, self.number(1 / 127)]), self.number(1e-30)])
        by_row = self.add("Squeeze", [scales, last])
        zero = self.constant("middle", np.array([_ZERO], np.uint8))
        zeros = self.add("Expand", [zero, self.add("Shape", [by_row])])
        return Rounded(self.add("QuantizeLinear", [x, by_row, zeros], axis=0), scales)

    def integer_product(self, x: Rounded, values: ir.Value, scales: ir.Value) -> ir.Value:
        """``x @ matrix.T`` in integers, of ``values`` int8 (N, K) with ``scales (N,)``.

        MatMulNBits computes several rows one after the other; this one uses the integer units of the processor
        (VNNI, AMX), so that up to 16 rows cost no more than one.
        """
        count = sizes_of(scales)[0]
        middle = self.constant("middle_scalar", np.array(_ZERO, np.uint8))
        none = self.constant(f"int8_zeros_{count}", np.zeros(count, np.int8))
        one = self.number(1.0)
        product = self.add("QGemm", [x.codes, one, middle, values, scales, none], MICROSOFT, transB=1)
        return self.add("Mul", [product, x.scales])

    def silu(self, x: ir.Value) -> ir.Value:
        # QuickGelu with alpha 1 is x * sigmoid(x); SiLU as such has no CPU kernel.
        return self.add("QuickGelu", [x], MICROSOFT, alpha=1.0)

    def swiglu(self, both: ir.Value) -> ir.Value:
        """silu(gate) * up (N, F) of ``both (N, 2F)``, gate before up."""
        gate, up = self.add_many("Split", [both], 2, axis=-1, num_outputs=2)
        return self.add("Mul", [self.silu(gate), up])

    def interleaved_swiglu(self, both: ir.Value) -> ir.Value:
        """silu(gate) * up (N, F) of ``both (N, 2F)``, in which their columns take turns."""
        gate, up = (self._every_second(both, first) for first in (0, 1))
        return self.add("Mul", [self.silu(gate), up])

    def _every_second(self, x: ir.Value, first: int) -> ir.Value:
        """Columns ``first``, ``first + 2``, ... of ``x (N, 2F)``."""
        to_end = np.iinfo(np.int64).max
        bounds = [self.integers([number]) for number in (first, to_end, 1, 2)]
        return self.add("Slice", [x, *bounds])

    def matrix_of(self, stack: ir.Value, index: int) -> ir.Value:
        """One matrix of a stack of weights, as a piece of the same file."""
        cast = stack.producer()
        stored = stack if cast is None else cast.inputs[0]
        assert stored is not None
        assert stored.const_value is not None
        name = f"{stored.name}@{index}"
        matrix = self.tensor(piece_of(stored.const_value, index), name)
        return matrix if cast is None else self.add("Cast", [matrix], to=ir.DataType.FLOAT)

    def tensor(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """``tensor`` as an initializer of the main graph, one for each name."""
        if name not in self._home.initializers:
            shape = ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
            self._home.register_initializer(value)
        return self._home.initializers[name]

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        return self.tensor(ir.tensor(array, name=f"const/{name}"), f"const/{name}")

    def integer(self, number: int) -> ir.Value:
        return self.constant(f"int_{number}", np.array(number))

    def integers(self, numbers: list[int]) -> ir.Value:
        return self.constant("ints_" + "_".join(map(str, numbers)), np.array(numbers))

    def number(self, number: float) -> ir.Value:
        return self.constant(f"float_{number}", np.array(number, np.float32))
