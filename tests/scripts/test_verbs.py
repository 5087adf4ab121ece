"""Every verb as people and other programs use it: what it prints, writes and returns."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import CHECKPOINT, Ran
from conftest import FIXTURES

from mythos_edge.model.manifest import SCHEMA_VERSION
from mythos_edge.runtime.session import Session
from mythos_edge.scripts.console import Console


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
    assert bundle["manifest"]["schema_version"] == SCHEMA_VERSION
    with Session.open(mla_bundle) as session:
        assert bundle["cache"]["bytes_at_max_context"] == session.plan().cache_bytes
    shown = run("inspect", mla_bundle).out.splitlines()
    assert any(line.split() == ["stored", "as", "fp32"] for line in shown)
    assert shown[-3].split()[:1] == ["target"]
    spec = bundle["manifest"]["targets"]["ort-cpu"]
    sizes = [f"{spec[name] / 1e6:.1f}" for name in ("fixed_bytes", "step_bytes")]
    assert shown[-2].split()[:-1] == ["ort-cpu", *sizes]
    assert shown[-1] == "    fp32"


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
    assert "context" not in ran.err
    full = run("generate", mla_bundle, "--ids", ",".join(["1"] * 250))
    assert "note: ended because the context is full" in full.err


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
    assert ran.json["target"] == "ort-cpu-int4"
    assert (ran.json["options"]["method"], ran.json["options"]["block"]) == ("calibrated", 32)
    assert {part for part, form in ran.json["weights"].items() if form == "fp32"} == {"head", "coda"}
    plain = run("generate", bundle, "--ids", "1,2,3", "--max-new-tokens", 4, "--json").json
    rounded = run(
        "generate", bundle, "--ids", "1,2,3", "--max-new-tokens", 4, "--target", "ort-cpu-int4", "--json"
    ).json
    assert len(plain["ids"]) == len(rounded["ids"]) == 4
    assert plain["logprobs"] != rounded["logprobs"]
    assert run("validate", bundle).code == 0
    assert ran.json["replaced"] is False
    again = run("build", bundle, "--weights", "int4").out
    assert "replaces the one before (" in again
    assert "experts int4 (blocks of 32, calibrated), rest int8 (a row, calibrated)" in " ".join(again.split())
    lost = run("export", tmp_path / "absent.pt", "-o", bundle, "--force").err
    assert f"note: --force discards what was built in {bundle}, too: ort-cpu-int4" in lost


def test_build_for_tensorrt(
    mla_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    phases: list[str] = []
    monkeypatch.setattr(Console, "progress", lambda _, phase, share: phases.append(phase))
    bundle = Path(shutil.copytree(mla_bundle, tmp_path / "built.bundle"))
    ran = run("build", bundle, "--target", "rtx-sm89", "--max-context", 64, "--max-rows", 8, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["target"] == "rtx-sm89-fp16"
    assert {stage: report["plugin_layers"] for stage, report in ran.json["engines"].items()} == {
        "prelude": 0,
        "step": 1,
        "coda": 0,
    }
    assert all(ran.json["engines"][stage]["plan_bytes"] > 0 for stage in ("prelude", "step", "coda"))
    assert "step: building" in phases
    assert (bundle / "build.rtx-sm89-fp16.log").is_file()
