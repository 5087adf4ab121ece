"""The kernels that ship: made from these sources, sound, small enough, and what the table says they are."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mythos_edge.model.errors import BuildError
from mythos_edge.plugins import kernel_store
from mythos_edge.plugins.kernels.variants import VARIANTS
from mythos_edge.scripts.lab import build_kernels
from mythos_edge.scripts.lab.build_kernels import BUILT, SHARED_KIB, SOURCES, differences, source_sha256

GPUS = (75, 80, 86, 87, 89, 90, 100, 110, 120, 121)
MANIFEST = json.loads((BUILT / "manifest.json").read_text())
ALL = [(gpu, name) for gpu in GPUS for name in MANIFEST["gpus"][str(gpu)]]


def test_shipped_kernels_are_made_from_these_sources() -> None:
    assert MANIFEST["sources"] == source_sha256(), "run scripts/build_kernels"


def test_every_kernel_ships_for_every_gpu_that_can_run_it() -> None:
    assert kernel_store.compute_capabilities() == GPUS == tuple(SHARED_KIB)
    for gpu in GPUS:
        assert [*MANIFEST["gpus"][str(gpu)]] == [name for name, variant in VARIANTS.items() if gpu >= variant.oldest]
    assert [name for name in MANIFEST["gpus"]["75"] if "bf16" in name] == []


def test_the_manifest_repeats_the_table() -> None:
    for name, variant in VARIANTS.items():
        described = MANIFEST["kernels"][name]
        assert described["grid"] == list(variant.grid)
        assert described["arguments"] == [list(argument) for argument in variant.arguments]
        assert described["hidden_pointers"] == 2


def test_kernels_fit_their_gpu() -> None:
    for gpu, name in ALL:
        record = MANIFEST["gpus"][str(gpu)][name]
        assert record["shared_bytes"] <= SHARED_KIB[gpu] * 1024
        # A program gets 65536 registers at most.
        assert record["registers"] * record["threads"] <= 65536
        assert record["threads"] == VARIANTS[name].tuned(gpu).warps * 32


def test_decode_kernels_keep_everything_in_registers() -> None:
    # Turing multiplies without tensor cores; latents of 1024 take all the registers a thread can have.
    allowed = {(75, "latent_attention_fp16_256"): 224}
    allowed |= {(gpu, f"latent_attention_{dtype}_1024"): 32 for gpu in GPUS for dtype in ("fp16", "bf16")}
    spilling = {
        (gpu, name): MANIFEST["gpus"][str(gpu)][name]["spill_bytes"]
        for gpu, name in ALL
        if VARIANTS[name].multiples and MANIFEST["gpus"][str(gpu)][name]["spill_bytes"]
    }
    assert {key: spilled for key, spilled in spilling.items() if spilled > allowed.get(key, 0)} == {}


@pytest.mark.parametrize("gpu", [75, 89, 120])
def test_weights_are_read_in_16_bytes(gpu: int) -> None:
    """Decode kernels load weights into registers, those with products of tiles into shared memory (Ampere and on)."""
    for name, variant in VARIANTS.items():
        if gpu < variant.oldest or not variant.multiples:
            continue
        text = kernel_store.ptx(name, gpu)
        if name.startswith(("decode", "router_logits")):
            assert len(re.findall(r"ld\.global\S*\.v4\.b32", text)) >= 2
            # Scales are read one by one, few as they are; else nothing is narrower.
            scaled = re.search(r"int8|int4|fp8", name)
            assert scaled or not re.search(r"ld\.global\S*\.[bu](8|16)\b", text)
        elif name.startswith(("prefill", "latent")) and gpu >= 80:
            assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\S* .*, 0x10", text), name


def test_unaligned_rows_are_not_read_in_16_bytes() -> None:
    """The planted opposite of the test above: without hints the compiler must not assume alignment."""
    assert not re.search(r"ld\.global\S*\.v4", kernel_store.ptx("decode_gate_up_fp16_any", 89))


def test_code_carries_no_path_and_no_line() -> None:
    for name in ("decode_down_fp16_int4", "latent_attention_fp16_256"):
        for gpu in GPUS:
            code, text = kernel_store.kernel(name, gpu).cubin, kernel_store.ptx(name, gpu)
            assert b"/" not in re.sub(rb"cuda_[\w.]+/compiler", b"", b"".join(re.findall(rb"[\x20-\x7e]{8,}", code)))
            assert not re.search(r"\.(file|loc)\s", text)


@pytest.mark.parametrize("gpu", GPUS)
def test_a_kernel_is_machine_code_for_its_gpu(gpu: int) -> None:
    found = kernel_store.kernel("running_columns", gpu)
    assert found.cubin.startswith(b"\x7fELF")
    assert found.entry.encode() in found.cubin
    assert (found.threads, found.hidden_pointers) == (128, 2)
    assert f".target sm_{gpu}" in kernel_store.ptx("running_columns", gpu)


def test_what_is_not_there_is_said_in_one_line() -> None:
    with pytest.raises(
        BuildError,
        match=r"no kernels for SM 61, only for 75, 80, .*121: build for one of these, or use --target ort-cpu$",
    ):
        kernel_store.kernel("group_pairs", 61)
    with pytest.raises(BuildError, match=r"decode_down_bf16 needs SM 80 or newer, got SM 75.*--dtype fp16.*--target"):
        kernel_store.kernel("decode_down_bf16", 75)
    with pytest.raises(BuildError, match=r"no kernel decode_up for SM 89: reinstall mythos-edge$"):
        kernel_store.kernel("decode_up", 89)


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped kernels that the store reads instead."""
    folder = tmp_path / "built"
    shutil.copytree(BUILT, folder)
    monkeypatch.setattr(kernel_store, "_BUILT", folder)
    return folder


