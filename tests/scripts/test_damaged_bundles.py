"""How far damage reaches: a target's own file stops that target alone, a file of the export stops everybody."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Ran, refused
from sample_bundle import tree

TARGET = "ort-cpu-int8"


@pytest.fixture(scope="module")
def built(mla_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from built import build_cpu

    path = Path(shutil.copytree(mla_bundle, tmp_path_factory.mktemp("built") / "whole.bundle"))
    build_cpu(path, "int8", block=32)
    return path


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A bundle with the target ``ort-cpu-int8``, to damage."""
    return Path(shutil.copytree(built, tmp_path / "some.bundle"))


def _flip(file: Path) -> None:
    """Changes 40 bytes near the end."""
    data = bytearray(file.read_bytes())
    data[-100:-60] = bytes(byte ^ 0xFF for byte in data[-100:-60])
    file.write_bytes(data)


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 10)


OWN_FILES = [f"step.{TARGET}.onnx", f"coda.{TARGET}.many.onnx", f"weights.{TARGET}.safetensors"]


@pytest.mark.parametrize(("damage", "found"), [(_cut, "bytes, the manifest says"), (Path.unlink, "is missing")])
@pytest.mark.parametrize("name", OWN_FILES)
def test_a_damaged_file_of_a_target_stops_that_target_alone(
    name: str, damage: Callable[[Path], None], found: str, bundle: Path, run: Callable[..., Ran]
) -> None:
    damage(bundle / name)
    assert run("inspect", bundle).code == 0
    assert run("generate", bundle, "--ids", "1", "--max-new-tokens", 1).code == 0
    for argv in (("generate", bundle, "--ids", "1", "--target", TARGET), ("validate", bundle)):
        refused(run(*argv), f"{name}: ", found, "build the target again")


def test_a_damaged_target_is_built_again_and_keeps_no_other_from_being_built(
    bundle: Path, run: Callable[..., Ran]
) -> None:
    _cut(bundle / f"step.{TARGET}.onnx")
    (bundle / f"weights.{TARGET}.safetensors").unlink()
    assert run("build", bundle, "--weights", "fp32").code == 0
    assert run("generate", bundle, "--ids", "1", "--max-new-tokens", 1, "--target", "ort-cpu-fp32").code == 0
    assert run("build", bundle, "--weights", "int8", "--block", 32).code == 0
    assert run("validate", bundle).code == 0
    assert run("generate", bundle, "--ids", "1", "--max-new-tokens", 1, "--target", TARGET).code == 0


@pytest.mark.parametrize("name", OWN_FILES)
def test_a_changed_byte_of_a_target_is_mended_by_building_it(name: str, bundle: Path, run: Callable[..., Ran]) -> None:
    _flip(bundle / name)
    refused(run("validate", bundle), f"{name}: has changed: sha256", "build the target again")


@pytest.mark.parametrize(
    "argv", [("--weights", "fp32"), ("--weights", "int8"), ("--target", "ort-cuda"), ("--target", "rtx-sm89")]
)
def test_nothing_is_built_from_damaged_weights(argv: tuple[str, ...], bundle: Path, run: Callable[..., Ran]) -> None:
    if "rtx-sm89" in argv:
        pytest.importorskip("tensorrt_rtx")
    _flip(bundle / "weights.safetensors")
    before = tree(bundle)
    refused(run("build", bundle, *argv), "weights.safetensors: has changed: sha256", "export the bundle again")
    assert tree(bundle) == before
    assert not list(bundle.glob(".*"))


def test_nothing_is_built_from_a_graph_that_is_none(bundle: Path, run: Callable[..., Ran]) -> None:
    (bundle / "step.onnx").write_bytes(b"\xff" * (bundle / "step.onnx").stat().st_size)
    refused(run("build", bundle, "--weights", "int8"), "step.onnx: has changed: sha256", "export the bundle again")


# --- a manifest that was edited -----------------------------------------------------------------------------------


def _edit(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    edit(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["config"].update(dim=m["config"]["dim"] + 1),
        lambda m: m.update(max_context=10**6),
        lambda m: m.update(dtype="fp16"),
        lambda m: m["source"].update(sha256="0" * 64),
    ],
)
def test_a_manifest_that_does_not_fit_its_export_asks_for_another(
    edit: Callable[[dict[str, Any]], object], bundle: Path, run: Callable[..., Ran]
) -> None:
    _edit(bundle, edit)
    message = "are not those of the export: export the bundle again"
    for argv in (
        ("generate", bundle, "--ids", "1"),
        ("generate", bundle, "--ids", "1", "--target", TARGET),
        ("build", bundle, "--weights", "int8"),
    ):
        refused(run(*argv), "manifest.json: config, dtype, max_context or source", message)


def test_a_manifest_without_the_weights_or_with_an_unknown_dtype_is_refused(
    bundle: Path, run: Callable[..., Ran]
) -> None:
    whole = (bundle / "manifest.json").read_bytes()
    _edit(bundle, lambda m: m.update(dtype="fp64"))
    refused(run("inspect", bundle), "manifest.json: dtype is 'fp64', expected one of fp32, fp16, bf16")
    (bundle / "manifest.json").write_bytes(whole)
    _edit(bundle, lambda m: m["files"].pop("weights.safetensors"))
    refused(run("validate", bundle), "files does not list 'weights.safetensors', which the manifest uses")


def test_a_target_that_nothing_runs_says_so(bundle: Path, run: Callable[..., Ran]) -> None:
    _edit(bundle, lambda m: m["targets"][TARGET].update(kind="other"))
    refused(
        run("generate", bundle, "--ids", "1", "--target", TARGET),
        f"target {TARGET!r} is of kind 'other', expected one of ort-cpu, ort-cuda, tensorrt: build it again",
    )


# --- what may not be read (root may read everything, so it is said by a stand-in) ------------------------------------


def _forbid(monkeypatch: pytest.MonkeyPatch, method: str, forbidden: Callable[[Path], bool]) -> None:
    original = getattr(Path, method)

    def guarded(self: Path, *arguments: Any, **options: Any) -> Any:
        if forbidden(self):
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, method, guarded)


def _forbid_opening(monkeypatch: pytest.MonkeyPatch, forbidden: Path) -> None:
    """Also by its name, as a reader with bounds opens it."""
    original = os.open

    def guarded(path: Any, *arguments: Any, **options: Any) -> int:
        if path == forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", guarded)
    _forbid(monkeypatch, "open", lambda path: path == forbidden)


@pytest.mark.parametrize(
    "argv", [("inspect",), ("generate", "--ids", "1"), ("validate",), ("build", "--weights", "int8")]
)
def test_a_folder_that_may_not_be_looked_into_is_one_line(
    argv: tuple[str, ...], bundle: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    _forbid(monkeypatch, "stat", lambda path: path.parent == bundle)
    refused(run(argv[0], bundle, *argv[1:]), f"{bundle}: cannot be read: Permission denied")


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("manifest.json", ("inspect",)),
        ("weights.safetensors", ("generate", "--ids", "1")),
        (f"weights.{TARGET}.safetensors", ("generate", "--ids", "1", "--target", TARGET)),
        (f"weights.{TARGET}.safetensors", ("validate",)),
    ],
)
def test_a_file_that_may_not_be_read_is_named(
    name: str, argv: tuple[str, ...], bundle: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    _forbid_opening(monkeypatch, bundle / name)
    refused(run(argv[0], bundle, *argv[1:]), f"{bundle / name}: cannot be read: Permission denied")
