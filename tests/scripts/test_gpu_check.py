"""gpu_check without a GPU: what it runs, what it counts, what it writes; kernels are Python on a fake driver."""

import dataclasses
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SMALL
from fake_driver import FakeDriver
from fake_kernels import fake_kernel

from mythos_edge.model.config import VARIANTS
from mythos_edge.model.errors import BackendUnavailable, MythosEdgeError
from mythos_edge.plugins import kernel_store
from mythos_edge.plugins.launches import program
from mythos_edge.scripts import gpu_bench, gpu_check, gpu_kernels, kernel_cases, torch_kernels
from mythos_edge.scripts.gpu_bench import MeasuredGpu
from mythos_edge.scripts.kernel_cases import NUMPY, Case


def _no_gpu() -> Any:
    raise BackendUnavailable("no NVIDIA driver", "nvidia-smi")


@pytest.fixture
def gpu() -> Iterator[MeasuredGpu]:
    driver = FakeDriver()
    with MeasuredGpu(driver, load_kernel=fake_kernel) as opened:  # type: ignore[arg-type]
        yield opened
    assert driver.live_bytes == 0


def _answering(gpu: MeasuredGpu, case: Case, answer: np.ndarray) -> None:
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
    assert len(made) == 2 * (3 + 3 + 6)
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
    scales = (2 * SMALL.expert_dim + SMALL.dim) * 2
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
def test_right_answers_pass_and_wrong_ones_do_not(gpu: MeasuredGpu, dtype: str, kind: str) -> None:
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


def test_times_come_from_a_graph_of_runs_with_other_inputs(gpu: MeasuredGpu) -> None:
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


def test_copies_are_counted_as_read_and_written(gpu: MeasuredGpu, monkeypatch: pytest.MonkeyPatch) -> None:
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


def _torchless(case: Case) -> dict[str, Any]:
    return {}


@pytest.fixture
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(gpu_bench.copy_bandwidth, "__defaults__", (1 << 16,))


def test_a_kernel_that_is_missing_fails_its_row_only(gpu: MeasuredGpu, small_copies: None) -> None:
    good = kernel_cases.experts("small", SMALL, 1, "fp16", "")
    bad = dataclasses.replace(good, label="bad", op="NoSuchOp")
    copy, *made = gpu_kernels.rows(gpu, [bad, good], _torchless)
    assert copy["gb_per_s"] > 0
    assert made[0]["why"].startswith("no kernels for NoSuchOp")
    # The good one is wrong as well, by kernels that do nothing, and timed all the same.
    assert not made[1]["ok"]
    assert made[1]["us"] > 0
    section = gpu_check.Section("kernels", rows=[copy, *made])
    gpu_check.judge_kernels(section)
    assert section.status == "failed"
    assert section.reason.startswith("2 wrong or without an answer, the first is bad: no kernels for NoSuchOp")


class BrokenDriver(FakeDriver):
    """After ``good`` launches one meets an illegal address, and from then on no call that uses the context works."""

    def __init__(self, good: int) -> None:
        super().__init__()
        self.good, self.broken = good, False

    def __getattribute__(self, name: str) -> Any:
        uses_context = name in (
            "allocate",
            "begin_capture",
            "copy_on_device",
            "copy_to_device",
            "copy_to_host",
            "destroy_graph",
            "destroy_stream",
            "end_capture",
            "free",
            "launch",
            "launch_graph",
            "load_module",
            "memory_info",
            "release_primary_context",
            "synchronize",
        )
        if uses_context and self.broken:
            return self._fail
        return super().__getattribute__(name)

    def launch(self, *arguments: Any) -> None:
        self.good -= 1
        if self.good < 0:
            self.broken = True
            self._fail("launch")
        super().launch(*arguments)

    def _fail(self, *_: Any) -> Any:
        raise MythosEdgeError("CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)")