def _edited(folder: Path, gpu: str, name: str, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["gpus"][gpu][name] |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_damaged_archive_is_refused(copy: Path) -> None:
    before = kernel_store.manifest_sha256()
    _edited(copy, "89", "group_pairs", sha256="0" * 64)
    assert kernel_store.manifest_sha256() != before
    with pytest.raises(BuildError, match=r"group_pairs\.cubin is damaged or missing: reinstall mythos-edge$"):
        kernel_store.kernel("group_pairs", 89)
    path = copy / kernel_store.archive_name(86)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BuildError, match=r"sm_86\.tar\.xz: cannot read: .*: reinstall mythos-edge$"):
        kernel_store.kernel("group_pairs", 86)
    path.unlink()
    with pytest.raises(BuildError, match="cannot read"):
        kernel_store.ptx("group_pairs", 86)


def test_a_damaged_manifest_is_refused(copy: Path) -> None:
    (copy / "manifest.json").write_text("{}")
    with pytest.raises(BuildError, match=r"manifest\.json: damaged: 'gpus': reinstall mythos-edge$"):
        kernel_store.kernel("group_pairs", 89)
    (copy / "manifest.json").unlink()
    with pytest.raises(BuildError, match=r"manifest\.json: cannot read: .*: reinstall mythos-edge$"):
        kernel_store.kernel("group_pairs", 89)


def test_a_changed_source_fails_the_check(tmp_path: Path) -> None:
    changed = tmp_path / "kernels"
    shutil.copytree(SOURCES, changed, ignore=shutil.ignore_patterns("built", "__pycache__"))
    source = changed / "router.py"
    source.write_text(source.read_text().replace("tl.exp(", "tl.exp2("))
    assert differences([89], BUILT, changed) == ["router.py changed"]


def test_a_kernel_that_ends_the_process_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """LLVM aborts on what it cannot compile."""
    real = subprocess.run

    def aborted(command: list[str], **options: Any) -> Any:
        script = "import os; print('group_pairs', flush=True); os.abort()"
        return real([sys.executable, "-c", script], **options)

    monkeypatch.setattr(build_kernels.subprocess, "run", aborted)
    with pytest.raises(BuildError, match="compiling group_pairs for SM 89 ended with -6: no message"):
        build_kernels.build([89], tmp_path)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_a_rebuild_is_equal_to_the_byte(copy: Path) -> None:
    """But for the kernel whose record was changed, which is the one thing the check complains of."""
    _edited(copy, "89", "group_pairs", registers=1)
    command = [
        sys.executable,
        "-m",
        "mythos_edge.scripts.lab.build_kernels",
        "--check",
        "--sm",
        "89",
        "--output",
        str(copy),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: {copy} is stale: group_pairs for SM 89: run scripts/build_kernels\n"
