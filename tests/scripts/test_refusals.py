"""One line for every mistake: in a request, in a bundle, and in what is to be exported."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import CHECKPOINT, Ran, refused
from conftest import FIXTURES
from tiny_checkpoint import Evil

from mythos_edge.model.manifest import SCHEMA_VERSION
from mythos_edge.model.target_options import EngineSpec
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import score, validate

# --- a request ----------------------------------------------------------------------------------------------------


REQUESTS = {
    "id out of range": (["--ids", "1,999"], "token id 999 is out of range: this model knows 0 .. "),
    "negative id": (["--ids=-1"], "token id -1 is out of range"),
    "not numbers": (["--ids", "1,x"], "--ids is '1,x', expected numbers like 1,2,3"),
    "empty prompt": (["--ids", ""], "the prompt is empty"),
    "text without tokenizer": (["-p", "hello"], "no tokenizer"),
    "beyond the context": (["--ids", ",".join(["1"] * 600)], "the prompt has 600 tokens; this bundle was exported for"),
    "no tokens": (["--ids", "1", "--max-new-tokens", "0"], "max_new_tokens is 0, expected at least 1"),
    "max depth": (["--ids", "1", "--max-depth", "0"], "max_depth is 0, expected at least 1 loop step"),
    "min depth": (["--ids", "1", "--min-depth", "99"], "min_depth is 99, expected at most max_depth"),
    "threshold": (["--ids", "1", "--threshold", "nan"], "threshold is nan, expected a finite number above 0"),
    "temperature": (["--ids", "1", "--temperature", "-1"], "temperature is -1.0, expected 0 or more"),
    "top p": (["--ids", "1", "--top-p", "0"], "top_p is 0.0, expected more than 0"),
    "stop id": (["--ids", "1", "--stop-id", "5000"], "stop id 5000 is out of range: this model knows 0 .. "),
    "threads": (["--ids", "1", "--threads", "-3"], "threads is -3, expected"),
    "stop without tokenizer": (["--ids", "1", "--stop", "x"], "stop strings need a tokenizer"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_bad_request_is_one_line(case: str, mla_bundle: Path, run: Callable[..., Ran]) -> None:
    argv, message = REQUESTS[case]
    refused(run("generate", mla_bundle, *argv), message)
    ran = run("generate", mla_bundle, *argv, "--json")
    assert ran.code == 1
    assert message in ran.json["error"]


def test_ids_files_that_are_none(
    mla_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    output = tmp_path / "out.npz"
    np.save(tmp_path / "flat.npy", np.arange(4))
    np.save(tmp_path / "empty.npy", np.zeros((0, 4), np.int64))
    np.save(tmp_path / "wide.npy", np.array([[1, 5000]]))
    np.save(tmp_path / "floats.npy", np.zeros((1, 4)))
    (tmp_path / "text.npy").write_text("1,2,3")
    np.savez(tmp_path / "archive.npz", a=np.arange(3))
    for name, message in {
        "absent.npy": "cannot read the ids: No such file",
        "flat.npy": "expected integers (batch, positions): ids[None] makes a batch of them",
        "empty.npy": "ids are empty, of shape (0, 4): expected at least one token",
        "wide.npy": "token id 5000 is out of range",
        "floats.npy": "expected integers (batch, positions)",
        "text.npy": "not a .npy file",
        "archive.npz": "got an archive",
    }.items():
        refused(run("score", mla_bundle, "--ids", tmp_path / name, "-o", output), message)
        refused(run("validate", mla_bundle, "--against", CHECKPOINT, "--ids", tmp_path / name), message)
    good = np.array([[1, 2, 3]])
    np.save(tmp_path / "good.npy", good)
    whole = (tmp_path / "good.npy").read_bytes()
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1, 999999999999), }".ljust(117) + b"\n"
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(48))
    (tmp_path / "cut.npy").write_bytes(whole[:-1])
    (tmp_path / "two.npy").write_bytes(whole * 2)
    (tmp_path / "head.npy").write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100))
    (tmp_path / "nested.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10000)
    (tmp_path / "less.npy").write_bytes(whole.replace(b"(1, 3)", b"(-1,3)"))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "archive.npz").read_bytes()[:100])
    np.save(tmp_path / "object.npy", np.array([[None]]), allow_pickle=True)
    np.save(tmp_path / "scalar.npy", np.array(1))
    np.save(tmp_path / "deep.npy", np.zeros((1, 1, 3), np.int64))
    for name, message in {
        "pipe.npy": "cannot read the ids: is a pipe, expected a file",
        ".": "cannot read the ids: Is a directory",
        "huge.npy": "int64 of shape (1, 999999999999) takes 8 TB, the file holds 48 bytes of it: save the ids with",
        "cut.npy": "int64 of shape (1, 3) takes 24 bytes, the file holds 23 bytes of it",
        "two.npy": "int64 of shape (1, 3) takes 24 bytes, the file holds",
        "head.npy": "not a .npy file of numbers: save the ids with numpy.save",
        "nested.npy": "not a .npy file of numbers",
        "less.npy": "not a .npy file of numbers",
        "cut.npz": "got an archive",
        "object.npy": "not a .npy file of numbers",
        "scalar.npy": "ids are int64 of shape (), expected integers (batch, positions)",
        "deep.npy": "ids are int64 of shape (1, 1, 3), expected integers (batch, positions)",
    }.items():
        refused(run("score", mla_bundle, "--ids", tmp_path / name, "-o", output), message)
    for other in (good.astype(">i8"), np.asfortranarray(np.repeat(good, 2, 0)), good.astype(np.uint16)):
        np.save(tmp_path / "other.npy", other)
        assert run("score", mla_bundle, "--ids", tmp_path / "other.npy", "-o", output).code == 0
        wanted = _scored(mla_bundle, other.tolist())
        np.testing.assert_array_equal(np.load(output)["logits"], wanted)
    output.unlink()
    monkeypatch.setattr(score, "_score", lambda *_: pytest.fail("scored before the place was looked at"))
    for place, message in ((tmp_path / "no" / "out.npz", "No such file"), (tmp_path, "is a folder")):
        refused(run("score", mla_bundle, "--ids", tmp_path / "good.npy", "-o", place), message)
    monkeypatch.undo()
    refused(run("score", mla_bundle, "--ids", tmp_path / "good.npy", "-o", output, "--prefill", 4), "prefill is 4")
    assert not output.exists()


def _scored(bundle: Path, ids: list[list[int]]) -> np.ndarray:
    with Session.open(bundle) as session:
        return session.score(np.array(ids)).logits


@pytest.mark.parametrize("word", ["-5", "12x", ""])
def test_the_demo_adds_numbers_only(word: str, run: Callable[..., Ran]) -> None:
    ran = run("demo", "add", "--", word, "1")
    assert ran.code in (1, 2)
    assert "internal error" not in ran.err


def test_requests_that_cannot_fit_are_one_line(mla_bundle: Path, run: Callable[..., Ran]) -> None:
    refused(run("bench", mla_bundle, "-p", 200, "-n", 100), "200 prompt and 100 new tokens are 300; this bundle was")
    refused(run("demo", "add", "9" * 5000, 1), "a number has 5000 digits, the demo adds up to 200")
    short = run("validate", mla_bundle, "--against", CHECKPOINT, "--positions", 5, "--json")
    assert short.code == 0, short.err


def test_what_cannot_be_compared_is_refused_before_the_hashing(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    def with_loop(manifest: dict[str, Any]) -> None:
        engine = EngineSpec("rtx", "1.7", (89,), "", "loop", 256, 256, (), {}, "")
        loop = {"graphs": {"model": "model.onnx"}, "kind": "tensorrt", "options": dataclasses.asdict(engine)}
        manifest["targets"]["rtx-sm89-fp16-loop"] = {**manifest["targets"]["ort-cpu"], **loop}

    _edit(damaged, with_loop)
    monkeypatch.setattr(validate, "verify_hashes", lambda *_: pytest.fail("hashed before looking"))
    loop = run("validate", damaged, "--target", "rtx-sm89-fp16-loop", "--against", "fp32")
    refused(loop, "is one engine with the loop inside, which keeps no cache: score with it")
    refused(run("validate", damaged, "--against", tmp_path / "nope.pt"), "nope.pt: no such file")
    refused(run("validate", damaged, "--against", "ort-cuda"), "ort-cuda: no such file, and no target", "has ort-cpu")
    refused(run("validate", damaged, "--against", FIXTURES / "gqa-small"), "has another config than the bundle")


def test_debug_shows_where(mla_bundle: Path, run: Callable[..., Ran]) -> None:
    ran = run("generate", mla_bundle, "--ids", "999999", "--debug")
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1].startswith("error: token id 999999")


def test_build_refuses_in_one_line(mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    before = sorted(file.name for file in mla_bundle.iterdir())
    np.save(tmp_path / "foreign.npy", np.array([[1, 5000]]))
    np.save(tmp_path / "long.npy", np.ones((1, 300), np.int64))
    for words, message in [
        (
            ("--weights", "int4", "--block", 64),
            "rows of 96 values do not divide into blocks of 64: choose",
        ),
        (("--weights", "int8", "--block", 7), "block is 7, expected one of 32, 64, 128 or 0 (a whole row) for int8"),
        (("--weights", "int4", "--block", 0), "expected one of 32, 64, 128 for int4 (0, a whole row, is for int8)"),
        (("--weights", "int4", "--keep", ""), "--keep is '', expected parts or names of tensors"),
        (("--weights", "fp8"), "expected one of fp32, int8, int4 for ort-cpu: fp8 is for TensorRT's targets"),
        (("--weights", "int4", "--keep", "tail"), "--keep tail fits no matrix of this model"),
        (("--weights", "int8", "--calibrate", tmp_path / "foreign.npy"), "token id 5000 is out of range"),
        (("--weights", "int8", "--calibrate", tmp_path / "long.npy"), "the ids have 300 positions"),
        (("--weights", "int8", "--calibrate", tmp_path / "absent.npy"), "cannot read the ids"),
        (("--weights", "fp32", "--calibrate", tmp_path / "long.npy"), "fp32 rounds nothing: leave them out"),
    ]:
        refused(run("build", mla_bundle, *words), message)
    refused(run("build", tmp_path / "absent", "--weights", "int8"), "does not exist")
    refused(run("build", mla_bundle), "say with --weights fp32, int8 or int4 what to add")
    refused(run("generate", mla_bundle, "--ids", "1", "--target", "ort-cpu-int8"), "has no target 'ort-cpu-int8'")
    refused(run("generate", mla_bundle, "--ids", "1", "--preset", "knee"), "'knee', as it has no presets: mythos-edge")
    assert sorted(file.name for file in mla_bundle.iterdir()) == before


def test_build_for_tensorrt_refuses_in_one_line(mla_bundle: Path, run: Callable[..., Ran]) -> None:
    before = sorted(file.name for file in mla_bundle.iterdir())
    for words, message in [
        (("--target", "rtx"), "target is 'rtx', expected ort-cpu, ort-cuda, rtx-sm89 (or several GPUs"),
        (("--target", "ort-cpu-int8"), "ask for it with --target ort-cpu --weights int8"),
        (("--target", "ort-cpu-fp32"), "ask for it with --target ort-cpu --weights fp32"),
        (("--target", "rtx-sm86+sm89-fp16-loop"), "with --target rtx-sm86+sm89 --dtype fp16 --layout loop"),
        (("--target", "ort-cuda-fp16-int4"), "with --target ort-cuda --dtype fp16 --weights int4"),
        (("--target", "trt-sm87-bf16-loop"), "with --target trt-this-gpu --dtype bf16 --layout loop"),
        (("--target", "trt-sm87-fp16-aot"), "target is 'trt-sm87-fp16-aot', expected ort-cpu"),
        (("--target", "rtx-sm89-quick"), "target is 'rtx-sm89-quick', expected ort-cpu"),
        (("--target", "rtx-sm" + "9" * 5000), "expected ort-cpu"),
        (("--target", "rtx-sm87"), "for Jetson Orin use trt-this-gpu there"),
        (("--target", "rtx-sm75", "--dtype", "bf16"), "sm75 has no bf16, which begins with sm80"),
        (("--target", "rtx-sm80", "--weights", "int4"), "sm80 has no int4, which begins with sm86"),
        (("--target", "rtx-sm86", "--weights", "fp8"), "sm86 has no fp8, which begins with sm89"),
        (("--target", "rtx-sm89", "--weights", "fp32"), "weights is 'fp32', expected one of none, int8, int4, fp8"),
        (("--target", "rtx-sm89", "--max-context", 999), "max_context is 999, expected 1 to 256"),
        (("--target", "rtx-sm89", "--max-rows", 0), "max_rows is 0, expected 1 to max_context"),
        (("--target", "rtx-sm89", "--max-rows", 8, "--layout", "loop"), "max_rows is for the step layout"),
        (("--target", "rtx-sm89", "--block", 64), "--block means nothing to the target rtx-sm89"),
        (("--target", "rtx-sm89", "--keep", "head"), "--keep means nothing to the target rtx-sm89"),
        (("--target", "ort-cuda", "--layout", "loop"), "--layout means nothing to the target ort-cuda"),
        (("--weights", "int8", "--dtype", "fp16"), "--dtype means nothing to the target ort-cpu"),
        (("--weights", "int8", "--max-rows", 4), "--max-rows means nothing to the target ort-cpu"),
    ]:
        refused(run("build", mla_bundle, *words), message)
    assert sorted(file.name for file in mla_bundle.iterdir()) == before


# --- a bundle -----------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(mla_bundle: Path, tmp_path: Path) -> Path:
    """A copy of a bundle to damage."""
    return Path(shutil.copytree(mla_bundle, tmp_path / "damaged.bundle"))


def _edit(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    edit(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def _every_verb(bundle: Path, tmp_path: Path) -> list[tuple[object, ...]]:
    np.save(tmp_path / "ids.npy", np.array([[1, 2]]))
    return [
        ("inspect", bundle),
        ("generate", bundle, "--ids", "1"),
        ("score", bundle, "--ids", tmp_path / "ids.npy", "-o", tmp_path / "out.npz"),
        ("validate", bundle),
        ("bench", bundle, "-p", 1, "-n", 1, "-r", 1),
        ("demo", "add", 1, 2, "--bundle", bundle),
    ]


@pytest.mark.parametrize("name", ["weights.safetensors", "step.onnx", "coda.onnx"])
def test_a_changed_byte_is_found_by_validate(name: str, damaged: Path, run: Callable[..., Ran]) -> None:
    with (damaged / name).open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    refused(run("validate", damaged), f"{name}: has changed: sha256", "export the bundle again")


def _cut(bundle: Path) -> None:
    os.truncate(bundle / "weights.safetensors", 1000)


def _lose(bundle: Path) -> None:
    (bundle / "step.onnx").unlink()


def _climb(bundle: Path) -> None:
    _edit(bundle, lambda m: m["files"].update({"../secret": next(iter(m["files"].values()))}))


def _newer(bundle: Path) -> None:
    _edit(bundle, lambda m: m.update(schema_version=999))


def _no_json(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{")


DAMAGES: dict[Callable[[Path], None], str] = {
    _cut: "weights.safetensors: has 1000 bytes, the manifest says",
    _lose: "step.onnx: is missing: export the bundle again",
    _climb: "'../secret' leaves the bundle's folder: do not trust this bundle",
    _newer: f"made by a newer mythos-edge (schema 999, this one reads {SCHEMA_VERSION}): upgrade it",
    _no_json: "manifest.json: cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused_by_every_verb(
    damage: Callable[[Path], None], damaged: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    damage(damaged)
    for argv in _every_verb(damaged, tmp_path):
        refused(run(*argv), DAMAGES[damage])
    assert not (tmp_path / "out.npz").exists()


def test_what_is_no_bundle_is_refused_by_every_verb(tmp_path: Path, run: Callable[..., Ran]) -> None:
    for argv in _every_verb(tmp_path / "absent", tmp_path):
        refused(run(*argv), "absent")
    (tmp_path / "folder").mkdir()
    for argv in _every_verb(tmp_path / "folder", tmp_path)[1:]:
        refused(run(*argv), "folder has no manifest.json: make a bundle with mythos-edge export")


def test_a_graph_that_is_none_is_refused(damaged: Path, run: Callable[..., Ran]) -> None:
    size = (damaged / "coda.ort-cpu.onnx").stat().st_size
    (damaged / "coda.ort-cpu.onnx").write_bytes(b"\xff" * size)
    refused(run("generate", damaged, "--ids", "1"), "coda.ort-cpu.onnx: ONNX Runtime cannot load it")
    refused(run("inspect", damaged / "coda.ort-cpu.onnx"), "not an ONNX file, or damaged")


def test_pipes_are_refused_and_not_waited_for(tmp_path: Path, run: Callable[..., Ran]) -> None:
    for name in ("graph.onnx", "model.pt", "model.safetensors", "config.json", "tokenizer.json"):
        os.mkfifo(tmp_path / name)
    for name in ("graph.onnx", "model.pt", "model.safetensors"):
        refused(run("inspect", tmp_path / name), f"{name}: cannot be read: is a pipe, expected a file: write its")
    output = tmp_path / "out"
    refused(run("export", tmp_path / "model.pt", "-o", output), "model.pt: cannot be read: is a pipe")
    refused(run("export", CHECKPOINT, "-o", output, "--config", tmp_path / "config.json"), "config.json", "is a pipe")
    tokenizer = tmp_path / "tokenizer.json"
    refused(run("export", CHECKPOINT, "-o", output, "--tokenizer", tokenizer), "cannot be read: is a pipe")
    assert not output.exists()


def test_pointers_in_place_of_files_are_told(damaged: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    """As a clone without git-LFS has them: what is missing is not mended by another export."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    for name in ("ids.npy", "graph.onnx"):
        (tmp_path / name).write_bytes(pointer)
    told = "is a git-LFS pointer, not the file it stands for: run `git lfs pull`"
    refused(run("score", damaged, "--ids", tmp_path / "ids.npy", "-o", tmp_path / "o.npz"), "ids.npy", told)
    refused(run("inspect", tmp_path / "graph.onnx"), "graph.onnx", told)
    for name in ("weights.safetensors", "manifest.json"):
        (damaged / name).write_bytes(pointer)
        refused(run("generate", damaged, "--ids", "1"), name, told)


