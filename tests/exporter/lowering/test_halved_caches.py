"""Keys and values of cached rows apart: graphs that take halves give what those do that take whole rows."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from built import build_cpu
from conftest import FIXTURES

from mythos_edge.exporter.graph_writer import GraphWriter
from mythos_edge.exporter.lowering import halved_caches, ort_cpu
from mythos_edge.exporter.lowering.halved_caches import halve_caches
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.errors import UsageError
from mythos_edge.model.manifest import graph_key
from mythos_edge.model.observed import PREFIX
from mythos_edge.model.stages import STAGES
from mythos_edge.runtime.session import Session

PROMPTS = [[3], [5, 17, 200, 2, 9], list(range(1, 24))]
OLDER = "ort-cpu-fp32"


def graph_of(bundle: Path, key: str, target: str = "ort-cpu") -> ir.Graph:
    opened = open_bundle(bundle)
    return ir.load(opened.file(opened.manifest.targets[target].graphs[key])).graph


def pasts_of(graph: ir.Graph) -> list[str]:
    return [str(value.name) for value in graph.inputs if str(value.name).startswith("past")]


@pytest.fixture(scope="module", params=["dory-small", "ouro-small", "gqa-small"])
def bundle(
    request: pytest.FixtureRequest, exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle whose second target is as earlier versions made it, with whole rows."""
    path = Path(
        shutil.copytree(exported(FIXTURES / request.param), tmp_path_factory.mktemp("halves") / "halves.bundle")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort_cpu, "halve_caches", lambda model: model)
        build_cpu(path, "fp32")
    assert pasts_of(graph_of(path, "step", OLDER))[0] == "past_0"
    return path


@pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("many", [False, True])
def test_no_graph_of_grouped_attention_parts_a_cache(exported: Callable[..., Path], cache: str, many: bool) -> None:
    path = exported(FIXTURES / "dory-small")
    width = open_bundle(path).manifest.model.row_width(cache)
    for stage in STAGES:
        graph = graph_of(path, graph_key(stage, cache, many=many))
        names = [value for value in graph.inputs if str(value.name).startswith("past")]
        assert [str(value.name).partition(".")[2] for value in names] == ["keys", "values"] * (len(names) // 2)
        assert {value.shape[2] for value in names if value.shape is not None} == {width // 2}
        rows = [str(value.name) for value in graph.outputs if str(value.name).startswith("rows")]
        assert rows[:2] == ["rows_0.keys", "rows_0.values"]
        # Those of int8 are cut into codes and scales, which are not halves.
        splits = [node for node in graph.all_nodes() if node.op_type == "Split" and len(node.inputs) == 1]
        assert not any(str(node.inputs[0].name).startswith("past") for node in splits)


def test_latent_rows_stay_whole(mla_bundle: Path) -> None:
    for cache in ("fp32", "int8"):
        assert pasts_of(graph_of(mla_bundle, graph_key("step", cache)))[0] == "past_0"
    with Session.open(mla_bundle) as session:
        assert not session.backend.memory.halved


def one_cache() -> tuple[ir.Graph, GraphWriter, ir.Value]:
    past = ir.Value(name="past_0", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "context", 8]))
    graph = ir.Graph([past], [], nodes=[], opset_imports={"": 23}, name="one")
    return graph, GraphWriter(graph, "made"), past


def test_a_cache_that_is_read_whole_as_well_is_an_error() -> None:
    graph, writer, past = one_cache()
    halves = writer.add_many("Split", [past], 2, axis=2, num_outputs=2)
    graph.outputs.append(writer.add("Concat", [past, *halves], axis=2))
    with pytest.raises(AssertionError, match=r"\(Concat\): reads the whole of past_0"):
        halve_caches(ir.Model(graph, ir_version=10))


