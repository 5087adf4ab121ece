"""gpu_check without a GPU: what it runs and what it writes; kernels are Python on a fake driver."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL
from fakes.driver import BrokenDriver, FakeDriver
from fakes.kernels import fake_kernel

from mythos_edge.model.errors import BackendUnavailable, MythosEdgeError
from mythos_edge.scripts.lab import gpu_check, gpu_kernels, kernel_cases
from mythos_edge.scripts.lab.gpu_bench import MeasuredGpu


def _no_gpu() -> Any:
    raise BackendUnavailable("no NVIDIA driver", "nvidia-smi")


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


# None, in the middle of the answer, in the queue that is warmed up, in the one that is captured.


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
        assert command[1:3] == ["-m", "mythos_edge.scripts.lab.gpu_kernels"]
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


def _facts(*there: str) -> dict[str, Any]:
    kinds = ("ort-cuda", "tensorrt-rtx", "tensorrt")
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

    sections = found(_facts("ort-cuda", "tensorrt"), 90)
    assert sections["target rtx-sm90-fp16"].reason == "TensorRT for RTX does not serve sm90"
    assert sections["target ort-cuda-fp16"].status == sections["target trt-sm90-fp16"].status == "ok"
    assert (sections["target ort-cuda-fp16-int4"].status, sections["target ort-cuda-fp16-int4"].reason) == (
        "failed",
        "error: drifted",
    )
    bundle = tmp_path / "demo.bundle"
    assert f"build {bundle} --target trt-this-gpu --dtype fp16 --weights int4" in commands
    assert f"validate {bundle} --against fp32 --target trt-sm90-fp16" in commands
    assert f"validate {bundle} --against fp32 --target trt-sm90-fp16-int4" in commands
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
    return [gpu_check.Planned(section.title, lambda section=section: section) for section in sections]


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
        gpu_check.main(["--folder", str(tmp_path)], lambda: FakeDriver())
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
    plan = gpu_check._plan(FakeDriver(devices=(75,)), gpu_check._parser().parse_args([]))
    turing = {planned.title: planned for planned in plan}["kernels 1b attention bf16"].run()
    assert (turing.status, turing.reason) == ("skipped", "sm75 has no bf16")
    # Such a process said that all is well and left nothing; after the first nobody tries again.
    assert {section["status"] for section in kernels} == {"failed", "skipped"}
