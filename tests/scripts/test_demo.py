"""The demo: its sums, and the bundle that it makes once, again when damaged, and in one of several first runs."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Ran, refused

from mythos_edge.exporter import export
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.errors import ExportError
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import demo


def test_demo_add(demo_bundle: Path, run: Callable[..., Ran]) -> None:
    ran = run("demo", "add", 999999, 1, "--bundle", demo_bundle, "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    assert found["sum"] == 1000000
    assert found["correct"] is True
    # The carry must travel through all the nines.
    assert found["depths"][5] > found["depths"][0]
    runs = found["runs"]
    assert runs["exact"]["accuracy"] == runs["full"]["accuracy"] == 1.0
    assert runs["exact"]["block_calls"] < runs["full"]["block_calls"] / 2
    assert runs["fixed depth 2"]["accuracy"] < 1.0
    easy = run("demo", "--json", "add", 123456, 111111, "--bundle", demo_bundle).json
    assert easy["sum"] == 234567
    assert max(easy["depths"]) < max(found["depths"])
    shown = run("demo", "add", 999999, 1, "--bundle", demo_bundle)
    assert "\x1b" not in shown.out
    assert ["=", *"1000000"] in [line.split() for line in shown.out.splitlines()]


@pytest.fixture
def cache(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cached bundle; an export is a copy, which takes no time."""

    def copied(checkpoint: Any, path: Path, **_: Any) -> Any:
        shutil.copytree(demo_bundle, path)
        return Session.open(path).bundle

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(export, "export_bundle", copied)
    return tmp_path / "mythos-edge"


def _cached(cache: Path) -> Path:
    (bundle,) = cache.glob("carry-adder-*.bundle")
    return bundle


def test_its_bundle_is_made_once(cache: Path, run: Callable[..., Ran]) -> None:
    assert "exporting the demo model once" in run("demo", "add", 7, 8).err
    assert "exporting" not in run("demo", "add", 7, 8).err


def _change_a_byte(bundle: Path) -> None:
    weights = bytearray((bundle / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (bundle / "weights.safetensors").write_bytes(weights)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a lost file": lambda bundle: (bundle / "step.ort-cpu.onnx").unlink(),
    "a cut file": lambda bundle: (bundle / "weights.safetensors").write_bytes(b"cut"),
    "a changed byte": _change_a_byte,
    "a manifest that is none": lambda bundle: (bundle / "manifest.json").write_text("{"),
    "a lost manifest": lambda bundle: (bundle / "manifest.json").unlink(),
    "an empty folder": lambda bundle: (shutil.rmtree(bundle), bundle.mkdir()),
    "a file in its place": lambda bundle: (shutil.rmtree(bundle), bundle.write_text("x")),
    "a link to nowhere": lambda bundle: (shutil.rmtree(bundle), bundle.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_made_again(damage: str, cache: Path, run: Callable[..., Ran]) -> None:
    run("demo", "add", 7, 8)
    DAMAGES[damage](_cached(cache))
    ran = run("demo", "add", 7, 8, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["sum"] == 15
    assert "note: the cached demo bundle is damaged and is made again: " in ran.err
    assert "damaged" not in run("demo", "add", 7, 8).err


def test_several_first_runs_make_one(demo_bundle: Path, tmp_path: Path) -> None:
    """In processes of their own, of which each would export: the slow copy stands for ten seconds of tracing."""
    program = f"""
import shutil, sys, time
from pathlib import Path
from mythos_edge.exporter import export
from mythos_edge.scripts import cli
def copied(checkpoint, path, **_):
    (Path({str(tmp_path)!r}) / f"exported-{{time.monotonic_ns()}}").touch()
    time.sleep(1)
    shutil.copytree({str(demo_bundle)!r}, path)
export.export_bundle = copied
print("ready", flush=True)
sys.stdin.readline()
sys.argv = ["mythos-edge", "demo", "add", "7", "8", "--json"]
cli.entry()
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={"XDG_CACHE_HOME": str(tmp_path), "PATH": ""},
        )
        for _ in range(3)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert '"sum": 15' in out
    assert len(list(tmp_path.glob("exported-*"))) == 1


@pytest.mark.parametrize("place", ["{}/file", "/proc/nowhere", "{}/" + "n" * 300])
def test_a_cache_that_cannot_be_written_is_one_line(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", place.format(tmp_path))
    refused(run("demo", "add", 7, 8), "cannot keep the demo's bundle there", "set XDG_CACHE_HOME", "--bundle")


def test_an_export_that_fails_is_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ExportError("the disk is full")

    monkeypatch.setattr(export, "export_bundle", fails)
    ran = run("demo", "add", 7, 8)
    assert ran.code == 1
    assert ran.err.splitlines()[-1].startswith("error: the disk is full; or set XDG_CACHE_HOME")


def test_a_user_without_a_home_and_a_relative_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    refused(run("demo", "add", 7, 8), "no home folder: set XDG_CACHE_HOME")
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_told(
    demo_bundle: Path, mla_bundle: Path, text_bundle: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    for other in (mla_bundle, text_bundle):
        refused(run("demo", "add", 7, 8, "--bundle", other), "is another model", "the demo needs its own")
    assert open_bundle(demo_bundle).manifest.source.sha256 == demo._MODEL
    assert run("demo", "add", 7, 8, "--bundle", demo_bundle).err == ""
    monkeypatch.setattr(demo, "_MODEL", "0" * 64)
    ran = run("demo", "add", 7, 8, "--bundle", demo_bundle)
    assert ran.code == 0
    assert "is not of the weights that come with the demo" in ran.err
