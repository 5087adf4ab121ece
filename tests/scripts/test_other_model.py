"""``validate --against OTHER.onnx``."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import FIXTURES
from deep_runs import beside_file
from other_models import edited, in_loop, inlined, loop_of, newer, optimised, rename_all
from planted_faults import Graph

from mythos_edge.exporter import whole_model

pytestmark = pytest.mark.usefixtures("one_thread")


def _position_late(graph: Graph) -> None:
    node = graph.first("RotaryEmbedding", 1)
    node.replace_input_with(3, graph.before(node, "Add", node.inputs[3], np.int64(1)))


def _no_selection_bias(graph: Graph) -> None:
    node = graph.first("SparseMoE")
    node.replace_input_with(2, graph.before(node, "Mul", node.inputs[2], np.float32(0)))


def _lora_row(graph: Graph) -> None:
    node = graph.reader("step.lora.scale", "Gather")
    node.replace_input_with(1, graph.before(node, "Min", node.inputs[1], np.int64(0)))


def _without_e(graph: Graph) -> None:
    node = graph.reader("step.inject")
    node.replace_input_with(1, graph.before(node, "Mul", node.inputs[1], np.float32(0)))


def _lower_threshold(graph: Graph) -> None:
    node = graph.first("GreaterOrEqual", 1)
    node.replace_input_with(1, graph.before(node, "Mul", node.inputs[1], np.float32(0.5)))


def _eps(graph: Graph) -> None:
    graph.reader("layers.1.ffn_norm.weight").attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)


def _without_experts(graph: Graph) -> None:
    graph.bypass("step/observed/experts.2")


def _ends_at_once(graph: Graph) -> None:
    cond = graph.graph.outputs[0].producer()
    assert cond is not None
    cond.replace_input_with(0, graph.before(cond, "Mul", cond.inputs[0], np.int64(0)))


FAULTS = [
    ("mla-small", _position_late, "attention", 0, "rotary"),
    ("mla-small", _no_selection_bias, "router", 0, "graph"),
    ("mla-small", _lower_threshold, "halting", 0, "graph"),
    ("gqa-small", _lora_row, "lora", 1, "graph"),
    ("gqa-small", _without_e, "injection", 0, "graph"),
    ("ouro-small", _eps, "experts", 0, "graph"),
    ("ouro-small", _ends_at_once, "halting", 0, "graph"),
    ("dory-small", _without_experts, "experts", 0, "graph"),
]


@pytest.mark.parametrize("name", ["mla-small", "gqa-small", "ouro-small", "dory-small"])
def test_a_healthy_file_passes_whatever_its_values_are_called(
    exported: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    bundle = exported(FIXTURES / name)

    report = beside_file(bundle, edited(bundle, tmp_path, rename_all))

    assert report.first_divergence is None
    assert not report.missing
    assert (report.error[np.isfinite(report.error)] < 1).all()


@pytest.mark.parametrize("convert", [optimised, inlined, newer])
def test_a_healthy_file_passes_as_a_tool_has_written_it(
    exported: Callable[..., Path], tmp_path: Path, convert: Callable[[Path], Path]
) -> None:
    bundle = exported(FIXTURES / "ouro-small")

    report = beside_file(bundle, convert(edited(bundle, tmp_path)))

    assert report.first_divergence is None
    assert not [name for name in report.missing if name.startswith("step: ")]


@pytest.mark.parametrize(("name", "change", "part", "step_index", "kind"), FAULTS)
def test_a_fault_in_a_file_is_named(
    exported: Callable[..., Path],
    tmp_path: Path,
    name: str,
    change: Callable[[Graph], None],
    part: str,
    step_index: int,
    kind: str,
) -> None:
    bundle = exported(FIXTURES / name)

    first = beside_file(bundle, edited(bundle, tmp_path, in_loop(change))).first_divergence

    assert first is not None
    assert (first.part, first.step_index, first.kind) == (part, step_index, kind), first


@pytest.mark.parametrize(
    ("name", "change", "part", "step_index"),
    [("mla-small", _no_selection_bias, "router", 0), ("gqa-small", _lora_row, "lora", 1)],
)
def test_a_fault_is_named_in_a_file_without_names(
    exported: Callable[..., Path],
    tmp_path: Path,
    name: str,
    change: Callable[[Graph], None],
    part: str,
    step_index: int,
) -> None:
    bundle = exported(FIXTURES / name)

    first = beside_file(bundle, edited(bundle, tmp_path, in_loop(change), rename_all)).first_divergence

    assert first is not None
    assert (first.part, first.step_index) == (part, step_index), first


def test_a_part_that_is_gone_is_listed_as_unseen(exported: Callable[..., Path], tmp_path: Path) -> None:
    bundle = exported(FIXTURES / "dory-small")

    report = beside_file(bundle, edited(bundle, tmp_path, in_loop(_without_experts), rename_all))

    assert not report.passed
    assert "step: experts.2" in report.missing


def test_other_weights_are_named(exported: Callable[..., Path], tmp_path: Path) -> None:
    bundle = exported(FIXTURES / "ouro-small")
    file = edited(bundle, tmp_path)
    tensor = ir.load(file).graph.initializers["gate_bias"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    place = {"offset": tensor.offset, "shape": tensor.shape.numpy(), "dtype": np.float32}
    np.memmap(tmp_path / str(tensor.location), mode="r+", **place).fill(0)

    first = beside_file(bundle, file).first_divergence

    assert first is not None
    assert (first.part, first.step_index, first.kind) == ("halting", 0, "weights")
    assert first.detail.startswith("gate_bias")


def test_every_level_of_the_verb(run: Callable[..., Any], exported: Callable[..., Path], tmp_path: Path) -> None:
    bundle = exported(FIXTURES / "ouro-small")
    healthy, spoilt = edited(bundle, tmp_path / "a"), edited(bundle, tmp_path / "b", in_loop(_eps))
    page = tmp_path / "page.html"

    told = {}
    for level, file, options in (
        ("smoke", spoilt, ()),
        ("standard", healthy, ("--positions", 6)),
        ("standard", spoilt, ("--positions", 6)),
        ("deep", spoilt, ("--positions", 6, "--report", page)),
    ):
        ran = run("validate", bundle, "--against", file, "--level", level, "--json", *options)
        told[level, file] = json.loads(ran.out.splitlines()[-1])
        assert ran.code == (0 if told[level, file]["passed"] else 1)

    assert {key: values["passed"] for key, values in told.items()} == {
        ("smoke", spoilt): True,
        ("standard", healthy): True,
        ("standard", spoilt): False,
        ("deep", spoilt): False,
    }
    first = told["deep", spoilt]["first_divergence"]
    assert (first["part"], first["step_index"], first["class"]) == ("experts", 0, "graph")
    assert f"The file {spoilt}" in page.read_text()


def _elsewhere(file: Path) -> None:
    model = onnx.load(file, load_external_data=False)
    tensor = next(one for one in model.graph.initializer if one.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../weights.safetensors"
    onnx.save(model, file)


def _in_a_circle(file: Path) -> None:
    model = onnx.load(file, load_external_data=False)
    function = model.functions[0]
    node = function.node.add()
    node.op_type, node.domain = function.name, function.domain
    node.input.extend(function.input)
    node.output.extend(["again"])
    onnx.save(model, file)


def _without_functions(file: Path) -> None:
    """As the version converter of onnx leaves a file."""
    model = onnx.load(file, load_external_data=False)
    del model.functions[:]
    onnx.save(model, file)


def _doubling(file: Path) -> None:
    """Forty functions, each of which calls the one before it twice."""
    model = onnx.load(file, load_external_data=False)
    twice = [("f0", ["Identity", "Identity"]), *((f"f{i}", [f"f{i - 1}"] * 2) for i in range(1, 40))]
    for name, calls in twice:
        domains = ["" if call == "Identity" else "bomb" for call in calls]
        nodes = [
            onnx.helper.make_node(calls[0], ["x"], ["y"], domain=domains[0]),
            onnx.helper.make_node(calls[1], ["y"], ["z"], domain=domains[1]),
        ]
        opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("bomb", 1)]
        model.functions.append(onnx.helper.make_function("bomb", name, ["x"], ["z"], nodes, opsets))
    model.opset_import.append(onnx.helper.make_opsetid("bomb", 1))
    model.graph.node.append(onnx.helper.make_node("f39", ["threshold"], ["bombed"], domain="bomb"))
    onnx.save(model, file)


def _without_loop(file: Path) -> None:
    model = ir.load(file)
    loop_of(model).inputs[3].name = "nothing"
    node = loop_of(model)
    node.replace_input_with(2, node.inputs[3])
    ir.save(model, file)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_elsewhere, "lies in '../weights.safetensors', which is no file of its folder: do not trust this file"),
        (_in_a_circle, "is no sound ONNX graph"),
        (_without_functions, "calls mythos.LatentAttention, which it does not define: "),
        (_doubling, "has functions that become too many nodes: do not trust this file"),
        (_without_loop, "has 1 Loops, of which 0 carry h, out, halt_mass, depth, expected one: give a model.onnx"),
        (lambda file: file.write_bytes(b"no graph"), "not an ONNX file, or damaged"),
        (lambda file: file.unlink(), "cannot be read: No such file"),
        (lambda file: shutil.copy(file.parent / "step.onnx", file), "expected input_ids, max_depth, threshold"),
    ],
    ids=["elsewhere", "circle", "no functions", "doubling", "no loop", "no graph", "missing", "a stage"],
)
def test_a_file_that_is_no_such_model_is_refused(
    run: Callable[..., Any], exported: Callable[..., Path], tmp_path: Path, spoil: Callable[[Path], Any], said: str
) -> None:
    bundle = exported(FIXTURES / "mla-small")
    file = edited(bundle, tmp_path / "given")
    shutil.copy(bundle / "step.onnx", file.parent)
    spoil(file)

    ran = run("validate", bundle, "--against", file, "--level", "smoke")

    assert ran.code == 1
    assert said in ran.err
    assert len(ran.err.strip().splitlines()) == 1


def _endless(model: ir.Model) -> None:
    """The Loop goes on whatever its condition says, for longer than anybody waits."""
    loop = loop_of(model)
    body = loop.attributes["body"].as_graph()
    endless, always = (ir.tensor(value) for value in (np.int64(1 << 62), np.True_))
    trips, cond = (ir.node("Constant", [], {"value": value}) for value in (endless, always))
    model.graph.insert_before(loop, trips)
    body.append(cond)
    loop.replace_input_with(0, trips.outputs[0])
    body.outputs[0] = cond.outputs[0]
    trips.outputs[0].name, cond.outputs[0].name = "trips", "go_on"
    cond.outputs[0].type, cond.outputs[0].shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])


def test_a_file_that_never_ends_is_stopped(
    run: Callable[..., Any], exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = exported(FIXTURES / "ouro-small")
    monkeypatch.setattr(whole_model, "_MOST_SECONDS", 1.0)

    ran = run("validate", bundle, "--against", edited(bundle, tmp_path, _endless), "--level", "smoke")

    assert ran.code == 1
    assert "other.onnx: still ran after 1 s on 8 tokens: it may never end" in ran.err


def test_ctrl_c_ends_a_file_that_never_ends(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = exported(FIXTURES / "ouro-small")
    model = whole_model.WholeModel(edited(bundle, tmp_path, _endless))

    def interrupted(future: Future[Any], timeout: float | None = None) -> None:
        assert not future.done()
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.run(np.zeros((1, 4), np.int64), 4, 1.0)


def test_a_model_of_another_shape_is_refused(run: Callable[..., Any], exported: Callable[..., Path]) -> None:
    other = exported(FIXTURES / "mla-small") / "model.onnx"

    ran = run("validate", exported(FIXTURES / "ouro-small"), "--against", other, "--positions", 6)

    assert ran.code == 1
    assert "gives logits of shape [1, 6, 331], expected [1, 6, 288]" in ran.err
