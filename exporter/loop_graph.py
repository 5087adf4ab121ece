"""Weaves the three stage graphs into one graph in which the step is the body of an ONNX Loop.

Rules that every runtime needs, TensorRT most of all: the body never reads ``cond_in``; halted rows stay frozen, so
one trip too many changes nothing; a loop that may exit early has no scan outputs; weights belong to the outer graph.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from mythos_edge.model.config import MythosConfig
from mythos_edge.model.loop import LoopState
from mythos_edge.plugins import ops

Stages = Mapping[str, ir.Model]
_CARRIED = LoopState._fields


def loop_model(stages: Stages, config: MythosConfig) -> ir.Model:
    """``input_ids (B, S), max_depth (), threshold () -> logits (B, S, V), depth (B, S)``; no cache.

    The loop ends after ``max_depth`` steps, or as soon as every position has halted. It computes in the dtype of the
    stages, for a batch of one if they do.
    """
    outer = _Outer("model", stages)
    input_ids = outer.input("input_ids", ir.DataType.INT64, [outer.batch, "chunk"])
    max_depth = outer.input("max_depth", ir.DataType.INT64, [])
    threshold = outer.input("threshold", ir.DataType.FLOAT, [])
    window = _window(outer, input_ids, length=outer.integer(0))
    nothing = _no_past(outer, input_ids, config)

    prelude = outer.inline("prelude", {"input_ids": input_ids, **window, **_slots([nothing] * config.prelude_layers)})
    body = _Body(outer, stages["step"])
    step = body.step({"e": prelude["e"], "threshold": threshold, "past": nothing, **window})
    running = body.op("Less", [step["halt_mass_next"], threshold])
    any_running = body.op("ReduceMax", [body.op("Cast", [running], to=ir.DataType.INT64)], keepdims=0)
    goes_on = body.op("Cast", [any_running], to=ir.DataType.BOOL)
    final = body.loop(max_depth, goes_on, _initial_state(outer, prelude["e"]), scanned=[])

    coda = _coda(outer, final[1], input_ids, window, _slots([nothing] * config.coda_layers))
    outer.output("logits", coda["logits"], ir.DataType.FLOAT, [outer.batch, "chunk", config.vocab_size])
    outer.output("depth", final[3], ir.DataType.INT64, [outer.batch, "chunk"])
    return outer.model()


def loop_model_with_past(stages: Stages, config: MythosConfig) -> ir.Model:
    """``input_ids (B, S), threshold (), past (slots, B, C, W) -> logits, depth, new_rows (slots, B, S, W)``.

    Slots stand in the order prelude, loop steps, coda. Every position runs all ``max_loop_iters`` loop steps, so
    that all slots get their rows; append ``new_rows`` to ``past`` along C before the next call.
    """
    outer = _Outer("model_with_past", stages)
    slots = config.prelude_layers + config.max_loop_iters + config.coda_layers
    input_ids = outer.input("input_ids", ir.DataType.INT64, ["batch", "chunk"])
    threshold = outer.input("threshold", ir.DataType.FLOAT, [])
    past = outer.input("past", ir.DataType.FLOAT, [slots, "batch", "context", config.cache_width])
    window = _window(outer, input_ids, length=outer.op("Squeeze", [outer.sizes(past, 2, 3)]))
    fixed = [outer.op("Gather", [past, outer.integer(slot)], axis=0) for slot in range(slots)]
    coda_start = config.prelude_layers + config.max_loop_iters

    prelude = outer.inline("prelude", {"input_ids": input_ids, **window, **_slots(fixed[: config.prelude_layers])})
    body = _Body(outer, stages["step"])
    slot = body.op("Add", [body.step_index, outer.integer(config.prelude_layers)])
    step = body.step(
        {"e": prelude["e"], "threshold": threshold, "past": body.op("Gather", [past, slot], axis=0), **window}
    )
    goes_on = body.op("Identity", [outer.true])
    trips = outer.integer(config.max_loop_iters)
    final = body.loop(trips, goes_on, _initial_state(outer, prelude["e"]), scanned=[step["rows"]])

    coda = _coda(outer, final[1], input_ids, window, _slots(fixed[coda_start:]))
    front = outer.integers([0])
    new_rows = [
        *(outer.op("Unsqueeze", [prelude[f"rows_{i}"], front]) for i in range(config.prelude_layers)),
        final[4],
        *(outer.op("Unsqueeze", [coda[f"rows_{i}"], front]) for i in range(config.coda_layers)),
    ]
    outer.output("logits", coda["logits"], ir.DataType.FLOAT, ["batch", "chunk", config.vocab_size])
    outer.output("depth", final[3], ir.DataType.INT64, ["batch", "chunk"])
    joined = outer.op("Concat", new_rows, axis=0)
    outer.output("new_rows", joined, ir.DataType.FLOAT, [slots, "batch", "chunk", config.cache_width])
    return outer.model()


def _no_past(outer: "_Outer", input_ids: ir.Value, config: MythosConfig) -> ir.Value:
    """A cache of no columns; for a batch of one, of one column that nothing looks at: engines want no empty tensor."""
    if isinstance(outer.batch, int):
        return outer.zeros([outer.batch, 1, config.cache_width])
    shape = outer.op("Concat", [outer.sizes(input_ids, 0), outer.integers([0, config.cache_width])], axis=0)
    return outer.op("ConstantOfShape", [shape], value=outer.zero())


def _window(outer: "_Outer", input_ids: ir.Value, length: ir.Value) -> dict[str, ir.Value]:
    # No padding columns here: every sequence starts at column 0.
    zero = ir.tensor([0], dtype=ir.DataType.INT64)
    return {"length": length, "first": outer.op("ConstantOfShape", [outer.sizes(input_ids, 0)], value=zero)}


def _slots(values: Sequence[ir.Value]) -> dict[str, ir.Value]:
    return {f"past_{index}": value for index, value in enumerate(values)}


def _initial_state(outer: "_Outer", e: ir.Value) -> list[ir.Value]:
    rows = outer.sizes(e, 0, 2)
    no_depth = ir.tensor([0], dtype=ir.DataType.INT64)
    return [
        e,
        outer.op("ConstantOfShape", [outer.op("Shape", [e])], value=outer.zero()),
        outer.op("ConstantOfShape", [rows]),
        outer.op("ConstantOfShape", [rows], value=no_depth),
    ]


def _coda(
    outer: "_Outer",
    out: ir.Value,
    input_ids: ir.Value,
    window: dict[str, ir.Value],
    past: dict[str, ir.Value],
) -> dict[str, ir.Value]:
    chunk = outer.op("Squeeze", [outer.sizes(input_ids, 1)])
    logit_rows = outer.op("Range", [outer.integer(0), chunk, outer.integer(1)])
    return outer.inline("coda", {"out": out, "logit_rows": logit_rows, **window, **past})


class _Scope:
    """A graph being written: nodes with named results, and stage graphs copied in."""

    def __init__(self, name: str) -> None:
        self.graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": ops.OPSET, ops.DOMAIN: ops.VERSION})
        self._count = 0

    def op(self, op_type: str, inputs: Sequence[ir.Value], **attributes: object) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)  # type: ignore[arg-type]
        self._count += 1
        node.outputs[0].name = f"{self.graph.name}/{op_type.lower()}_{self._count}"
        self.graph.append(node)
        return node.outputs[0]

    def absorb(
        self, stage: str, source: ir.Graph, inputs: Mapping[str, ir.Value], home: ir.Graph
    ) -> dict[str, ir.Value]:
        """Copies ``source`` into this graph, its initializers into ``home``; returns its outputs by name."""
        copy = source.clone()
        outputs = {str(value.name): value for value in copy.outputs}
        for value in copy.inputs:
            ir.convenience.replace_all_uses_with(value, inputs[str(value.name)])
        for name, value in list(copy.initializers.items()):
            copy.initializers.pop(name)
            # Traced constants have names of their own in each stage; weights are one and the same.
            value.name = name if "." in name or name == "embed" else f"{stage}/{name}"
            known = home.initializers.get(value.name)
            if known is None:
                home.register_initializer(value)
            else:
                ir.convenience.replace_all_uses_with(value, known)
        copy.outputs.clear()
        for node in list(copy):
            copy.remove(node)
            for value in node.outputs:
                value.name = f"{stage}/{value.name}"
            node.name = f"{stage}/{node.name}"
            self.graph.append(node)
        return {name: inputs.get(name, value) for name, value in outputs.items()}


class _Outer(_Scope):
    """The main graph, owner of all weights and constants."""

    def __init__(self, name: str, stages: Stages) -> None:
        super().__init__(name)
        self._stages = stages
        self._constants: dict[str, ir.Value] = {}
        e = stages["prelude"].graph.outputs[0]
        assert e.shape is not None
        assert e.dtype is not None
        self.dtype = e.dtype
        self.batch: int | str = e.shape[0] if isinstance(e.shape[0], int) else "batch"
        self.true = self._constant("true", ir.tensor(True, dtype=ir.DataType.BOOL))

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def output(self, name: str, value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.graph.outputs.append(value)

    def integer(self, number: int) -> ir.Value:
        return self._constant(f"int_{number}", ir.tensor(number, dtype=ir.DataType.INT64))

    def integers(self, numbers: list[int]) -> ir.Value:
        name = "ints_" + "_".join(str(number) for number in numbers)
        return self._constant(name, ir.tensor(numbers, dtype=ir.DataType.INT64))

    def zero(self) -> ir.TensorProtocol:
        """What ``ConstantOfShape`` repeats, in the dtype the graph computes in."""
        return ir.tensor(np.zeros(1, self.dtype.numpy()))

    def zeros(self, shape: list[int]) -> ir.Value:
        return self._constant("zeros", ir.tensor(np.zeros(shape, self.dtype.numpy())))

    def sizes(self, value: ir.Value, start: int, end: int | None = None) -> ir.Value:
        """Sizes of the axes ``start .. end`` (one axis without ``end``) as a vector."""
        return self.op("Shape", [value], start=start, end=start + 1 if end is None else end)

    def inline(self, stage: str, inputs: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
        return self.absorb(stage, self._stages[stage].graph, inputs, self.graph)

    def model(self) -> ir.Model:
        return ir.Model(self.graph, ir_version=10)

    def _constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self._constants:
            value = ir.Value(
                name=f"const/{name}",
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                const_value=tensor,
            )
            self._constants[name] = value
            self.graph.register_initializer(value)
        return self._constants[name]


class _Body(_Scope):
    """The body of the Loop: one step over values of the outer graph."""

    def __init__(self, outer: _Outer, step: ir.Model) -> None:
        super().__init__("loop_body")
        self._outer, self._step = outer, step.graph
        self.step_index = ir.Value(name="step_index", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        self._carried: list[ir.Value] = []

    def step(self, captured: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
        """One loop step on the carried state; the body's inputs are made here."""
        sources = {str(value.name): value for value in self._step.inputs}
        outer_batch = self._outer.batch
        for name in _CARRIED:
            # A loop without early exit carries whole chunks: active rows are all rows.
            shape = [outer_batch, "chunk", *list(sources[name].shape or ())[2:]]
            self._carried.append(ir.Value(name=name, type=sources[name].type, shape=ir.Shape(shape)))
        condition = ir.Value(name="cond_in", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        self.graph.inputs.extend([self.step_index, condition, *self._carried])
        state = dict(zip(_CARRIED, self._carried, strict=True))
        # Here all rows are at the same loop step.
        rows = self._outer.sizes(captured["e"], 0, 2)
        inputs = {
            "step_index": self.op("Expand", [self.step_index, rows]),
            "min_depth": self._outer.integer(1),
            **state,
            **captured,
        }
        self._made = self.absorb("step", self._step, inputs, self._outer.graph)
        return self._made

    def loop(
        self, trips: ir.Value, goes_on: ir.Value, initial: Sequence[ir.Value], scanned: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """Closes the body and runs it: the final state, then the scanned values stacked by loop step."""
        goes_on.type, goes_on.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
        self.graph.outputs.extend([goes_on, *(self._made[f"{name}_next"] for name in _CARRIED), *scanned])
        attributes = [ir.AttrGraph("body", self.graph)]
        count = len(_CARRIED) + len(scanned)
        node = ir.Node("", "Loop", [trips, self._outer.true, *initial], attributes, num_outputs=count, name="loop")
        for value, name in zip(node.outputs, [*_CARRIED, "scanned_rows"], strict=False):
            value.name = f"final/{name}"
        self._outer.graph.append(node)
        return list(node.outputs)