# None, in the middle of the answer, in the queue that is warmed up, in the one that is captured.
@pytest.mark.parametrize("good", [0, 1, 4, 20])
def test_after_an_illegal_address_the_rest_of_a_group_is_skipped(good: int, small_copies: None) -> None:
    case = kernel_cases.experts("small", SMALL, 1, "fp16", "")
    with MeasuredGpu(BrokenDriver(good), load_kernel=fake_kernel) as gpu:  # type: ignore[arg-type]
        _, first, second = gpu_kernels.rows(gpu, [case, dataclasses.replace(case, label="second")], _torchless)
    assert first["why"] == "CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)"
    assert not first["ok"]
    assert second == {"case": "second", "skipped": f"an earlier case made the GPU useless: {first['why']}"}
    section = gpu_check.Section("kernels", rows=[first, second])
    gpu_check.judge_kernels(section)
    assert section.reason.startswith("1 wrong or without an answer; 1 skipped, the first is small experts")


def test_closing_does_not_hide_the_first_error() -> None:
    driver = BrokenDriver(0)

    def lose(gpu: MeasuredGpu) -> None:
        with gpu.memory(1):
            driver.broken = True
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), MeasuredGpu(driver, load_kernel=fake_kernel) as gpu:  # type: ignore[arg-type]
        lose(gpu)
    driver = BrokenDriver(0)
    with (
        pytest.raises(MythosEdgeError, match="ILLEGAL_ADDRESS"),
        MeasuredGpu(driver, load_kernel=fake_kernel) as gpu,  # type: ignore[arg-type]
    ):
        driver.broken = True


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch, small_copies: None) -> None:
    """Each group is a small case."""
    monkeypatch.setattr(gpu_kernels, "MeasuredGpu", lambda driver: MeasuredGpu(driver, load_kernel=fake_kernel))
    monkeypatch.setattr(
        gpu_kernels, "cases_of", lambda group, *_: [kernel_cases.experts(group, SMALL, 1, "fp16", "")] * 2
    )


def _in_this_process(driver: Any, code: int | None = None) -> gpu_check.Runner:
    """Runs the module that a command names, on ``driver``; then pretends another exit code."""

    def run(command: Any) -> tuple[int, str]:
        assert command[1:3] == ["-m", "mythos_edge.scripts.gpu_kernels"]
        found = gpu_kernels.main(command[3:], lambda: driver)
        return (found, "said last") if code is None else (code, "said last")

    return run


def test_a_group_runs_in_a_process_and_leaves_its_rows(tmp_path: Path, group_of_one: None) -> None:
    def section(run: gpu_check.Runner) -> gpu_check.Section:
        return gpu_check.planned_kernels("1b", "experts int4", "none", tmp_path, run).run()

    whole = section(_in_this_process(FakeDriver()))
    assert whole.title == "kernels 1b experts int4"
    assert [row["case"] for row in whole.rows] == ["copy on the device", *["experts int4 experts fp16, 1 row"] * 2]
    assert whole.reason.startswith("2 wrong or without an answer, the first is experts int4 experts fp16, 1 row: rel")
    killed = section(_in_this_process(FakeDriver(), code=-11))
    assert killed.reason == "the process ended with exit code -11 after 3 rows: said last"
    lost = section(_in_this_process(BrokenDriver(0)))
    assert [("skipped" in row) for row in lost.rows] == [False, False, True]
    assert list(tmp_path.iterdir()) == []


def test_kernels_without_a_gpu_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_kernels.main(["1b", "experts fp16", str(tmp_path / "rows")], _no_gpu) == 1
    assert capsys.readouterr().err == "error: no NVIDIA driver: run `nvidia-smi`\n"


@pytest.mark.parametrize(("reached", "status"), [([True, True], "ok"), ([True, False], "below the aim")])
def test_slow_kernels_are_below_the_aim_and_do_not_fail(reached: list[bool], status: str) -> None:
    rows = [{"case": "a", "ok": True, "reached": each} for each in reached] + [{"case": "64 rows", "ok": True}]
    section = gpu_check.Section("kernels", rows=rows)
    gpu_check.judge_kernels(section)
    assert section.status == status
    assert section.reason == f"{sum(reached)} of 2 decoding kernels reach 70% of the copy bandwidth"
    report = gpu_check.report_of([section], finished=True)
    assert report["passed"]
    assert report["summary"] == f"1 {status}; {section.reason}"
    assert report["below_the_aim"] == ([] if all(reached) else ["kernels"])


