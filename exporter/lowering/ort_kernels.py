"""Products and activations on ONNX Runtime's own kernels, of weights in float32 or rounded."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from mythos_edge.exporter.graph_writer import GraphWriter, shape_of

MICROSOFT = "com.microsoft"
# Int8 products of int8-rounded activations with the rounded weights; the other levels were 40 times slower.
_ACCURACY_LEVEL = 4
# What a code of an activation stands for, as a share of the row's largest.
_CODE = 1 / 127
# Of a row that must not be looked at: its weight is 0.
HIDDEN_SCORE = -3.4028234e38
# Of both kernels of fused experts.
FUSED_EXPERTS = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "normalize_routing_weights": 1,
}


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
    """Rows of activations rounded to 8 bits: a value is (code - 128) / 127 * ``largest`` of its row.

    ``codes`` uint8 (N, K), ``largest`` float32 (N, 1). A row's codes depend on that row alone, so what is computed of
    it does not depend on the rows beside it.
    """

    codes: ir.Value
    largest: ir.Value


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


def matrix_of(writer: GraphWriter, stack: ir.Value, index: int) -> ir.Value:
    """One matrix of a stack of weights, as a piece of the same file."""
    cast = stack.producer()
    stored = stack if cast is None else cast.inputs[0]
    assert stored is not None
    assert stored.const_value is not None
    matrix = writer.tensor(piece_of(stored.const_value, index), f"{stored.name}@{index}")
    return matrix if cast is None else writer.add("Cast", [matrix], to=ir.DataType.FLOAT)


def blocked_product(writer: GraphWriter, x: ir.Value, name: str, pack: Pack) -> ir.Value:
    """``x @ matrix.T`` of a matrix rounded in blocks."""
    return writer.add(
        "MatMulNBits",
        [x, writer.tensor(pack.values, f"{name}.q"), writer.tensor(pack.scales, f"{name}.scale")],
        MICROSOFT,
        K=pack.columns,
        N=pack.scales.shape.numpy()[0],
        bits=pack.bits,
        block_size=pack.block,
        accuracy_level=_ACCURACY_LEVEL,
    )


def rounded(writer: GraphWriter, x: ir.Value) -> Rounded:
    """The rows of ``x (N, K)``, which must be finite, rounded to 8 bits.

    Divided by the row's largest, all rows have one scale: QuantizeLinear with a scale for each wants three nodes more.
    """
    found = writer.add("ReduceMax", [writer.add("Abs", [x]), writer.integers([1])], keepdims=1)
    # A row of zeros has no largest to divide by.
    largest = writer.add("Max", [found, writer.number(1e-28)])
    shares = writer.add("Div", [x, largest])
    return Rounded(writer.add("QuantizeLinear", [shares, writer.number(_CODE), _middle(writer)]), largest)


def integer_product(writer: GraphWriter, x: Rounded, values: ir.Value, scales: ir.Value) -> ir.Value:
    """``x @ matrix.T`` in integers, of ``values`` int8 (N, K) with ``scales (N,)``.

    MatMulNBits computes several rows one after the other; this one uses the integer units of the processor
    (VNNI, AMX), so that up to 16 rows cost no more than one.
    """
    none = writer.constant(np.zeros(shape_of(scales)[0], np.int8))
    inputs = [x.codes, writer.number(_CODE), _middle(writer), values, scales, none]
    return writer.add("Mul", [writer.add("QGemm", inputs, MICROSOFT, transB=1), x.largest])


def _middle(writer: GraphWriter) -> ir.Value:
    """The code of 0; codes without a sign are what the integer units take."""
    return writer.constant(np.uint8(128))


def swiglu(writer: GraphWriter, both: ir.Value) -> ir.Value:
    """silu(gate) * up (N, F) of ``both (N, 2F)``, gate before up."""
    gate, up = writer.add_many("Split", [both], 2, axis=-1, num_outputs=2)
    return writer.add("Mul", [_silu(writer, gate), up])


def interleaved_swiglu(writer: GraphWriter, both: ir.Value) -> ir.Value:
    """silu(gate) * up (N, F) of ``both (N, 2F)``, in which their columns take turns."""
    to_end = np.iinfo(np.int64).max
    gate, up = (
        writer.add("Slice", [both, *(writer.integers([number]) for number in (first, to_end, 1, 2))])
        for first in (0, 1)
    )
    return writer.add("Mul", [_silu(writer, gate), up])


def _silu(writer: GraphWriter, x: ir.Value) -> ir.Value:
    # QuickGelu with alpha 1 is x * sigmoid(x); SiLU as such has no CPU kernel.
    return writer.add("QuickGelu", [x], MICROSOFT, alpha=1.0)
