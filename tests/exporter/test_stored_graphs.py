"""Graphs of a stranger's bundle, whose manifest lists their right hashes: nothing is made of them, in one line."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from command_line import Ran, refused
from sample_bundle import tree

from mythos_edge.exporter.graph_difference import graph_difference, read_graph
from mythos_edge.exporter.stored_graphs import check_stored_graphs
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.errors import BundleError

Change = Callable[[onnx.ModelProto], object]


def _entries(**values: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        for entry in (entry for tensor in model.graph.initializer for entry in tensor.external_data):
            entry.value = values.get(entry.key, entry.value)

    return change


def _each(field: str, do: Callable[[Any], object]) -> Change:
    return lambda model: [do(one) for one in getattr(model.graph, field)]


CHANGES: dict[str, Change] = {
    "lies in '../outside.bin', which is no file of the bundle": _entries(location="../outside.bin"),
    "lies in '/etc/passwd', which is no file of the bundle": _entries(location="/etc/passwd"),
    "lies in 'manifest.json', which is no file of the bundle": _entries(location="manifest.json"),
    "lies at '-5' and has": _entries(offset="-5"),
    "lies at '9999999999999999999' and has": _entries(offset="9" * 19),
    "ends at byte 1": _entries(offset="1" + "0" * 17),
    "and the shape [1099511627776, 1099511627776]": _each(
        "initializer", lambda tensor: tensor.dims.__setitem__(slice(None), [2**40] * 2)
    ),
    "has 0 bytes and the shape": _entries(length="0"),
    "is no sound ONNX graph: Nodes in a graph must be topologically sorted": _each(
        "node", lambda node: node.input.__setitem__(slice(None), [node.output[0]])
    ),
    "is no sound ONNX graph: No Op registered for Nonsense": _each(
        "node", lambda node: setattr(node, "op_type", "Nonsense")
    ),
    "is no sound ONNX graph: x initializer name is not unique": _each(
        "initializer", lambda tensor: setattr(tensor, "name", "x")
    ),
    "its inputs are not those that the manifest lists": lambda model: model.graph.input.reverse(),
    "its outputs are not those that the manifest lists": lambda model: model.graph.output.reverse(),
    "do not trust this bundle": lambda model: model.ParseFromString(b"\x08\x0a"),
}


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "some.bundle"))


def _put(bundle: Path, data: bytes) -> None:
    """Puts a step graph in place with a manifest that is right about it."""
    (bundle / "step.onnx").write_bytes(data)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["step.onnx"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_a_bundle_of_ours_is_sound(golden_bundle: Path, portable_bundle: Path) -> None:
    for path in (golden_bundle, portable_bundle):
        check_stored_graphs(open_bundle(path))


@pytest.mark.parametrize("words", CHANGES)
def test_a_graph_that_is_made_up_is_refused(words: str, bundle: Path) -> None:
    model = onnx.load(bundle / "step.onnx", load_external_data=False)
    CHANGES[words](model)
    _put(bundle, model.SerializeToString())
    (bundle.parent / "outside.bin").write_bytes(bytes(1 << 20))
    with pytest.raises(BundleError) as caught:
        check_stored_graphs(open_bundle(bundle))
    assert str(caught.value).startswith(f"{bundle / 'step.onnx'}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verb", [("build", "--weights", "int8"), ("inline",)])
def test_nothing_is_made_of_a_graph_that_is_made_up(
    verb: tuple[str, ...], bundle: Path, run: Callable[..., Ran]
) -> None:
    model = onnx.load(bundle / "step.onnx", load_external_data=False)
    _entries(location="/etc/passwd")(model)
    _put(bundle, model.SerializeToString())
    before = tree(bundle)
    refused(run(verb[0], bundle, *verb[1:]), "step.onnx: the weight ", "lies in '/etc/passwd', which is no file of")
    assert tree(bundle) == before


def test_bytes_that_are_no_graph(bundle: Path, run: Callable[..., Ran]) -> None:
    _put(bundle, b"\xff" * 1000)
    refused(run("build", bundle, "--weights", "int8"), "step.onnx: not an ONNX file, or damaged")


@pytest.mark.parametrize("old", ["halt_mass_next", "MatMul"], ids=["output", "op"])
def test_names_that_are_no_text_are_told(old: str, demo_bundle: Path, tmp_path: Path) -> None:
    data = (demo_bundle / "step.onnx").read_bytes()
    assert old.encode() in data
    (tmp_path / "step.onnx").write_bytes(data.replace(old.encode(), b"\xff" + old[1:].encode()))
    with pytest.raises(BundleError, match=r"step.onnx: .* names that are no UTF-8"):
        read_graph(tmp_path / "step.onnx")


def test_a_graph_with_an_unknown_type_can_be_compared(demo_bundle: Path) -> None:
    first, second = (read_graph(demo_bundle / "step.onnx") for _ in range(2))
    second.graph.input[0].type.tensor_type.elem_type = 99
    found = graph_difference(first, second)
    assert found.inputs["h"][1] == "type 99 [batch, chunk, 64]"


@pytest.mark.parametrize("name", ["graph.onnx", "graph.json", "graph.textproto"])
def test_what_is_no_graph_is_told_whatever_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe no graph")

    with pytest.raises(BundleError, match="not an ONNX file, or damaged"):
        read_graph(tmp_path / name)