@pytest.mark.parametrize("works", [True, False])
def test_the_faster_way_of_torch_counts(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = kernel_cases.experts("small", SMALL, 1, "fp32", "")
    times = iter([2e-6, 1e-6])

    def compile_it(run: Any, **_: Any) -> Any:
        if not works:
            raise RuntimeError("no working Triton\nis installed")
        return run

    monkeypatch.setattr(torch_kernels.torch, "compile", compile_it)
    columns = torch_kernels.best_time(case, "cpu", timer=lambda run: next(times))
    if works:
        assert columns == {"torch_us": 1.0, "torch": "compiled", "eager_us": 2.0, "compiled_us": 1.0}
    else:
        why = "RuntimeError: no working Triton is installed"
        assert columns == {"torch_us": 2.0, "torch": "eager", "eager_us": 2.0, "compiled_us": why}
    assert torch_kernels.best_time(kernel_cases.experts("small", SMALL, 1, "fp16", "int8"), "cpu") == {}


def test_torch_without_a_gpu_is_named_in_the_row() -> None:
    case = kernel_cases.experts("small", SMALL, 1, "fp32", "")
    assert gpu_kernels.torch_comparison("best")(case) == {"torch": "torch has no GPU here"}
    assert gpu_kernels.torch_comparison("none")(case) == {}


def _facts(*there: str) -> dict[str, Any]:
    kinds = ("ort-cuda", "ort-tensorrt", "tensorrt-rtx", "tensorrt")
    return {"can": {kind: {"ok": kind in there, "install": f"pip install {kind}"} for kind in kinds}}


def test_targets_are_built_and_validated_or_skipped_with_a_reason(tmp_path: Path) -> None:
    commands: list[str] = []

    def run(command: Any) -> tuple[int, str]:
        commands.append(" ".join(command[3:]))
        failing = "validate" in command and command[-1].endswith("int4")
        return (1, "error: drifted") if failing else (0, "fine")

    def found(facts: dict[str, Any], capability: int) -> dict[str, gpu_check.Section]:
        plan = list(gpu_check.planned_targets(facts, capability, tmp_path, run))
        return {section.title: section for section in gpu_check.done(plan)}

    sections = found(_facts("ort-cuda", "ort-tensorrt", "tensorrt"), 90)
    assert sections["target rtx-sm90-fp16"].reason == "TensorRT for RTX does not serve sm90"
    assert sections["target ort-cuda-fp16"].status == sections["target trt-sm90-fp16"].status == "ok"
    assert (sections["target ort-cuda-fp16-int4"].status, sections["target ort-cuda-fp16-int4"].reason) == (
        "failed",
        "error: drifted",
    )
    bundle = tmp_path / "demo.bundle"
    assert f"build {bundle} --target trt-this-gpu --dtype fp16 --weights int4" in commands
    assert f"validate {bundle} --against fp32 --target trt-sm90-fp16" in commands
    assert f"build {bundle} --target trt-this-gpu --dtype fp16 --weights none --plugins aot" in commands
    assert f"validate {bundle} --against fp32 --target trt-sm90-fp16-int4-aot" in commands
    assert f"build {bundle} --target ort-cuda --dtype fp32 --provider tensorrt" in commands
    assert sections["target ort-cuda-fp32-tensorrt"].status == "ok"
    assert sections["tests marked gpu"].status == "ok"
    assert commands[-1].startswith("-q -rs -m gpu")
    none = found(_facts(), 89)
    assert none["target rtx-sm89-fp16"].status == "skipped"
    assert none["target rtx-sm89-fp16"].reason == "its package is missing: pip install tensorrt-rtx"


def test_a_failed_export_skips_what_needs_it(tmp_path: Path) -> None:
    def run(command: Any) -> tuple[int, str]:
        return (1, "error: disk full") if "export" in command else (0, "")

    sections = list(gpu_check.done(list(gpu_check.planned_targets(_facts("ort-cuda"), 89, tmp_path, run))))
    assert sections[0].status == "failed"
    assert sections[1].reason == "the demo could not be exported"


def _planned(*sections: gpu_check.Section) -> list[gpu_check.Planned]:
    return [gpu_check.Planned(section.title, lambda section=section: section) for section in sections]  # type: ignore[misc]


@pytest.fixture(autouse=True)
def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of a GPU does not outlive the test."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5")


