"""Weaves the three stage graphs into one graph in which the step is the body of an ONNX Loop.

Rules that every runtime needs, TensorRT most of all: the body never reads ``cond_in``; halted rows stay frozen, so
one trip too many changes nothing; a loop that may exit early has no scan outputs; weights belong to the outer graph.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mythos_edge.exporter.graph_writer import GraphWriter
from mythos_edge.model.looped import LoopedModel
from mythos_edge.model.network import LoopState
from mythos_edge.plugins import ops

Stages = Mapping[str, ir.Model]
Values = dict[str, ir.Value]
_CARRIED = LoopState._fields


def loop_model(stages: Stages, looped: LoopedModel) -> ir.Model:
    """``input_ids (B, S), max_depth (), threshold () -> logits (B, S, V), depth (B, S)``; no cache.

    The loop ends after ``max_depth`` steps, or as soon as every position has halted. It computes in the dtype of the
    stages, for a batch of one if they do.
    """
    weaving = _Weaving("model", stages)
    writer = weaving.writer
    input_ids = weaving.input("input_ids", ir.DataType.INT64, [weaving.batch, "chunk"])
    max_depth = weaving.input("max_depth", ir.DataType.INT64, [])
    threshold = weaving.input("threshold", ir.DataType.FLOAT, [])
    window = _window(writer, input_ids, length=writer.integer(0))
    nothing = weaving.no_past(input_ids, looped.cache_width)

    def some_running(body: GraphWriter, step: Values) -> ir.Value:
        running = body.add("Less", [step["halt_mass_next"], threshold])
        any_running = body.add("ReduceMax", [body.add("Cast", [running], to=ir.DataType.INT64)], keepdims=0)
        return body.add("Cast", [any_running], to=ir.DataType.BOOL)

    prelude = weaving.stage("prelude", {"input_ids": input_ids, **window, **_slots([nothing] * looped.prelude_slots)})
    captured = {"e": prelude["e"], "threshold": threshold, **window}
    final = weaving.loop(max_depth, captured, lambda body, step_index: [nothing] * looped.step_slots, some_running)
    coda = weaving.coda(final["out"], input_ids, window, _slots([nothing] * looped.coda_slots))
    weaving.output("logits", coda["logits"], ir.DataType.FLOAT, [weaving.batch, "chunk", looped.vocab_size])
    weaving.output("depth", final["depth"], ir.DataType.INT64, [weaving.batch, "chunk"])
    return weaving.model()


def loop_model_with_past(stages: Stages, looped: LoopedModel) -> ir.Model:
    """``input_ids (B, S), threshold (), past (slots, B, C, W) -> logits, depth, new_rows (slots, B, S, W)``.

    Slots stand in the order prelude, loop steps (each with its inner layers), coda. Every position runs all loop steps
    of the model, so that all slots get their rows; append ``new_rows`` to ``past`` along C before the next call.
    """
    weaving = _Weaving("model_with_past", stages)
    writer = weaving.writer
    loop_slots = looped.max_depth * looped.step_slots
    slots = looped.prelude_slots + loop_slots + looped.coda_slots
    input_ids = weaving.input("input_ids", ir.DataType.INT64, ["batch", "chunk"])
    threshold = weaving.input("threshold", ir.DataType.FLOAT, [])
    past = weaving.input("past", ir.DataType.FLOAT, [slots, "batch", "context", looped.cache_width])
    window = _window(writer, input_ids, length=writer.add("Squeeze", [writer.sizes(past, 2)]))
    fixed = [writer.add("Gather", [past, writer.integer(slot)], axis=0) for slot in range(slots)]
    coda_start = looped.prelude_slots + loop_slots

    def own_past(body: GraphWriter, step_index: ir.Value) -> list[ir.Value]:
        first = step_index
        if looped.step_slots > 1:
            first = body.add("Mul", [step_index, body.integer(looped.step_slots)])
        slots = [body.integer(looped.prelude_slots + layer) for layer in range(looped.step_slots)]
        return [body.add("Gather", [past, body.add("Add", [first, slot])], axis=0) for slot in slots]

    def always(body: GraphWriter, step: Values) -> ir.Value:
        return body.add("Identity", [body.constant(True)])

    prelude = weaving.stage("prelude", {"input_ids": input_ids, **window, **_slots(fixed[: looped.prelude_slots])})
    captured = {"e": prelude["e"], "threshold": threshold, **window}
    scanned = [f"rows_{layer}" for layer in range(looped.step_slots)]
    final = weaving.loop(writer.integer(looped.max_depth), captured, own_past, always, scanned)
    coda = weaving.coda(final["out"], input_ids, window, _slots(fixed[coda_start:]))
    front = writer.integers([0])
    new_rows = [
        *(writer.add("Unsqueeze", [prelude[f"rows_{i}"], front]) for i in range(looped.prelude_slots)),
        _by_loop_step(writer, [final[name] for name in scanned]),
        *(writer.add("Unsqueeze", [coda[f"rows_{i}"], front]) for i in range(looped.coda_slots)),
    ]
    weaving.output("logits", coda["logits"], ir.DataType.FLOAT, ["batch", "chunk", looped.vocab_size])
    weaving.output("depth", final["depth"], ir.DataType.INT64, ["batch", "chunk"])
    joined = writer.add("Concat", new_rows, axis=0)
    weaving.output("new_rows", joined, ir.DataType.FLOAT, [slots, "batch", "chunk", looped.cache_width])
    return weaving.model()


def _by_loop_step(writer: GraphWriter, rows: list[ir.Value]) -> ir.Value:
    """The rows of every inner layer, each ``(loop steps, B, S, W)``, as those of all slots in their order."""
    if len(rows) == 1:
        return rows[0]
    second = writer.integers([1])
    joined = writer.add("Concat", [writer.add("Unsqueeze", [each, second]) for each in rows], axis=1)
    shape = writer.add("Concat", [writer.integers([-1]), writer.sizes(joined, 2, 5)], axis=0)
    return writer.add("Reshape", [joined, shape])


def _window(writer: GraphWriter, input_ids: ir.Value, length: ir.Value) -> Values:
    # No padding columns here: every sequence starts at column 0.
    return {"length": length, "first": _filled(writer, writer.sizes(input_ids, 0), np.zeros(1, np.int64))}


def _filled(writer: GraphWriter, shape: ir.Value, number: NDArray[Any]) -> ir.Value:
    return writer.add("ConstantOfShape", [shape], value=ir.tensor(number))


def _slots(values: Sequence[ir.Value]) -> Values:
    return {f"past_{index}": value for index, value in enumerate(values)}


class _Weaving:
    """A model being woven of ``stages``; its graph owns all weights and constants."""

    def __init__(self, name: str, stages: Stages) -> None:
        opsets = {"": ops.OPSET, ops.DOMAIN: ops.VERSION}
        self.writer = GraphWriter(ir.Graph([], [], nodes=[], name=name, opset_imports=opsets), name)
        self._stages = stages
        e = stages["prelude"].graph.outputs[0]
        assert e.shape is not None
        assert e.dtype is not None
        self._zero = np.zeros(1, e.dtype.numpy())
        self.batch: int | str = e.shape[0] if isinstance(e.shape[0], int) else "batch"

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.writer.graph.inputs.append(value)
        return value

    def output(self, name: str, value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.writer.graph.outputs.append(value)

    def model(self) -> ir.Model:
        return ir.Model(self.writer.graph, ir_version=10)

    def no_past(self, input_ids: ir.Value, width: int) -> ir.Value:
        """A cache of no columns; for a batch of one, of one that nothing looks at: engines want no empty tensor."""
        if isinstance(self.batch, int):
            return self.writer.constant(np.zeros((self.batch, 1, width), self._zero.dtype))
        sizes = [self.writer.sizes(input_ids, 0), self.writer.integers([0, width])]
        return _filled(self.writer, self.writer.add("Concat", sizes, axis=0), self._zero)

    def stage(self, name: str, inputs: Mapping[str, ir.Value]) -> Values:
        return self.writer.copy_in(self._stages[name].graph, inputs, name)

    def coda(self, out: ir.Value, input_ids: ir.Value, window: Values, past: Values) -> Values:
        logit_rows = self.writer.range_to(self.writer.sizes(input_ids, 1))
        return self.stage("coda", {"out": out, "logit_rows": logit_rows, **window, **past})

    def loop(
        self,
        trips: ir.Value,
        captured: Values,
        past: Callable[[GraphWriter, ir.Value], list[ir.Value]],
        goes_on: Callable[[GraphWriter, Values], ir.Value],
        scanned: Sequence[str] = (),
    ) -> Values:
        """Runs the loop step at most ``trips`` times: the final state, and ``scanned`` outputs stacked by loop step.

        ``past`` writes the caches of a loop step, by its index, and ``goes_on`` whether another follows it.
        """
        body, step = self.writer.subgraph("loop_body"), self._stages["step"].graph
        step_index = ir.Value(name="step_index", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        condition = ir.Value(name="cond_in", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        state = {str(value.name): self._carried(value) for value in step.inputs if value.name in _CARRIED}
        body.graph.inputs.extend([step_index, condition, *(state[name] for name in _CARRIED)])
        # Here all rows are at the same loop step.
        rows = self.writer.sizes(captured["e"], 0, 2)
        own = {"step_index": body.add("Expand", [step_index, rows]), **_slots(past(body, step_index))}
        made = body.copy_in(step, {**own, "min_depth": body.integer(1), **state, **captured}, "step")
        going = goes_on(body, made)
        going.type, going.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
        results = [*(f"{name}_next" for name in _CARRIED), *scanned]
        body.graph.outputs.extend([going, *(made[name] for name in results)])
        inputs = [trips, self.writer.constant(True), *self._initial_state(captured["e"])]
        final = self.writer.add_many("Loop", inputs, len(results), body=body.graph)
        return dict(zip([*_CARRIED, *scanned], final, strict=True))

    def _carried(self, value: ir.Value) -> ir.Value:
        # A loop without early exit carries whole chunks: active rows are all rows.
        shape = ir.Shape([self.batch, "chunk", *list(value.shape or ())[2:]])
        return ir.Value(name=value.name, type=value.type, shape=shape)

    def _initial_state(self, e: ir.Value) -> list[ir.Value]:
        writer, rows = self.writer, self.writer.sizes(e, 0, 2)
        return [
            e,
            _filled(writer, writer.add("Shape", [e]), self._zero),
            writer.add("ConstantOfShape", [rows]),
            _filled(writer, rows, np.zeros(1, np.int64)),
        ]