def test_nothing_to_halve_is_the_model_itself() -> None:
    graph, writer, past = one_cache()
    graph.outputs.append(writer.add("Concat", writer.add_many("Split", [past], 2, axis=1, num_outputs=2), axis=1))
    model = ir.Model(graph, ir_version=10)
    assert halve_caches(model) is model


@pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])
def test_older_targets_run_and_give_the_same(bundle: Path, cache: str) -> None:
    with Session.open(bundle, cache=cache) as session, Session.open(bundle, target=OLDER, cache=cache) as older:
        assert (session.backend.memory.halved, older.backend.memory.halved) == (True, False)
        assert session.plan(40) == older.plan(40)
        ids = [prompt + [7] * (23 - len(prompt)) for prompt in PROMPTS]
        for prefill in (0, 7, None):
            found, wanted = (one.score(ids, prefill=prefill).logits for one in (session, older))
            # A sum in another order may come to the other side of a step of int8.
            error = float(np.sqrt(np.square(found - wanted).mean()) / np.abs(wanted).max())
            assert error < (3e-6 if cache == "fp32" else 3e-3)
        if cache == "fp32":
            found_ids, wanted_ids = (
                [made.ids for made in one.generate(PROMPTS, max_new_tokens=12)] for one in (session, older)
            )
            assert found_ids == wanted_ids


@pytest.mark.parametrize("cache", ["fp32", "fp16"])
def test_sequences_go_from_older_targets_to_new_ones_and_back(bundle: Path, cache: str, tmp_path: Path) -> None:
    with Session.open(bundle, cache=cache) as session, Session.open(bundle, target=OLDER, cache=cache) as older:
        for one, other in ((session, older), (older, session)):
            one.generate(PROMPTS[1], max_new_tokens=5)
            one.save(tmp_path / "saved.npz")
            rows = np.load(tmp_path / "saved.npz")["loop_0_0.data"]
            assert rows.shape[2:] == (session.model.cache_width,)
            other.restore(tmp_path / "saved.npz")
            wanted = one.generate([], resume=True, max_new_tokens=7)
            assert other.generate([], resume=True, max_new_tokens=7).ids == wanted.ids


def test_rows_of_int8_whose_scales_lie_elsewhere_are_refused(bundle: Path, tmp_path: Path) -> None:
    with Session.open(bundle, cache="int8") as session, Session.open(bundle, target=OLDER, cache="int8") as older:
        for one, other in ((session, older), (older, session)):
            one.generate(PROMPTS[1], max_new_tokens=5)
            one.save(tmp_path / "saved.npz")
            with pytest.raises(UsageError, match=r"rows of shape .* do not fit"):
                other.restore(tmp_path / "saved.npz")
            wanted = one.generate([], resume=True, max_new_tokens=4)
            one.restore(tmp_path / "saved.npz")
            assert one.generate([], resume=True, max_new_tokens=4).ids == wanted.ids


def test_new_rows_are_not_put_together_to_be_parted(bundle: Path) -> None:
    for stage in STAGES:
        nodes = list(graph_of(bundle, stage))
        parted = [node for node in nodes if node.op_type == "Split" and str(node.inputs[0].name).startswith("rows")]
        assert parted == []


@pytest.mark.parametrize("same", [False, True])
def test_only_two_values_of_known_shape_are_the_halves(same: bool) -> None:
    graph, writer, past = one_cache()
    keys = writer.add("Neg", [past])
    values = keys if same else writer.add("Abs", [past])
    shaped = [keys] if same else [keys, values]
    rows = writer.add("Concat", [keys, values], axis=2)
    halves = [ir.Value(name=name, shape=ir.Shape([1, "context", 8])) for name in ("keys", "values")]
    assert halved_caches._joined(rows, halves) == ()
    for value in shaped:
        value.shape = past.shape
    assert halved_caches._joined(rows, halves) == (() if same else [keys, values])
    keys.name = f"{PREFIX}attention.0"
    assert halved_caches._joined(rows, halves) == ()
    assert len(graph) == (2 if same else 3)
