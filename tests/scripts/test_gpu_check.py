"""gpu_check without a GPU: what it runs, what it counts, what it writes; kernels are Python on a fake driver."""

import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_driver import FakeDriver
from fake_kernels import fake_kernel

from mythos_edge.model.config import VARIANTS
from mythos_edge.model.errors import BackendUnavailable
from mythos_edge.plugins import kernel_store
from mythos_edge.plugins.launches import program
from mythos_edge.scripts import gpu_bench, gpu_check, kernel_cases, torch_kernels
from mythos_edge.scripts.console import Console
from mythos_edge.scripts.gpu_bench import Gpu
from mythos_edge.scripts.kernel_cases import NUMPY, Case

ROOT = Path(__file__).parent.parent.parent
SMALL = dataclasses.replace(
    VARIANTS["1b"],
    dim=128,
    n_heads=4,
    kv_lora_rank=32,
    qk_rope_head_dim=8,
    n_experts=8,
    n_experts_per_tok=2,
    expert_dim=128,
)
QUIET = Console(as_json=True)


def _no_gpu() -> Any:
    raise BackendUnavailable("no NVIDIA driver", "nvidia-smi")


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    driver = FakeDriver()
    with Gpu(driver, load_kernel=fake_kernel) as opened:  # type: ignore[arg-type]
        yield opened
    assert driver.live_bytes == 0


def _answering(gpu: Gpu, case: Case, answer: np.ndarray) -> None:
    """Makes the last kernel of a case write ``answer``, whatever it is given."""
    last = program(case.op, case.shapes, case.dtypes, case.attributes).launches[-1]
    place = next(i for i, argument in enumerate(last.arguments) if getattr(argument, "name", "") == case.output)

    def write(driver: FakeDriver, grid: tuple[int, ...], *arguments: Any) -> None:
        made = answer.astype(NUMPY[case.dtype])
        driver.array(arguments[place], made.dtype, made.shape)[...] = made

    gpu.driver.kernels[fake_kernel(last.kernel, 89).entry] = write  # type: ignore[attr-defined]


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--folder", str(tmp_path / "report")], _no_gpu) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "error: gpu_check needs an NVIDIA GPU, and there is none to use: no NVIDIA driver: run `nvidia-smi`\n"
    )
    assert not (tmp_path / "report").exists()


def test_the_script_runs_the_module() -> None:
    done = subprocess.run([ROOT / "scripts" / "gpu_check", "--help"], capture_output=True, text=True, check=True)
    assert "--folder" in done.stdout


@pytest.mark.parametrize("shape", ["1b", "3b"])
def test_every_kernel_is_there_for_every_case_of_the_real_shapes(shape: str) -> None:
    """By shapes alone: the weights of these cases are gigabytes."""
    config = VARIANTS[shape]
    made = list(kernel_cases.cases(shape, SMALL, contexts=(128, 4096)))
    assert len(made) == 2 * (3 + 3 + 4)
    assert {case.op for case in made} == {"SparseMoE", "QuantizedSparseMoE", "LatentAttention"}
    assert {case.decode for case in made if "1 row" in case.label} == {True}
    for rows in (1, 64):
        x, router = (rows, config.dim), (config.n_experts, config.dim)
        stacks = {"fc1": (config.n_experts, 2 * config.expert_dim, config.dim)}
        stacks["fc2"] = (config.n_experts, config.dim, config.expert_dim)
        shapes = {"x": x, "router": router, "router_bias": (config.n_experts,), **stacks}
        made_program = program("SparseMoE", shapes, dict.fromkeys(shapes, "fp16"), {"top_k": config.n_experts_per_tok})
        for launch in made_program.launches:
            assert kernel_store.kernel(launch.kernel, 89).cubin


