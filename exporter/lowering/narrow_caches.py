"""A lowered stage whose cached rows are float16, or int8 with a scale for each of their parts.

``narrow_caches``  requires a lowered stage in float32; ensures that past and new rows, or the halves of both that
                   ``halved_caches`` makes, come and go narrow

A new row is narrowed where it leaves the graph, and what the narrowed row says is what attention sees in the same call.
So a row means the same in its own chunk as in every later one, however a prompt is cut.

An int8 row is its codes, then an int8 mantissa for each part, then an int8 exponent for each: code * mantissa *
2^exponent. Mantissas are 64 to 127, and rounded up, so that no code is beyond 127. Values of a part that are too small
for the least scale are 0; a part with a value that is not finite says so when it is read. float16 rows are bounded by
the largest float16.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
import onnx_ir as ir

from mythos_edge.exporter.graph_checks import graph_pass, one_sequence
from mythos_edge.exporter.graph_writer import GraphWriter
from mythos_edge.model.looped import LoopedModel
from mythos_edge.model.stages import HALVES, half_of

_MOST_FLOAT16 = 65504.0
_MOST_CODE = 127
_LEAST_MANTISSA = 64
# Exponents of scales. 2^116 would need a part beyond float32; 127 marks a part that is not finite.
_LEAST_EXPONENT, _MOST_EXPONENT, _NOT_FINITE = -100, 115, 127
# A logarithm is off by less than a few 1e-5 in this range. So much is added to it, so that no mantissa is above 127:
# it may then be 63.4976 before it is rounded up, which is 64.
_MARGIN = 3e-5


class _Run(NamedTuple):
    """So many ``parts`` of ``width`` values, one after the other."""

    parts: int
    width: int

    @property
    def values(self) -> int:
        return self.parts * self.width


class _Form(Protocol):
    """A way to keep rows of values narrow."""

    dtype: ir.DataType
    scales: int  # values that a kept row has beside its own

    def narrow(self, writer: GraphWriter, rows: ir.Value) -> ir.Value:
        """Rows (1, S, width) as they are kept, of float32 (1, S, C)."""
        ...

    def widen(self, writer: GraphWriter, kept: ir.Value) -> ir.Value:
        """The float32 values of rows that are kept."""
        ...


class _Float16:
    dtype = ir.DataType.FLOAT16
    scales = 0

    def narrow(self, writer: GraphWriter, rows: ir.Value) -> ir.Value:
        bounded = writer.add("Clip", [rows, writer.number(-_MOST_FLOAT16), writer.number(_MOST_FLOAT16)])
        return writer.add("Cast", [bounded], to=ir.DataType.FLOAT16)

    def widen(self, writer: GraphWriter, kept: ir.Value) -> ir.Value:
        return writer.add("Cast", [kept], to=ir.DataType.FLOAT)


class _Int8:
    dtype = ir.DataType.INT8

    def __init__(self, parts: Sequence[int]) -> None:
        self._parts, self.scales = parts, 2 * len(parts)

    def narrow(self, writer: GraphWriter, rows: ir.Value) -> ir.Value:
        runs = _runs(self._parts)
        by_run = _cut(writer, rows, [run.values for run in runs])
        apart = [_by_part(writer, values, run) for values, run in zip(by_run, runs, strict=True)]
        largest = _joined(writer, [_largest(writer, values) for values in apart])
        finite, mantissa, exponent, scales = _scale_of(writer, largest)
        counts = [run.parts for run in runs]
        per_run = zip(apart, _cut(writer, scales, counts), _cut(writer, finite, counts), runs, strict=True)
        codes = [_codes(writer, *one) for one in per_run]
        ends = [writer.add("Cast", [value], to=ir.DataType.INT8) for value in (mantissa, exponent)]
        return writer.add("Concat", [*codes, *ends], axis=2)

    def widen(self, writer: GraphWriter, kept: ir.Value) -> ir.Value:
        runs, count = _runs(self._parts), len(self._parts)
        *codes, mantissa, exponent = _cut(writer, kept, [*(run.values for run in runs), count, count])
        scales = writer.add(
            "Mul", [writer.add("Cast", [mantissa], to=ir.DataType.FLOAT), _power(writer, _as_index(writer, exponent))]
        )
        by_run = _cut(writer, scales, [run.parts for run in runs])
        return _joined(writer, [_widened(writer, *one) for one in zip(codes, by_run, runs, strict=True)])


@graph_pass(requires=[one_sequence])
def narrow_caches(model: ir.Model, cache: str, looped: LoopedModel) -> ir.Model:
    """A copy of a lowered stage, of one sequence or of several, that keeps cached rows in ``cache``: fp16 or int8."""
    made = model.clone()
    graph = made.graph
    for value in [value for value in graph.inputs if str(value.name).startswith("past_")]:
        _keep_narrow(graph, value, _form_of(value, cache, looped))
    for index, value in enumerate(graph.outputs):
        if str(value.name).startswith("rows_"):
            _leave_narrow(graph, index, _form_of(value, cache, looped))
    graph.name = f"{model.graph.name}, caches in {cache}"
    return made


def _form_of(rows: ir.Value, cache: str, looped: LoopedModel) -> _Form:
    """The form of cached rows, or of the half of them that ``rows`` is."""
    if cache == "fp16":
        return _Float16()
    half = half_of(str(rows.name))[1]
    return _Int8(looped.halves[HALVES.index(half)] if half else looped.parts)


def _kept_like(rows: ir.Value, form: _Form) -> tuple[ir.TensorType, ir.Shape]:
    """Type and shape of ``rows`` as they are kept."""
    assert rows.shape is not None
    *sizes, width = rows.shape
    assert isinstance(width, int)
    return ir.TensorType(form.dtype), ir.Shape([*sizes, width + form.scales])


def _keep_narrow(graph: ir.Graph, past: ir.Value, form: _Form) -> None:
    """Makes an input narrow, and widens it in each branch that reads its values, so that only one taken does it."""
    kind, shape = _kept_like(past, form)
    kept = ir.Value(name=past.name, type=kind, shape=shape)
    graph.inputs[graph.inputs.index(past)] = kept
    past.name = f"{kept.name}/wide"
    readers: dict[ir.Graph, list[tuple[ir.Node, int]]] = defaultdict(list)
    for node, index in list(past.uses()):
        if node.op_type == "Shape":
            # The number of columns, which is the same.
            node.replace_input_with(index, kept)
        else:
            assert isinstance(node.graph, ir.Graph)
            readers[node.graph].append((node, index))
    for number, (branch, nodes) in enumerate(readers.items()):
        places = {node: place for place, node in enumerate(branch)}
        first = min((node for node, _ in nodes), key=places.__getitem__)
        wide = form.widen(GraphWriter(branch, f"{past.name}_{number}", graph, first), kept)
        for node, index in nodes:
            node.replace_input_with(index, wide)


def _leave_narrow(graph: ir.Graph, index: int, form: _Form) -> None:
    """Makes an output narrow, and what it says the rows that all other nodes read."""
    rows = graph.outputs[index]
    producer = rows.producer()
    assert producer is not None
    nodes = list(graph)
    following = nodes.index(producer) + 1
    readers = list(rows.uses())
    name, rows.name = rows.name, f"{rows.name}/wide"
    writer = GraphWriter(graph, f"{name}/kept", graph, nodes[following] if following < len(nodes) else None)
    kept = form.narrow(writer, rows)
    kept.name, (kept.type, kept.shape) = name, _kept_like(rows, form)
    graph.outputs[index] = kept
    if readers:
        wide = form.widen(writer, kept)
        wide.type, wide.shape = rows.type, rows.shape
        for node, place in readers:
            node.replace_input_with(place, wide)


def _runs(parts: Sequence[int]) -> list[_Run]:
    """Equal parts that follow one another, together."""
    return [_Run(len(list(same)), width) for width, same in groupby(parts)]


def _cut(writer: GraphWriter, value: ir.Value, widths: Sequence[int]) -> Sequence[ir.Value]:
    """``value (1, S, sum of widths)`` cut along its last axis."""
    if len(widths) == 1:
        return [value]
    return writer.add_many("Split", [value, writer.integers(widths)], len(widths), axis=2)


def _joined(writer: GraphWriter, values: Sequence[ir.Value]) -> ir.Value:
    return values[0] if len(values) == 1 else writer.add("Concat", values, axis=2)


def _by_part(writer: GraphWriter, values: ir.Value, run: _Run) -> ir.Value:
    """``values (1, S, parts * width)`` as (1, S, parts, width)."""
    # 0 keeps the number of rows, which may be 0 itself.
    return writer.add("Reshape", [values, writer.integers([1, 0, *run])])


def _as_row(writer: GraphWriter, values: ir.Value, run: _Run) -> ir.Value:
    return writer.add("Reshape", [values, writer.integers([1, 0, run.values])])


def _per_part(writer: GraphWriter, value: ir.Value) -> ir.Value:
    """A number for each part, (1, S, parts), beside its values."""
    return writer.add("Unsqueeze", [value, writer.integers([3])])


def _largest(writer: GraphWriter, apart: ir.Value) -> ir.Value:
    """The largest size (1, S, parts) of a value of each part; infinite where one is not finite."""
    sizes = writer.add("Abs", [apart])
    # A largest value leaves out what is no number.
    known = writer.add("Where", [_is_finite(writer, sizes), sizes, writer.number(np.inf)])
    return writer.add("ReduceMax", [known, writer.integers([3])], keepdims=0)


def _is_finite(writer: GraphWriter, sizes: ir.Value) -> ir.Value:
    return writer.add("LessOrEqual", [sizes, writer.number(float(np.finfo(np.float32).max))])


def _scale_of(writer: GraphWriter, largest: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """Whether each part is finite, and the mantissa, exponent and value of its scale; ``largest (1, S, parts)``."""
    finite = _is_finite(writer, largest)
    # What is put in the place of others is of no account, but must be a number.
    safe = writer.add("Where", [finite, largest, writer.number(1.0)])
    # The scale before it is rounded, with a margin of one mantissa: 64 * 2^e up to below 128 * 2^e.
    margin = (_MOST_CODE + 1) / _MOST_CODE / _MOST_CODE * (1 + _MARGIN)
    logarithm = writer.add("Log", [writer.add("Mul", [safe, writer.number(margin)])])
    in_twos = writer.add("Mul", [logarithm, writer.number(float(1 / np.log(2)))])
    octave = writer.add("Sub", [writer.add("Floor", [in_twos]), writer.number(float(np.log2(_LEAST_MANTISSA)))])
    bounds = [writer.number(float(bound)) for bound in (_LEAST_EXPONENT, _MOST_EXPONENT)]
    known = writer.add("Clip", [octave, *bounds])
    exponent = writer.add("Where", [finite, known, writer.number(float(_NOT_FINITE))])
    power = _power(writer, _as_index(writer, exponent))
    exact = writer.add("Div", [safe, writer.add("Mul", [power, writer.number(float(_MOST_CODE))])])
    mantissa = writer.add(
        "Clip", [writer.add("Ceil", [exact]), writer.number(float(_LEAST_MANTISSA)), writer.number(float(_MOST_CODE))]
    )
    return finite, mantissa, exponent, writer.add("Mul", [mantissa, power])


def _as_index(writer: GraphWriter, exponent: ir.Value) -> ir.Value:
    return writer.add("Cast", [exponent], to=ir.DataType.INT32)


def _power(writer: GraphWriter, exponent: ir.Value) -> ir.Value:
    """2 to the ``exponent`` from -128 to 127, looked up so that it is exact; negative places count from the end."""
    places = np.arange(256)
    powers = np.exp2(np.where(places < 128, places, places - 256.0)).astype(np.float32)
    return writer.add("Gather", [writer.constant(powers), exponent])


def _codes(writer: GraphWriter, apart: ir.Value, scales: ir.Value, finite: ir.Value, run: _Run) -> ir.Value:
    """The codes (1, S, parts * width) of ``apart (1, S, parts, width)``; 1 in a part that is not finite."""
    rounded = writer.add("Round", [writer.add("Div", [apart, _per_part(writer, scales)])])
    defined = writer.add("Where", [_per_part(writer, finite), rounded, writer.number(1.0)])
    return _as_row(writer, writer.add("Cast", [defined], to=ir.DataType.INT8), run)


def _widened(writer: GraphWriter, codes: ir.Value, scales: ir.Value, run: _Run) -> ir.Value:
    """Float32 values (1, S, parts * width) of codes and a scale for each part."""
    if run.parts == 1:
        return writer.add("Mul", [writer.add("Cast", [codes], to=ir.DataType.FLOAT), scales])
    values = writer.add("Cast", [_by_part(writer, codes, run)], to=ir.DataType.FLOAT)
    return _as_row(writer, writer.add("Mul", [values, _per_part(writer, scales)]), run)