# --- an export ----------------------------------------------------------------------------------------------------


def test_checkpoints_that_are_refused(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """One of each kind; ``tests/model/test_refused_checkpoints.py`` has them all."""
    from safetensors.torch import load_file

    tensors = load_file(CHECKPOINT / "model.safetensors")
    config = json.loads((CHECKPOINT / "config.json").read_text())
    trace = tmp_path / "executed"
    torch.save({"model": tensors, "cfg": config, "extra": Evil(trace)}, tmp_path / "evil.pt")
    torch.save({"model": {**tensors, "blocks.0.ffn.moda": torch.zeros(2)}, "cfg": config}, tmp_path / "extra.pt")
    first = next(iter(tensors))
    torch.save({"model": {n: t for n, t in tensors.items() if n != first}, "cfg": config}, tmp_path / "missing.pt")
    wrong = {**tensors, first: tensors[first][:-1]}
    torch.save({"model": wrong, "cfg": config}, tmp_path / "shape.pt")
    spoiled = {name: tensor.clone() for name, tensor in tensors.items()}
    norm = next(name for name in tensors if name.endswith("norm.weight"))
    spoiled[norm][0] = float("nan")
    torch.save({"model": spoiled, "cfg": config}, tmp_path / "nan.pt")
    whole = (tmp_path / "nan.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    for name, words in {
        "absent.pt": ["absent.pt: no such file"],
        "evil.pt": ["mkdir", "was not run"],
        "extra.pt": ["blocks.0.ffn.moda"],
        "missing.pt": [first],
        "shape.pt": [first],
        "nan.pt": ["NaN"],
        "cut.pt": ["cut.pt"],
    }.items():
        refused(run("export", tmp_path / name, "-o", tmp_path / "out"), *words)
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]
        if name not in ("nan.pt",):
            refused(run("inspect", tmp_path / name), *words[:1])
    (tmp_path / "step.engine").write_bytes(b"plan")
    refused(run("inspect", tmp_path / "step.engine"), "or a bundle's folder, or an .onnx file")
    refused(run("inspect", tmp_path), "no model in this folder: give one of its files: cut.pt, evil.pt")
    assert not trace.exists()


def test_an_output_that_exists_is_left_alone(mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    refused(run("export", CHECKPOINT, "-o", mla_bundle), "exists", "--force")
    refused(run("export", tmp_path / "absent.pt", "-o", mla_bundle), "exists", "--force")  # known before it is read
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    refused(run("export", CHECKPOINT, "-o", tmp_path / "photos", "--force"), "exists", "is not a bundle")
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


def test_bad_export_options(tmp_path: Path, run: Callable[..., Ran]) -> None:
    output = tmp_path / "out"
    refused(run("export", CHECKPOINT, "-o", output, "--max-context", 0), "max_context is 0, expected at least 1")
    refused(run("export", CHECKPOINT, "-o", output, "--tokenizer", tmp_path / "none.json"), "no such tokenizer")
    refused(run("export", CHECKPOINT, "-o", output, "--config", tmp_path / "none.json"), "none.json")
    assert list(tmp_path.iterdir()) == []