def test_the_report_is_written_and_the_exit_code_says_whether_anything_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [
        gpu_check.Section("one", rows=[{"case": "a|b", "us": 1.23456}, {"case": "c", "why": "no"}]),
        gpu_check.Section("two", "skipped", "no package"),
    ]
    monkeypatch.setattr(gpu_check, "_plan", lambda *_: iter(_planned(*made)))
    driver: Any = FakeDriver()
    assert gpu_check.main(["--folder", str(tmp_path)], lambda: driver) == 0
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# GPU check\n\n1 ok, 1 skipped\n\n## one\n")
    assert "| case | us | why |\n| --- | --- | --- |\n| a/b | 1.23 |  |\n| c |  | no |" in text
    assert "**skipped**: no package" in text
    assert "skipped  two: no package" in capsys.readouterr().out
    made.append(gpu_check.Section("three", "failed", "wrong"))
    assert gpu_check.main(["--folder", str(tmp_path), "--json"], lambda: driver) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert (report["passed"], report["summary"], report["finished"]) == (False, "1 ok, 1 skipped, 1 failed", True)
    assert [section["status"] for section in report["sections"]] == ["ok", "skipped", "failed"]


def test_an_interrupted_run_leaves_what_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> gpu_check.Section:
        raise KeyboardInterrupt

    plan = [*_planned(gpu_check.Section("one")), gpu_check.Planned("two", interrupted)]
    monkeypatch.setattr(gpu_check, "_plan", lambda *_: iter(plan))
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--folder", str(tmp_path)], lambda: FakeDriver())  # type: ignore[arg-type, return-value]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["finished"], report["summary"]) == (False, "NOT FINISHED: 1 ok")
    assert "NOT FINISHED" in (tmp_path / "report.md").read_text()


def test_an_exception_is_a_failed_section_and_a_gpu_that_is_gone_skips_the_rest() -> None:
    def raising(error: Exception) -> Any:
        def run() -> gpu_check.Section:
            raise error

        return run

    plan = [
        gpu_check.Planned("a", raising(ValueError("two\nlines"))),
        gpu_check.Planned("b", raising(MythosEdgeError("one line")), needs_gpu=True),
        gpu_check.Planned("c", lambda: gpu_check.Section("c", "failed", "slow", [{"case": "x"}]), True, True),
        gpu_check.Planned("d", lambda: gpu_check.Section("d", "failed", "no context"), True, True),
        gpu_check.Planned("e", raising(AssertionError("must not run")), needs_gpu=True),
        *_planned(gpu_check.Section("f")),
    ]
    assert [(section.title, section.status, section.reason) for section in gpu_check.done(plan)] == [
        ("a", "failed", "ValueError: two lines"),
        ("b", "failed", "one line"),
        ("c", "failed", "slow"),
        ("d", "failed", "no context"),
        ("e", "skipped", "'d' could not begin: no context"),
        ("f", "ok", ""),
    ]


@pytest.mark.parametrize(
    ("seen", "number", "chosen"),
    [("4,GPU-5", 1, "GPU-5"), ("4,GPU-5", 2, "-1"), ("", 0, ""), (None, 3, "3")],
)
def test_a_device_is_chosen_for_every_process(
    seen: str | None, number: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    gpu_check.use_device(number)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == chosen


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shapes", "1b,2b"], "'2b' is no shape, expected some of 1b, 3b"),
        (["--device", "-1"], "'-1' is no GPU, expected a number of at least 0"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(arguments, _no_gpu)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_device_comes_first_then_every_group_of_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_run", lambda command: (0, ""))
    driver: Any = FakeDriver(devices=(89,))
    assert gpu_check.main(["--folder", str(tmp_path), "--only", "kernels", "--shapes", "3b"], lambda: driver) == 1
    device, *kernels = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert device["rows"][0]["targets"] == "rtx-sm89, trt-this-gpu, ort-cuda"
    assert [section["title"] for section in kernels] == [f"kernels 3b {group}" for group in kernel_cases.GROUPS]
    plan = gpu_check._plan(FakeDriver(devices=(75,)), gpu_check._parser().parse_args([]))  # type: ignore[arg-type]
    turing = {planned.title: planned for planned in plan}["kernels 1b attention bf16"].run()
    assert (turing.status, turing.reason) == ("skipped", "sm75 has no bf16")
    # Such a process said that all is well and left nothing; after the first nobody tries again.
    assert {section["status"] for section in kernels} == {"failed", "skipped"}