def test_bytes_moved_are_those_of_the_chosen_experts() -> None:
    one = kernel_cases.experts("small", SMALL, 1, "fp16", "")
    expert = 3 * SMALL.dim * SMALL.expert_dim * 2
    beside = (SMALL.n_experts * SMALL.dim + SMALL.n_experts + 2 * SMALL.dim) * 2
    assert one.bytes_moved == 2 * expert + beside
    packed = kernel_cases.experts("small", SMALL, 1, "fp16", "int4")
    scales = 3 * SMALL.dim * 2
    assert packed.bytes_moved == 2 * (expert // 4 + scales) + beside
    many = kernel_cases.experts("small", SMALL, 64, "fp16", "")
    assert many.notes["experts"] == SMALL.n_experts
    attention = kernel_cases.attention("small", SMALL, 1, "bf16", 128)
    assert attention.bytes_moved == (129 * 40 + 4 * 40 + 4 * 32) * 2 + 2 * 8


def test_int4_is_packed_as_onnx_has_it() -> None:
    assert kernel_cases.as_stored(np.array([[1, -1, 7, -7]], np.int8), "int4").tolist() == [0xF1, 0x97]


def test_rows_of_repeated_weights_differ() -> None:
    fc1 = kernel_cases.experts("small", SMALL, 1, "fp32", "").inputs["fc1"]
    assert len(np.unique(fc1.reshape(-1, SMALL.dim), axis=0)) == SMALL.n_experts * 2 * SMALL.expert_dim


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("kind", ["attention", "", "int8", "int4", "fp8"])
def test_right_answers_pass_and_wrong_ones_do_not(gpu: Gpu, dtype: str, kind: str) -> None:
    case = (
        kernel_cases.attention("small", SMALL, 3, dtype, 40)
        if kind == "attention"
        else kernel_cases.experts("small", SMALL, 3, dtype, kind)
    )
    wanted = case.wanted()
    assert 0.05 < np.abs(wanted).max() < 100, "of a size that every type can hold"
    _answering(gpu, case, wanted)
    row = gpu_bench.check(gpu, case)
    assert row["ok"], row
    _answering(gpu, case, wanted * 1.05)
    assert not gpu_bench.check(gpu, case)["ok"]
    _answering(gpu, case, np.full(wanted.shape, np.nan))
    assert gpu_bench.check(gpu, case)["error"] == float("inf")


def test_times_come_from_a_graph_of_runs_with_other_inputs(gpu: Gpu) -> None:
    case = kernel_cases.experts("small", SMALL, 1, "fp16", "int8")
    row = gpu_bench.measure(gpu, case, copy_bytes_per_s=1e9)
    assert row["us"] > 0
    assert row["share_of_copy"] == pytest.approx(case.bytes_moved / (row["us"] * 1e-6) / 1e9, rel=0.02)
    assert row["target"] == 0.7
    driver: Any = gpu.driver
    assert driver.calls.count("launch_graph") == 23
    router = fake_kernel(program(case.op, case.shapes, case.dtypes, case.attributes).launches[0].kernel, 89).entry
    inputs = {record.arguments[0] for record in driver.launches if record.entry == router}
    assert len(inputs) == case.turns[1] == 4
    assert "target" not in gpu_bench.measure(gpu, kernel_cases.experts("small", SMALL, 64, "fp16", ""), 1e9)


def test_copies_are_counted_as_read_and_written(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "_seconds_of_graph", lambda gpu, queue: 2.0)
    assert gpu_bench.copy_bandwidth(gpu, size=1000) == 4 * 2 * 1000 / 2.0


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("attention", [True, False])
def test_torch_computes_the_same(rows: int, attention: bool) -> None:
    case = (
        kernel_cases.attention("small", SMALL, rows, "fp32", 20)
        if attention
        else kernel_cases.experts("small", SMALL, rows, "fp32", "")
    )
    run = torch_kernels.runner(case, "cpu")
    assert run is not None
    assert kernel_cases.relative_error(run().numpy(), case.wanted()) < 1e-5
    assert torch_kernels.runner(kernel_cases.experts("small", SMALL, 1, "fp16", "int4"), "cpu") is None


def test_a_kernel_that_is_missing_fails_its_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    driver: Any = FakeDriver()
    monkeypatch.setattr(gpu_check, "Gpu", lambda driver, device: Gpu(driver, device, fake_kernel))
    monkeypatch.setattr(gpu_bench, "_COPY_BYTES", 1 << 16)
    good = kernel_cases.experts("small", SMALL, 1, "fp16", "")
    bad = dataclasses.replace(good, label="bad", op="NoSuchOp")
    sections = list(gpu_check.kernel_sections(driver, 0, [bad, good], QUIET))
    assert [section.title for section in sections] == [
        "copy bandwidth",
        "kernels against the float64 oracle",
        "speed of the kernels",
    ]
    # The good one is wrong as well: nothing but garbage was written by kernels that do nothing.
    assert sections[1].reason == "2 of 2 are wrong, the first is bad"
    assert sections[1].rows[0]["why"].startswith("no kernels for NoSuchOp")
    assert sections[2].reason == "1 could not be measured, the first is bad"
    assert sections[2].rows[1]["us"] > 0


def _facts(*there: str) -> dict[str, Any]:
    kinds = ("ort-cuda", "tensorrt-rtx", "tensorrt")
    return {"can": {kind: {"ok": kind in there, "install": f"pip install {kind}"} for kind in kinds}}


def test_targets_are_built_and_validated_or_skipped_with_a_reason(tmp_path: Path) -> None:
    commands: list[str] = []

    def run(command: Any) -> tuple[int, str]:
        commands.append(" ".join(command[3:]))
        failing = "validate" in command and command[-1].endswith("int4")
        return (1, "error: drifted") if failing else (0, "fine")

    sections = {
        section.title: section
        for section in gpu_check.target_sections(_facts("ort-cuda", "tensorrt"), 90, tmp_path, run)
    }
    assert sections["target rtx-sm90-fp16"].reason == "TensorRT for RTX does not serve sm90"
    assert sections["target ort-cuda-fp16"].status == sections["target trt-sm90-fp16"].status == "ok"
    assert (sections["target ort-cuda-fp16-int4"].status, sections["target ort-cuda-fp16-int4"].reason) == (
        "failed",
        "error: drifted",
    )
    bundle = tmp_path / "demo.bundle"
    assert f"build {bundle} --target trt-this-gpu --dtype fp16 --weights int4" in commands
    assert f"validate {bundle} --against fp32 --target trt-sm90-fp16" in commands
    assert sections["tests marked gpu"].status == "ok"
    assert commands[-1].startswith("-q -m gpu")
    none = {section.title: section for section in gpu_check.target_sections(_facts(), 89, tmp_path, run)}
    assert none["target rtx-sm89-fp16"].status == "skipped"
    assert none["target rtx-sm89-fp16"].reason == "its package is missing: pip install tensorrt-rtx"


def test_a_failed_export_skips_what_needs_it(tmp_path: Path) -> None:
    def run(command: Any) -> tuple[int, str]:
        return (1, "error: disk full") if "export" in command else (0, "")

    sections = list(gpu_check.target_sections(_facts("ort-cuda"), 89, tmp_path, run))
    assert sections[0].status == "failed"
    assert sections[1].reason == "the demo could not be exported"


def test_the_report_is_written_and_the_exit_code_says_whether_anything_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [
        gpu_check.Section("one", rows=[{"case": "a|b", "us": 1.23456}, {"case": "c", "why": "no"}]),
        gpu_check.Section("two", "skipped", "no package"),
    ]
    monkeypatch.setattr(gpu_check, "_sections", lambda *_: iter(made))
    driver: Any = FakeDriver()
    assert gpu_check.main(["--folder", str(tmp_path)], lambda: driver) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| case | us | why |\n| --- | --- | --- |\n| a/b | 1.23 |  |\n| c |  | no |" in text
    assert "**skipped**: no package" in text
    assert "skipped  two: no package" in capsys.readouterr().out
    made.append(gpu_check.Section("three", "failed", "wrong"))
    assert gpu_check.main(["--folder", str(tmp_path), "--json"], lambda: driver) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert (report["passed"], [section["status"] for section in report["sections"]]) == (
        False,
        ["ok", "skipped", "failed"],
    )


def test_the_device_section_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "kernel_sections", lambda *_: iter(()))
    monkeypatch.setattr(gpu_check, "cases", lambda name, config: iter(()))
    driver: Any = FakeDriver(devices=(89,))
    assert gpu_check.main(["--folder", str(tmp_path), "--only", "kernels"], lambda: driver) == 0
    (device,) = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert device["rows"][0]["targets"] == "rtx-sm89, trt-this-gpu, ort-cuda"
