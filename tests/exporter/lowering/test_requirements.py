"""A pass refuses a model that it cannot work on, by its own name and that of what is wrong, and changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from mythos_edge.exporter import graph_checks
from mythos_edge.exporter.lowering import tensorrt_passes as trt
from mythos_edge.exporter.lowering.ort_cpu import lower_for_ort
from mythos_edge.exporter.lowering.ort_cuda import lower_for_ort_cuda
from mythos_edge.exporter.lowering.sequences import for_many_sequences, for_one_sequence
from mythos_edge.plugins import ops


@pytest.fixture(scope="module")
def step(mla_bundle: Path) -> ir.Model:
    """A stage as it was traced for portable graphs: of any batch."""
    return ir.load(mla_bundle / "step.onnx")


def _of_one_sequence(step: ir.Model) -> ir.Model:
    return for_one_sequence(step)


def _of_many_sequences(step: ir.Model) -> ir.Model:
    return for_many_sequences(for_one_sequence(step), 2)


def _of_one_batch(step: ir.Model) -> ir.Model:
    """The traced stage as one that is traced for engines."""
    made = step.clone()
    for value in made.graph.inputs:
        assert value.shape is not None
        value.shape = ir.Shape([1 if str(size) == "batch" else size for size in value.shape])
    return made


def _with_halves(step: ir.Model) -> ir.Model:
    made = step.clone()
    for node in made.graph:
        if node.op_type == "RotaryEmbedding":
            node.attributes["interleaved"] = ir.AttrInt64("interleaved", 0)
    return made


Prepare = Callable[[ir.Model], ir.Model]
REFUSED: list[tuple[Callable[..., Any], tuple[Any, ...], Prepare, str]] = [
    (for_one_sequence, (), _of_one_sequence, "length: no such input"),
    (for_many_sequences, (2,), ir.Model.clone, "positions: no such input"),
    (for_many_sequences, (2,), _of_many_sequences, "row_counts: an input"),
    (lower_for_ort, (), ir.Model.clone, "h: its batch is free"),
    (lower_for_ort_cuda, (), ir.Model.clone, "h: its batch is free"),
    (trt.for_engine, (64,), ir.Model.clone, "h: its batch is free"),
    (trt.for_engine, (64,), _of_one_sequence, "length: no such input"),
    (trt.round_weights, ("int8", set()), _of_one_batch, r"\(SparseMoE\): shared experts, which part_shared_experts"),
    (trt.attend_natively, (72,), _of_one_batch, "first: an input"),
    (trt.attend_natively, (72,), _of_one_sequence, "length: no such input"),
    (trt.rotate_by_hand, (), _with_halves, r"\(RotaryEmbedding\): pairs that do not stand side by side"),
]


@pytest.mark.parametrize(("change", "given", "prepare", "wrong"), REFUSED)
def test_a_model_that_does_not_meet_the_requirements_is_refused(
    change: Callable[..., Any],
    given: tuple[Any, ...],
    prepare: Callable[[ir.Model], ir.Model],
    wrong: str,
    step: ir.Model,
) -> None:
    model = prepare(step)
    before = ir.to_proto(model)
    with pytest.raises(AssertionError, match=rf"^{change.__name__} cannot work on .*: .*{wrong}"):
        change(model, *given)
    assert ir.to_proto(model) == before


def test_what_a_pass_leaves_undone_is_found(step: ir.Model) -> None:
    @graph_checks.graph_pass(ensures=[graph_checks.has_no(ops.SPARSE_MOE.name)])
    def lower_nothing(model: ir.Model) -> ir.Model:
        return model.clone()

    with pytest.raises(AssertionError, match=r"^lower_nothing left step wrong: .* \(SparseMoE\): a node of this kind$"):
        lower_nothing(step)


def test_nodes_of_branches_are_looked_at(step: ir.Model) -> None:
    """Lowering must reach the attention of each sequence, which is in a branch."""
    many = _of_many_sequences(step)
    assert not any(node.op_type == ops.LATENT_ATTENTION.name for node in many.graph)
    assert graph_checks.has_no(ops.LATENT_ATTENTION.name)(many)


def test_passes_that_change_the_model_are_checked_after_it() -> None:
    @graph_checks.graph_pass(ensures=[graph_checks.has_inputs("x")])
    def take_away(model: ir.Model) -> None:
        model.graph.inputs.clear()

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    model = ir.Model(ir.Graph([x], [], nodes=[], name="main", opset_imports={"": 23}), ir_version=10)
    with pytest.raises(AssertionError, match=r"^take_away left main wrong: x: no such input$"):
        take_away(model)
