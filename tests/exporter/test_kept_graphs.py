"""Graphs that are kept between exports: found again for the same model alone, and never trusted without a look."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from command_line import Ran
from conftest import FIXTURES, ROOT
from killed import at_each_step
from safetensors.torch import load_file, save_file

from mythos_edge.exporter import kept_graphs
from mythos_edge.exporter.export import export_bundle
from mythos_edge.exporter.kept_graphs import VARIABLE, Graphs, kept
from mythos_edge.model import user_cache
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.families.table import FAMILIES

GRAPHS = Graphs({"a.onnx": b"abc" * 100, "b.onnx": b""}, {"bytes": 7, "names": ["x"]})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "kept"
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


def _makes(found: list[int]) -> Callable[[], Graphs]:
    def make() -> Graphs:
        found.append(1)
        return GRAPHS

    return make


def _times_made(**depends_on: object) -> int:
    made: list[int] = []
    assert kept("stages", depends_on, _makes(made)) == GRAPHS
    return len(made)


def test_graphs_are_made_once_for_all_they_depend_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _times_made(config={"dim": 64}) == 1
    assert _times_made(config={"dim": 64}) == 0
    assert _times_made(config={"dim": 65}) == 1
    made: list[int] = []
    kept("bundle", {"config": {"dim": 64}}, _makes(made))
    assert made
    version = kept_graphs.version_of
    monkeypatch.setattr(kept_graphs, "version_of", lambda name: version(name) + ("+1" if name == "onnx" else ""))
    assert _times_made(config={"dim": 64}) == 1


def _without(*missing: str) -> Callable[[str], str]:
    """``metadata.version`` where no distribution has these names."""
    version = metadata.version

    def found(name: str) -> str:
        if name in missing:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    return found


def test_a_source_tree_keeps_graphs_and_exports(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    monkeypatch.setattr(metadata, "version", _without("mythos-edge"))
    assert [_times_made(), _times_made()] == [1, 0]
    assert run("export", FIXTURES / "gqa-small", "-o", tmp_path / "b").code == 0
    assert open_bundle(tmp_path / "b").manifest.versions["mythos-edge"] == "unknown"
    assert run("--version").out == "mythos-edge unknown\n"


def test_graphs_of_a_library_of_unknown_version_are_not_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    monkeypatch.setattr(metadata, "version", _without("onnx"))
    ran = run("export", FIXTURES / "gqa-small", "-o", tmp_path / "b")
    assert ran.code == 0
    assert "the graphs are not kept for the next export: the version of onnx is not known" in ran.err
    assert not cache.exists()


def test_a_change_of_a_family_that_lives_elsewhere_makes_them_anew(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_family.py").write_text("class Their:\n    name = 'their'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(FAMILIES, "their", import_module("their_family").Their())
    assert [_times_made(), _times_made()] == [1, 0]
    (tmp_path / "their_family.py").write_text("class Their:\n    name = 'other'\n")
    assert _times_made() == 1


def test_a_change_of_our_own_code_makes_them_anew(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "mythos_edge" / "model" / "layers.py"
    source.parent.mkdir(parents=True)
    source.write_text("A = 1\n")
    monkeypatch.setattr(kept_graphs, "__file__", str(tmp_path / "mythos_edge" / "exporter" / "kept_graphs.py"))
    assert [_times_made(), _times_made()] == [1, 0]
    source.write_text("A = 2\n")
    assert _times_made() == 1


def _truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flipped(data: bytes) -> bytes:
    return data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]


@pytest.mark.parametrize("damage", [_truncated, _flipped, lambda data: b"", lambda data: data + b"x"])
def test_a_damaged_entry_is_made_again(damage: Callable[[bytes], bytes], cache: Path) -> None:
    _times_made(dim=1)
    (entry,) = cache.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert _times_made(dim=1) == 1
    assert _times_made(dim=1) == 0


def test_an_entry_under_the_name_of_another_is_not_used(cache: Path) -> None:
    _times_made(dim=1)
    (foreign,) = cache.iterdir()
    _times_made(dim=2)
    (other,) = set(cache.iterdir()) - {foreign}
    other.write_bytes(foreign.read_bytes())
    assert _times_made(dim=2) == 1


def test_a_pipe_in_place_of_an_entry_is_not_waited_for(cache: Path) -> None:
    _times_made(dim=1)
    (entry,) = cache.iterdir()
    entry.unlink()
    os.mkfifo(entry)
    notes: list[str] = []
    assert kept("stages", {"dim": 2}, _makes([]), notes.append) == GRAPHS
    entry.unlink()
    assert _times_made(dim=1) == 1


def test_what_was_used_longest_ago_goes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = []
    for dim in range(3):
        before = set(cache.iterdir()) if cache.exists() else set()
        _times_made(dim=dim)
        (entry,) = set(cache.iterdir()) - before
        os.utime(entry, (dim, dim))
        entries.append(entry)
    leftover, foreign = cache / f".{'0' * 32}.partial-0a", cache / "mine.txt"
    for file in (leftover, foreign):
        file.write_bytes(b"x" * 10_000)
        os.utime(file, (0, 0))
    assert _times_made(dim=0) == 0, "used now, so kept longest"
    monkeypatch.setattr(kept_graphs, "_MOST_BYTES", int(3.5 * entries[0].stat().st_size))
    _times_made(dim=3)
    assert [entry.exists() for entry in entries] == [True, False, True]
    assert foreign.exists()
    assert not leftover.exists()


def test_it_can_be_switched_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    monkeypatch.chdir(cache.parent)
    assert [_times_made(), _times_made()] == [1, 1]
    assert list(cache.parent.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "kept"))
    notes: list[str] = []
    assert kept("stages", {}, _makes([]), notes.append) == GRAPHS
    assert notes == [
        f"{tmp_path / 'file' / 'kept'}: the graphs cannot be kept there for the next export: Not a directory: "
        f"set {VARIABLE} to a folder that can be written, or to off"
    ]


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in (VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(user_cache.Path, "home", no_home)
    notes: list[str] = []
    assert kept("stages", {}, _makes([]), notes.append) == GRAPHS
    assert len(notes) == 1
    assert "no home folder" in notes[0]


@pytest.mark.parametrize(
    ("platform", "variables", "folder"),
    [
        ("linux", {}, "/home/me/.cache/mythos-edge"),
        ("linux", {"XDG_CACHE_HOME": "/fast"}, "/fast/mythos-edge"),
        ("linux", {"XDG_CACHE_HOME": "not/absolute"}, "/home/me/.cache/mythos-edge"),
        ("darwin", {}, "/home/me/Library/Caches/mythos-edge"),
        ("win32", {"LOCALAPPDATA": "/me/local"}, "/me/local/mythos-edge"),
        ("win32", {}, "/home/me/AppData/Local/mythos-edge"),
    ],
)
def test_each_platform_has_its_place(
    platform: str, variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(user_cache.sys, "platform", platform)
    monkeypatch.setattr(user_cache.Path, "home", lambda: Path("/home/me"))
    assert user_cache.cache_folder() == Path(folder)


KEEP = """
from mythos_edge.exporter.kept_graphs import Graphs, kept
print(kept("stages", {}, lambda: Graphs({"a.onnx": b"abc" * 100_000}, {"bytes": 7})).facts)
"""


def test_a_process_that_is_killed_leaves_no_half_entry(cache: Path) -> None:
    cache.mkdir()
    for _ in at_each_step(KEEP, cache, "kill"):
        found = kept("stages", {}, lambda: Graphs({}, {"made": "here"}))
        assert found.facts in ({"made": "here"}, {"bytes": 7})
        for file in cache.iterdir():
            file.unlink()


def test_several_processes_may_keep_the_same(cache: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", KEEP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    for process in processes:
        said, errors = process.communicate(timeout=60)
        assert (said, errors) == ("{'bytes': 7}\n", "")
    assert len(list(cache.iterdir())) == 1
    assert kept("stages", {}, lambda: Graphs({})).facts == {"bytes": 7}


def _export(checkpoint: Path, path: Path, **options: object) -> Path:
    with open_checkpoint(checkpoint) as opened:
        return export_bundle(opened, path, **options).path  # type: ignore[arg-type]


def _assert_same_bundle(one: Path, other: Path) -> None:
    assert {file.name for file in one.iterdir()} == {file.name for file in other.iterdir()}
    for file in one.iterdir():
        if file.name == "manifest.json":
            ours, theirs = (
                [line for line in (bundle / file.name).read_text().splitlines() if '"created"' not in line]
                for bundle in (one, other)
            )
            assert ours == theirs
        else:
            assert (other / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("options", [{"dtype": "fp16", "portable": True, "max_context": 24}, {}])
def test_a_bundle_with_kept_graphs_is_the_same_bit_by_bit(
    options: dict[str, object], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    plain = _export(FIXTURES / "gqa-small", tmp_path / "plain", **options)
    monkeypatch.setenv(VARIABLE, str(cache))
    first = _export(FIXTURES / "gqa-small", tmp_path / "first", **options)
    for entry in cache.iterdir():
        # Random weights cannot be compressed.
        assert entry.stat().st_size < (first / "weights.safetensors").stat().st_size, "weights are kept"
    monkeypatch.setattr("mythos_edge.exporter.bundle_graphs.traced_stages", lambda *_: pytest.fail("traced again"))
    again = _export(FIXTURES / "gqa-small", tmp_path / "again", **options)
    _assert_same_bundle(plain, first)
    _assert_same_bundle(plain, again)


def test_a_checkpoint_with_other_weights_gets_no_graphs_of_another(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lowering leaves out a selection bias of zeros: the one thing that a graph depends on beside the config."""
    tensors = load_file(FIXTURES / "mla-small" / "model.safetensors")
    (router,) = (name for name in tensors if name.endswith("router_bias"))
    bundles = {}
    for name, value in {"zeros": 0.0, "biased": 0.5, "minus zeros": -0.0, "biased otherwise": 0.25}.items():
        shutil.copytree(FIXTURES / "mla-small", tmp_path / name)
        save_file(tensors | {router: torch.full_like(tensors[router], value)}, tmp_path / name / "model.safetensors")
        bundles[name] = _export(tmp_path / name, tmp_path / f"{name}.bundle")
    steps = {name: (bundle / "step.ort-cpu.onnx").read_bytes() for name, bundle in bundles.items()}
    assert steps["zeros"] == steps["minus zeros"] != steps["biased"] == steps["biased otherwise"]
    monkeypatch.setenv(VARIABLE, "off")
    for name in ("minus zeros", "biased otherwise"):
        _assert_same_bundle(bundles[name], _export(tmp_path / name, tmp_path / f"{name} alone.bundle"))


def test_graphs_are_made_without_a_look_at_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: set[str | None] = set()
    read = ir.ExternalTensor.numpy

    def watched(tensor: ir.ExternalTensor) -> np.ndarray:
        looked_at.add(tensor.name)
        return read(tensor)

    monkeypatch.setattr(ir.ExternalTensor, "numpy", watched)
    monkeypatch.setenv(VARIABLE, "off")
    _export(FIXTURES / "mla-small", tmp_path / "out", dtype="bf16")
    assert looked_at == {"step.block.ffn.router_bias"}


def test_an_export_that_finds_its_graphs_imports_no_tracer(demo_bundle: Path, tmp_path: Path) -> None:
    """``demo_bundle`` has been exported, so its graphs are kept; these imports would take most of the time."""
    script = (
        "import sys\nfrom mythos_edge.scripts.cli import main\n"
        f"assert main(['export', {str(ROOT / 'scripts/assets/carry_adder.pt')!r}, '-o', 'out']) == 0\n"
        "assert 'torch' in sys.modules\n"
        "assert not {'onnxscript', 'torch._dynamo'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    _assert_same_bundle(demo_bundle, tmp_path / "out")
