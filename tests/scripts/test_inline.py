"""``inline`` and ``export --portable``: what they say, and what they refuse."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import CHECKPOINT, Ran, refused

from mythos_edge.model.bundle import open_bundle

FILES = {name: f"{name}.portable.onnx" for name in ("prelude", "step", "coda", "model", "model_with_past")}


def test_export_portable_tells_the_files(run: Callable[..., Ran], tmp_path: Path) -> None:
    output = tmp_path / "made.bundle"
    ran = run("export", CHECKPOINT, "-o", output, "--portable", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["portable"] == FILES
    assert all((output / file).is_file() for file in FILES.values())
    ran = run("inspect", output)
    assert "model.portable" in ran.out
    ran = run("inspect", output / "model.portable.onnx", "--json")
    assert set(ran.json["opsets"]) == {"ai.onnx"}


def test_a_plain_export_has_none(run: Callable[..., Ran], mla_bundle: Path) -> None:
    assert not list(mla_bundle.glob("*.portable.onnx"))
    assert set(open_bundle(mla_bundle).manifest.graphs) == set(FILES)


def test_inline_tells_the_files(run: Callable[..., Ran], rounded_bundle: Path) -> None:
    ran = run("inline", rounded_bundle, "--json")
    assert ran.code == 0, ran.err
    assert ran.json == {"bundle": str(rounded_bundle), "portable": FILES}
    ran = run("inline", rounded_bundle)
    assert "model.portable.onnx" in ran.out


def test_what_is_no_bundle_is_refused(run: Callable[..., Ran], rounded_bundle: Path, tmp_path: Path) -> None:
    refused(run("inline", tmp_path / "none"), "does not exist", "mythos-edge export")
    refused(run("inline", tmp_path), "has no manifest.json")
    refused(run("inline", rounded_bundle / "model.onnx"), "is no bundle folder")
    step = rounded_bundle / "step.onnx"
    step.write_bytes(b"\xff" * step.stat().st_size)
    before = sorted(file.name for file in rounded_bundle.iterdir())
    refused(run("inline", rounded_bundle), "step.onnx: has changed: sha256")
    assert sorted(file.name for file in rounded_bundle.iterdir()) == before


def test_without_onnx_it_says_what_to_install(
    run: Callable[..., Ran], mla_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mythos_edge.exporter.portable", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    refused(run("inline", mla_bundle), "onnx, which is not installed", "mythos-edge[export]")
