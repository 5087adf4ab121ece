"""Graphs of standard ops alone: what they hold, that they compute the same, and how they come into a bundle."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from built import build_cpu
from conftest import FIXTURES

from mythos_edge.exporter import portable
from mythos_edge.exporter.portable import inline_bundle
from mythos_edge.model.bundle import open_bundle, verify_hashes
from mythos_edge.model.errors import BundleError
from mythos_edge.model.families.table import config_of
from mythos_edge.runtime.backends.ort_session import ort_session
from mythos_edge.runtime.session import Session

GRAPHS = ("prelude", "step", "coda", "model", "model_with_past")


def _domains(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.domain
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _domains(attribute.g)


@pytest.mark.parametrize("name", GRAPHS)
def test_only_standard_ops_are_left(name: str, portable_bundle: Path) -> None:
    ours = onnx.load(portable_bundle / f"{name}.onnx", load_external_data=False)
    assert "mythos" in set(_domains(ours.graph))
    path = portable_bundle / f"{name}.portable.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert set(_domains(model.graph)) == {""}
    assert not model.functions
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]
    stored = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    assert {entry.value for entry in stored if entry.key == "location"} == {"weights.safetensors"}
    assert path.stat().st_size < 200_000


@pytest.mark.parametrize("name", GRAPHS)
def test_the_manifest_lists_them_with_the_same_inputs_and_outputs(name: str, portable_bundle: Path) -> None:
    bundle = open_bundle(portable_bundle)
    verify_hashes(bundle)
    graphs = bundle.manifest.graphs
    made = graphs[f"{name}.portable"]
    assert made.file == f"{name}.portable.onnx"
    assert (made.inputs, made.outputs) == (graphs[name].inputs, graphs[name].outputs)
    model = onnx.load(portable_bundle / made.file, load_external_data=False)
    assert [value.name for value in model.graph.input] == [spec.name for spec in made.inputs]
    assert [value.name for value in model.graph.output] == [spec.name for spec in made.outputs]


def _model(path: Path, vocabulary: int) -> list[np.ndarray]:
    ids = np.random.default_rng(0).integers(0, vocabulary, (2, 9))
    feeds = {"input_ids": ids, "max_depth": np.array(6), "threshold": np.array(0.9, np.float32)}
    made: list[np.ndarray] = ort_session(path).run(None, feeds)
    return made


def _same_numbers(bundle: Path) -> None:
    vocabulary = config_of(open_bundle(bundle).manifest).vocab_size
    made = [_model(bundle / f"model{form}.onnx", vocabulary) for form in ("", ".portable")]
    for one, other in zip(*made, strict=True):
        assert np.array_equal(one, other)


def test_the_portable_model_computes_the_same(portable_bundle: Path) -> None:
    _same_numbers(portable_bundle)


def test_export_portable_makes_what_inline_makes(exported: Callable[..., Path], tmp_path: Path) -> None:
    """Weights that are stored narrower, too, which the graphs widen."""
    path = exported(FIXTURES / "gqa-small", dtype="bf16", portable=True)
    _same_numbers(path)
    files = {file.name: file.read_bytes() for file in path.glob("*.portable.onnx")}
    assert set(files) == {f"{name}.portable.onnx" for name in GRAPHS}
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    inline_bundle(copy)
    assert {file.name: file.read_bytes() for file in copy.glob("*.portable.onnx")} == files
    (copy / "model.portable.onnx").write_bytes(b"x" * len(files["model.portable.onnx"]))
    with pytest.raises(BundleError, match=r"model\.portable\.onnx: has changed: .* export the bundle again"):
        inline_bundle(copy)


def test_inline_keeps_all_that_a_bundle_has_and_can_be_repeated(rounded_bundle: Path) -> None:
    before = {file.name: file.read_bytes() for file in rounded_bundle.iterdir()}
    first = inline_bundle(rounded_bundle)
    made = {file.name: file.read_bytes() for file in rounded_bundle.glob("*.portable.onnx")}
    assert len(made) == len(GRAPHS)
    after = {file.name: file.read_bytes() for file in rounded_bundle.iterdir()}
    assert after == {**before, **made, "manifest.json": after["manifest.json"]}
    again = inline_bundle(rounded_bundle)
    assert again.manifest == first.manifest == open_bundle(rounded_bundle, hashes=True).manifest
    assert {file.name: file.read_bytes() for file in rounded_bundle.iterdir()} == after
    for target in ("ort-cpu", "ort-cpu-int4"):
        with Session.open(rounded_bundle, target=target) as session:
            assert session.generate([1, 2, 3], max_new_tokens=2).ids


def test_an_interrupt_leaves_the_bundle_as_it_was(rounded_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = {file.name: file.read_bytes() for file in rounded_bundle.iterdir()}
    monkeypatch.setattr(portable, "_check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        inline_bundle(rounded_bundle)
    assert {file.name: file.read_bytes() for file in rounded_bundle.iterdir()} == before


def test_a_target_that_is_built_meanwhile_stays(
    mla_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(mla_bundle, tmp_path / "some.bundle"))
    write = portable.write_portable

    def meanwhile(*given: Any) -> Any:
        build_cpu(path, "fp32")
        return write(*given)

    monkeypatch.setattr(portable, "write_portable", meanwhile)
    inlined = inline_bundle(path).manifest
    assert "ort-cpu-fp32" in inlined.targets
    assert "model.portable" in inlined.graphs
    verify_hashes(open_bundle(path))
    assert not [file.name for file in path.iterdir() if file.name not in {*inlined.files, "manifest.json"}]


@pytest.fixture
def other_graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Inlines as another version of ONNX may: other bytes of the same meaning."""
    inlined = portable._inlined

    def told(model: onnx.ModelProto) -> onnx.ModelProto:
        made = inlined(model)
        made.doc_string = "made by another version"
        return made

    def inline(path: Path) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(portable, "_inlined", told)
            inline_bundle(path)

    return inline


def test_graphs_that_are_made_again_do_not_concern_what_is_open(
    rounded_bundle: Path, other_graphs: Callable[[Path], None]
) -> None:
    inline_bundle(rounded_bundle)
    opened = open_bundle(rounded_bundle)
    with Session.of(opened, target="ort-cpu-int4") as session:
        other_graphs(rounded_bundle)
        assert open_bundle(rounded_bundle).manifest.files != opened.manifest.files
        opened.require_unchanged("ort-cpu")
        opened.require_unchanged("ort-cpu-int4")
        assert session.generate([[1, 2, 3], [1, 2]], max_new_tokens=2)
    with Session.of(opened) as session:
        assert session.generate([1, 2, 3], max_new_tokens=2).ids


def test_of_two_that_inline_at_once_the_last_one_s_graphs_are_whole(
    rounded_bundle: Path, other_graphs: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = inline_bundle(rounded_bundle).manifest
    write = portable.write_portable

    def meanwhile(*given: Any) -> Any:
        monkeypatch.setattr(portable, "write_portable", write)
        other_graphs(rounded_bundle)
        return write(*given)

    monkeypatch.setattr(portable, "write_portable", meanwhile)
    assert inline_bundle(rounded_bundle).manifest == first
    verify_hashes(open_bundle(rounded_bundle))
    assert {file.name for file in rounded_bundle.iterdir()} == {*first.files, "manifest.json"}
