"""The command line as people and other programs use it: outputs, exit codes, and one line for every mistake."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES

from mythos_edge.runtime.session import Session
from mythos_edge.scripts import cli

CHECKPOINT = FIXTURES / "mla-small"
PROGRAM = [sys.executable, "-m", "mythos_edge.scripts.cli"]
VERBS = ("doctor", "inspect", "export", "build", "generate", "score", "validate", "tune", "bench", "demo")


@dataclass
class Ran:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object that must be all of stdout."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def call(*argv: object) -> Ran:
        try:
            code = cli.main([str(word) for word in argv])
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


def refused(ran: Ran, *words: str) -> None:
    """Exit code 1, nothing on stdout, and one line on stderr that holds ``words``."""
    assert ran.code == 1, ran
    assert ran.out == ""
    lines = [line for line in ran.err.splitlines() if not line.lstrip()[:1].isdigit()]  # progress begins with a time
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("error: ")
    assert "internal error" not in lines[0]
    for word in words:
        assert word in lines[0]


# --- the parser ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, run: Callable[..., Ran]) -> None:
    ran = run(verb, "--help")
    assert ran.code == 0
    assert f"example: mythos-edge {verb}" in " ".join(ran.out.split())
    assert "--json" in ran.out
    assert "--debug" in ran.out


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("no-such-verb",),
        ("generate",),
        ("generate", "b", "--ids", "1", "-p", "text"),
        ("generate", "b", "--ids", "1", "--policy", "sometimes"),
        ("generate", "b", "--ids", "1", "--max-depth", "two"),
        ("export", "a.pt"),
        ("doctor", "--no-such-option"),
        ("score", "b", "--ids", "x.npy"),
        ("demo",),
    ],
)
def test_wrong_usage_is_exit_code_2(argv: tuple[str, ...], run: Callable[..., Ran]) -> None:
    ran = run(*argv)
    assert ran.code == 2
    assert ran.out == ""
    assert "usage: mythos-edge" in ran.err


# --- the verbs ----------------------------------------------------------------------------------------------------


def test_doctor(run: Callable[..., Ran]) -> None:
    report = run("doctor", "--json").json
    assert report["can"]["run"]["ok"]
    assert report["can"]["export"]["packages"]["torch"] == torch.__version__
    assert report["cores"] >= 1
    assert "run             yes" in run("doctor").out


def test_inspect_reads_a_checkpoint_a_graph_and_a_bundle(mla_bundle: Path, run: Callable[..., Ran]) -> None:
    checkpoint = run("inspect", CHECKPOINT, "--json").json
    assert checkpoint["kind"] == "checkpoint"
    assert checkpoint["config"]["attn_type"] == "mla"
    graph = run("inspect", mla_bundle / "model.onnx", "--json").json
    assert graph["kind"] == "onnx"
    assert [value["name"] for value in graph["inputs"]] == ["input_ids", "max_depth", "threshold"]
    assert graph["nodes"]["Loop"] == 1
    bundle = run("inspect", mla_bundle, "--json").json
    assert bundle["kind"] == "bundle"
    assert bundle["manifest"]["schema_version"] == 3
    with Session.open(mla_bundle) as session:
        assert bundle["cache"]["bytes_at_max_context"] == session.plan().cache_bytes
    assert "kind: bundle" in run("inspect", mla_bundle).out


def test_export_says_what_it_wrote(tmp_path: Path, run: Callable[..., Ran]) -> None:
    output = tmp_path / "new" / "small.bundle"
    ran = run("export", CHECKPOINT, "-o", output, "--max-context", 40, "--dtype", "bf16", "--json")
    assert ran.code == 0
    assert ran.json["bytes"] == sum(file.stat().st_size for file in output.iterdir() if file.name != "manifest.json")
    assert ran.json["max_context"] == 40
    assert (ran.json["dtype"], ran.json["compute_dtype"]) == ("bf16", "fp32")
    assert "computes in fp32" in ran.err
    assert run("validate", output).code == 0


def test_generate_json_contract(mla_bundle: Path, run: Callable[..., Ran]) -> None:
    ran = run("generate", mla_bundle, "--ids", "1,2,3", "--max-new-tokens", 6, "--json")
    assert ran.code == 0
    found = ran.json
    with Session.open(mla_bundle) as session:
        wanted = session.generate([1, 2, 3], max_new_tokens=6)
    assert found["ids"] == wanted.ids
    assert found["depths"] == wanted.depths
    assert (found["block_calls"], found["block_rows"]) == (wanted.block_calls, wanted.block_rows)
    assert found["text"] is None
    assert found["ttft_ms"] > 0
    assert found["decode_tokens_per_s"] > 0


def test_generate_prints_ids_and_only_them(mla_bundle: Path, run: Callable[..., Ran]) -> None:
    ran = run("generate", mla_bundle, "--ids", "1,2,3", "--max-new-tokens", 4)
    ids = run("generate", mla_bundle, "--ids", "1,2,3", "--max-new-tokens", 4, "--json").json["ids"]
    assert ran.out == ",".join(map(str, ids)) + "\n"
    assert "4 tokens, mean depth" in ran.err


def test_generate_options_reach_the_session(mla_bundle: Path, run: Callable[..., Ran]) -> None:
    argv = ("--temperature", 1.3, "--top-k", 9, "--top-p", 0.9, "--min-p", 0.01, "--seed", 11)
    depth = ("--policy", "full", "--min-depth", 2, "--max-depth", 3, "--threshold", 0.5)
    found = run("generate", mla_bundle, "--ids", "5,6", "--max-new-tokens", 8, *argv, *depth, "--json").json
    with Session.open(mla_bundle) as session:
        wanted = session.generate(
            [5, 6], max_new_tokens=8, temperature=1.3, top_k=9, top_p=0.9, min_p=0.01, seed=11,
            policy="full", min_depth=2, max_depth=3, threshold=0.5,
        )  # fmt: skip
        greedy = session.generate([5, 6], max_new_tokens=8)
    assert found["ids"] == wanted.ids != greedy.ids
    assert found["depths"] == wanted.depths


def test_score_writes_what_decoding_sees(
    golden_bundle: Path, golden: dict[str, np.ndarray], tmp_path: Path, run: Callable[..., Ran]
) -> None:
    np.save(tmp_path / "ids.npy", golden["ids"])
    ran = run(
        "score", golden_bundle, "--ids", tmp_path / "ids.npy", "-o", tmp_path / "out.npz", "--prefill", 5, "--json"
    )
    assert ran.code == 0
    with np.load(tmp_path / "out.npz") as out:
        batch, positions = golden["ids"].shape
        assert out["logits"].shape[:2] == (batch, positions)
        assert out["logits"].dtype == np.float32
        assert out["depth"].dtype == np.int32
        np.testing.assert_array_equal(out["depth"], golden["depth"])
        assert int(out["block_calls"]) == ran.json["block_calls"] > 0
        assert int(out["block_rows"]) == ran.json["block_rows"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "out.npz"]


def test_validate_json_contract(golden_bundle: Path, golden_name: str, run: Callable[..., Ran]) -> None:
    ran = run("validate", golden_bundle, "--against", FIXTURES / golden_name, "--json")
    assert ran.code == 0, ran.err
    report = ran.json
    assert report["passed"] is True
    assert 0 < report["max_abs"] <= report["allowed_max_abs"]
    assert report["max_rel_l2"] < 1e-3
    assert report["top1_agreement"] == report["depth_agreement"] == 1.0
    assert report["near_ties"] == []


def test_validate_notices_other_weights(mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(CHECKPOINT / "model.safetensors")
    name = next(name for name in tensors if name.endswith("wo.weight"))
    tensors[name][0, 0] += 0.05
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(CHECKPOINT / "config.json", tmp_path)
    ran = run("validate", mla_bundle, "--against", tmp_path, "--json")
    assert ran.code == 1
    assert ran.json["passed"] is False
    assert ran.json["max_abs"] > ran.json["allowed_max_abs"]
    other = run("validate", mla_bundle, "--against", FIXTURES / "gqa-small", "--json")
    assert (other.code, list(other.json)) == (1, ["error"])
    assert "another config" in other.json["error"]


def test_build_and_what_uses_it(mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    bundle = Path(shutil.copytree(mla_bundle, tmp_path / "built.bundle"))
    np.save(tmp_path / "ids.npy", np.arange(40).reshape(2, 20))
    ran = run(
        "build", bundle, "--weights", "int4", "--calibrate", tmp_path / "ids.npy", "--keep", "head,coda", "--json"
    )
    assert ran.code == 0, ran.err
    assert (ran.json["target"], ran.json["method"], ran.json["block"]) == ("ort-cpu-int4", "calibrated", 32)
    assert ran.json["kept"] == ["head", "coda"]
    plain = run("generate", bundle, "--ids", "1,2,3", "--max-new-tokens", 4, "--json").json
    rounded = run(
        "generate", bundle, "--ids", "1,2,3", "--max-new-tokens", 4, "--target", "ort-cpu-int4", "--json"
    ).json
    assert len(plain["ids"]) == len(rounded["ids"]) == 4
    assert plain["logprobs"] != rounded["logprobs"]
    assert run("validate", bundle).code == 0


def test_build_refuses_in_one_line(mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    before = sorted(file.name for file in mla_bundle.iterdir())
    np.save(tmp_path / "foreign.npy", np.array([[1, 5000]]))
    np.save(tmp_path / "long.npy", np.ones((1, 300), np.int64))
    for words, message in [
        (
            ("--weights", "int4", "--block", 64),
            "rows of 96 values do not divide into blocks of 64: choose",
        ),
        (("--weights", "int4", "--block", 7), "block is 7, expected one of 32, 64, 128"),
        (("--weights", "int4", "--keep", "tail"), "--keep tail fits no matrix of this model"),
        (("--weights", "int8", "--calibrate", tmp_path / "foreign.npy"), "token id 5000 is out of range"),
        (("--weights", "int8", "--calibrate", tmp_path / "long.npy"), "the ids have 300 positions"),
        (("--weights", "int8", "--calibrate", tmp_path / "absent.npy"), "can not read the ids"),
        (("--weights", "fp32", "--calibrate", tmp_path / "long.npy"), "--calibrate is a method of its own"),
    ]:
        refused(run("build", mla_bundle, *words), message)
    refused(run("build", tmp_path / "absent", "--weights", "int8"), "does not exist")
    refused(run("build", mla_bundle), "say with --weights fp32, int8 or int4 what to add")
    refused(run("generate", mla_bundle, "--ids", "1", "--target", "ort-cpu-int8"), "has no target 'ort-cpu-int8'")
    refused(run("generate", mla_bundle, "--ids", "1", "--preset", "knee"), "has no preset 'knee'")
    assert sorted(file.name for file in mla_bundle.iterdir()) == before


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


def test_demo_makes_its_bundle_once(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    from mythos_edge.exporter import export

    def copied(checkpoint: Any, path: Path, **_: Any) -> Any:
        shutil.copytree(demo_bundle, path)
        return Session.open(path).bundle

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(export, "export_bundle", copied)
    assert "exporting the demo model once" in run("demo", "add", 7, 8).err
    assert "exporting" not in run("demo", "add", 7, 8).err


# --- mistakes in a request ----------------------------------------------------------------------------------------

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


def test_ids_files_that_are_none(mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    output = tmp_path / "out.npz"
    np.save(tmp_path / "flat.npy", np.arange(4))
    np.save(tmp_path / "wide.npy", np.array([[1, 5000]]))
    np.save(tmp_path / "floats.npy", np.zeros((1, 4)))
    (tmp_path / "text.npy").write_text("1,2,3")
    np.savez(tmp_path / "archive.npz", a=np.arange(3))
    for name, message in {
        "absent.npy": "can not read the ids: No such file",
        "flat.npy": "expected integers (batch, positions)",
        "wide.npy": "token id 5000 is out of range",
        "floats.npy": "expected integers (batch, positions)",
        "text.npy": "not a .npy file",
        "archive.npz": "got an archive",
    }.items():
        refused(run("score", mla_bundle, "--ids", tmp_path / name, "-o", output), message)
        refused(run("validate", mla_bundle, "--against", CHECKPOINT, "--ids", tmp_path / name), message)
    np.save(tmp_path / "good.npy", np.array([[1, 2, 3]]))
    refused(run("score", mla_bundle, "--ids", tmp_path / "good.npy", "-o", tmp_path / "no" / "out.npz"), "No such file")
    refused(run("score", mla_bundle, "--ids", tmp_path / "good.npy", "-o", output, "--prefill", 4), "prefill is 4")
    assert not output.exists()


@pytest.mark.parametrize("word", ["-5", "12x", ""])
def test_the_demo_adds_numbers_only(word: str, run: Callable[..., Ran]) -> None:
    ran = run("demo", "add", "--", word, "1")
    assert ran.code in (1, 2)
    assert "internal error" not in ran.err


def test_requests_that_can_not_fit_are_one_line(mla_bundle: Path, run: Callable[..., Ran]) -> None:
    refused(run("bench", mla_bundle, "-p", 200, "-n", 100), "200 prompt and 100 new tokens are 300; this bundle was")
    refused(run("demo", "add", "9" * 5000, 1), "a number has 5000 digits, the demo adds up to 200")
    short = run("validate", mla_bundle, "--against", CHECKPOINT, "--positions", 5, "--json")
    assert short.code == 0, short.err


def test_debug_shows_where(mla_bundle: Path, run: Callable[..., Ran]) -> None:
    ran = run("generate", mla_bundle, "--ids", "999999", "--debug")
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1].startswith("error: token id 999999")


# --- mistakes in a bundle -----------------------------------------------------------------------------------------


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
    _newer: "made by a newer mythos-edge (schema 999, this one reads 3): upgrade it",
    _no_json: "manifest.json: can not be read",
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
    refused(run("generate", damaged, "--ids", "1"), "coda.ort-cpu.onnx: ONNX Runtime can not load it")
    refused(run("inspect", damaged / "coda.ort-cpu.onnx"), "not an ONNX file, or damaged")


# --- mistakes in an export ----------------------------------------------------------------------------------------


class _Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_checkpoints_that_are_refused(tmp_path: Path, run: Callable[..., Ran]) -> None:
    """One of each kind; ``tests/model/test_checkpoint.py`` has them all."""
    from safetensors.torch import load_file

    tensors = load_file(CHECKPOINT / "model.safetensors")
    config = json.loads((CHECKPOINT / "config.json").read_text())
    trace = tmp_path / "executed"
    torch.save({"model": tensors, "cfg": config, "extra": _Evil(trace)}, tmp_path / "evil.pt")
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
    assert not trace.exists()


def test_an_output_that_exists_is_left_alone(mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    refused(run("export", CHECKPOINT, "-o", mla_bundle), "exists", "--force")
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


# --- processes ----------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_nothing_half_written(tmp_path: Path) -> None:
    """As a terminal sends it: to the whole process group, tracing children too."""
    output = tmp_path / "out.bundle"
    process = subprocess.Popen(
        [*PROGRAM, "export", str(CHECKPOINT), "-o", str(output)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    partial = tmp_path / f".{output.name}.partial-{process.pid}"
    for _ in range(600):
        if partial.is_dir() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert partial.is_dir()
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    refused(Ran(process.returncode, out, err), "interrupted")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_disk_that_fills_up_is_one_line(tmp_path: Path) -> None:
    ran = subprocess.run(
        [*PROGRAM, "export", str(CHECKPOINT), "-o", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )  # fmt: skip
    refused(Ran(ran.returncode, ran.stdout, ran.stderr), "File too large")
    assert list(tmp_path.iterdir()) == []


def test_depth_beyond_training_warns_once(mla_bundle: Path) -> None:
    ran = subprocess.run(
        [*PROGRAM, "generate", str(mla_bundle), "--ids", "1,2", "--max-new-tokens", "3", "--max-depth", "40", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [line for line in ran.stderr.splitlines() if "beyond" in line] == [
        "warning: max_depth 40 is beyond the 6 loop steps this model was trained with"
    ]
    assert len(json.loads(ran.stdout)["ids"]) == 3


def test_a_reader_that_goes_away_is_no_traceback(mla_bundle: Path) -> None:
    ran = subprocess.run(
        f"{' '.join(PROGRAM)} inspect {mla_bundle} --json | head -c 5",
        shell=True, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Traceback" not in ran.stderr


def test_build_for_tensorrt_refuses_in_one_line(mla_bundle: Path, run: Callable[..., Ran]) -> None:
    before = sorted(file.name for file in mla_bundle.iterdir())
    for words, message in [
        (("--target", "rtx"), "target is 'rtx', expected rtx-sm89"),
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


def test_build_for_tensorrt(mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = Path(shutil.copytree(mla_bundle, tmp_path / "built.bundle"))
    ran = run("build", bundle, "--target", "rtx-sm89", "--max-context", 64, "--max-rows", 8, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["target"] == "rtx-sm89-fp16"
    assert ran.json["engine"]["plugin_layers"] == {"prelude": 0, "step": 1, "coda": 0}
    assert all(ran.json["engines"][stage]["plan_bytes"] > 0 for stage in ("prelude", "step", "coda"))
    assert "step: building" in ran.err
    assert (bundle / "build.rtx-sm89-fp16.log").is_file()
