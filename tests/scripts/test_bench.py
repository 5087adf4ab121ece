"""The bench: its report, its tables, and when it says that its figures should not be trusted."""

import argparse
import csv
import io
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from built import build_cpu
from command_line import Ran, refused
from html_pages import Page

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.bundle_writer import update_manifest
from mythos_edge.model.families.table import config_of
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import bench, bench_report, cli, measuring
from mythos_edge.scripts.bench import threshold_of_mean_depth
from mythos_edge.scripts.measuring import noise, spread_of


@pytest.fixture(scope="module")
def bundle(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(demo_bundle, tmp_path_factory.mktemp("bench") / "demo.bundle"))
    build_cpu(path, "int4", block=32)
    return path


def _bench(*arguments: str) -> str:
    command = [sys.executable, "-m", "mythos_edge.scripts.cli", "bench", *arguments, "-p", "12", "-n", "6", "-r", "2"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_report(bundle: Path) -> None:
    drafts = ("--draft-depth", "2", "--draft-tokens", "3")
    report: dict[str, Any] = json.loads(_bench(str(bundle), "--target", "all", "-b", "3", *drafts, "--json"))
    names = ["ort-cpu", "ort-cpu-int4"]
    assert list(report["targets"]) == [f"{name}{suffix}" for name in names for suffix in ("", " drafting")]
    assert report["stream_gb_per_s"] > 0
    for target in report["targets"].values():
        assert target["resident_mb"] > 10
        assert target["load_ms"] > 0
        assert target["batch_equal_tokens"]
        assert target["batch_ratio"] > 0
        for figure in ("ttft_ms", "ms_per_token", "graph_ms_per_loop_step", "stream_percent", "weight_mb_per_token"):
            assert 0 < target[figure]["min"] <= target[figure]["median"] <= target[figure]["max"]
    plain, drafting = report["targets"]["ort-cpu"], report["targets"]["ort-cpu drafting"]
    assert plain["mean_depth"] == drafting["mean_depth"]
    # Once a token what is outside the loop, once a call what is inside.
    calls = plain["block_calls_per_token"]["median"]
    with Session.open(bundle) as session:
        spec = session.bundle.manifest.targets["ort-cpu"]
    assert plain["weight_mb_per_token"]["median"] == pytest.approx((spec.fixed_bytes + calls * spec.step_bytes) / 1e6)


def test_tables_to_paste(bundle: Path) -> None:
    lines = _bench(str(bundle), "--target", "ort-cpu,ort-cpu-int4").splitlines()
    assert lines[0].split("|")[2].strip() == "ort-cpu"
    assert {line.count("|") for line in lines} == {4}
    rows = list(csv.DictReader(io.StringIO(_bench(str(bundle), "--format", "csv"))))
    assert {row["target"] for row in rows} == {"ort-cpu"}
    assert float(next(row for row in rows if row["figure"] == "ms_per_token")["median"]) > 0


def _target(figure: dict[str, float]) -> dict[str, Any]:
    return {"load_ms": 12.5, "resident_mb": 99.0, "noise": None, **dict.fromkeys(bench_report.UNITS, figure)}


def test_targets_that_a_terminal_has_no_room_for_follow_in_tables_of_their_own() -> None:
    figure = {"median": 1234.5, "min": 1.234e-5, "max": 9.876e5}
    targets = {f"ort-cpu-{number}": _target(figure) for number in range(3)} | {"with a batch": _target(figure)}
    targets["with a batch"]["batch_ratio"] = 1.5
    whole = bench_report.markdown(targets, None)
    assert "\n\n" not in whole
    tables = bench_report.markdown(targets, 80).split("\n\n")
    assert all(len(line) <= 80 for table in tables for line in table.splitlines())
    cells = [[line.split("|") for line in table.splitlines()] for table in (whole, *tables)]
    together = [line[:2] + [cell for table in cells[1:] for cell in table[row][2:-1]] + [""] for row, line in
                enumerate(cells[0])]  # fmt: skip
    assert together == cells[0]
    assert cells[0][-1][1].strip() == "batch ratio"
    assert [cell.strip() for cell in cells[0][-1][2:-1]] == ["", "", "", "1.5"]
    # A terminal too narrow for any gets one target a table.
    assert len(bench_report.markdown(targets, 20).split("\n\n")) == 4


def test_the_page_has_every_figure_of_the_report(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    monkeypatch.setattr(measuring, "noise", lambda *_: "it was <loud>")
    lengths = ("-p", 12, "-n", 6, "-r", 2, "--target", "all", "--loop-graph")
    report = run("bench", bundle, *lengths, "--html", tmp_path / "page.html", "--json").json
    assert report["html"] == str(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    bars, whole, loop = page.bars, *page.tables
    assert whole[0] == ["", *report["targets"]]
    for number, target in enumerate(report["targets"].values(), 1):
        for figure, row in zip(bench_report.UNITS, whole[3:], strict=False):
            assert row[0].startswith(figure.split("_")[0])
            if not math.isnan(target[figure]["median"] or math.nan):
                assert row[number].startswith(f"{target[figure]['median']:.4g} (")
    assert {row[0] for row in loop[1:]} == {"halting at 1, ms", "full depth, ms"}
    assert bars[:2] == [f"{one['decode_tokens_per_s']['median']:.4g}" for one in report["targets"].values()]
    assert text.count("it was &lt;loud&gt;") == 2
    for words in (f"Speed of {bundle}", report["machine"], "12 prompt tokens, 6 new tokens"):
        assert words in page.text


def test_a_page_that_cannot_be_written_is_known_before_measuring(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    monkeypatch.setattr(measuring, "stream_bandwidth", lambda _: pytest.fail("measured"))
    refused(run("bench", bundle, "--html", tmp_path / "absent" / "x"), "cannot write the page: No such file")


@pytest.mark.parametrize(
    ("context", "prompt", "new", "wanted"),
    [
        (4096, None, None, (512, 128)),
        (640, None, None, (512, 128)),
        (512, None, None, (410, 102)),
        (100, None, None, (80, 20)),
        (2, None, None, (1, 1)),
        (512, 500, None, (500, 12)),
        (512, None, 8, (504, 8)),
        (512, 64, None, (64, 128)),
        (512, 64, 32, (64, 32)),
    ],
)
def test_lengths_by_default_fit_the_bundle(
    context: int, prompt: int | None, new: int | None, wanted: tuple[int, int]
) -> None:
    args = argparse.Namespace(prompt_tokens=prompt, new_tokens=new)
    note = bench.choose_lengths(args, context)
    assert (args.prompt_tokens, args.new_tokens) == wanted
    smaller = wanted != (prompt or 512, new or 128)
    assert note == (f"note: this bundle's context is {context} tokens: measuring -p {wanted[0]} -n {wanted[1]}"
                    if smaller else None)  # fmt: skip


def test_the_defaults_run_on_a_small_model(mla_bundle: Path, run: Callable[..., Ran]) -> None:
    ran = run("bench", mla_bundle, "-r", 1, "--max-depth", 1)
    assert ran.code == 0
    assert "note: this bundle's context is 256 tokens: measuring -p 205 -n 51" in ran.err


def test_the_loop_graph_can_be_measured_too(bundle: Path) -> None:
    report = json.loads(_bench(str(bundle), "--loop-graph", "--json"))
    assert report["loop_graph"]["halting_at_1_ms"]["median"] > 0


def test_the_threshold_for_a_mean_depth_is_found(bundle: Path) -> None:
    prompt = [0, 90, 81, 72, 63, 54, 45, 36]
    with Session.open(bundle) as session:
        shallow, deep = (threshold_of_mean_depth(session, prompt, 6, depth) for depth in (1.0, 8.0))
        assert 0 < shallow <= deep <= config_of(session.bundle.manifest).act_threshold


def test_when_not_to_trust_figures() -> None:
    quiet = spread_of([1.0, 1.05, 1.1])
    assert noise([30e9, 29e9], quiet) is None
    assert "50% apart" in str(noise([30e9, 30e9], spread_of([1.0, 1.0, 1.5])))
    assert "changed by 50%" in str(noise([30e9, 15e9], quiet))


def test_measuring_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_STREAM_BYTES", 1 << 22)
    assert measuring.stream_bandwidth(2) > 0
    assert measuring.resident_bytes() > 1 << 20
    monkeypatch.setattr(measuring, "Path", lambda _: Path("/nowhere"))
    assert measuring.resident_bytes() == 0


@pytest.mark.slow
def test_kernels_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    from mythos_edge.scripts.lab import bench_kernels

    sizes = ["--dim", "128", "--hidden", "128", "--experts", "4", "--top-k", "2", "--rows", "1,3", "-r", "2"]
    assert bench_kernels.main(sizes) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(report["ms"]) == 3 + 5 + 2 + 5
    assert all(len(times) == 2 and min(times) > 0 for times in report["ms"].values())


def test_a_gpu_is_not_compared_with_the_memory_of_a_cpu(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what runs a target, not by its name."""
    path = Path(shutil.copytree(demo_bundle, tmp_path / "demo.bundle"))
    opened = open_bundle(path)
    targets = opened.manifest.targets
    on_gpu = {"ort-cpu-x": replace(targets["ort-cpu"], kind="another")}
    update_manifest(opened, targets=targets | on_gpu)
    monkeypatch.setattr(measuring, "stream_bandwidth", lambda _: pytest.fail("measured before the targets were known"))
    for name, message in (("ort-cpu-x", "is for a GPU: run scripts/gpu_check"), ("typo", "has no target 'typo'")):
        assert cli.main(["bench", str(path), "--target", f"ort-cpu,{name}"]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(["bench", str(path), "--target", "all", "-p", "4", "-n", "2", "-r", "1", "--json"]) == 0
    said = capsys.readouterr()
    assert "left out, as they are for a GPU: ort-cpu-x" in said.err
    assert list(json.loads(said.out)["targets"]) == ["ort-cpu"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target", "ort-cpu,ort-cpu-int4"), "has no target 'ort-cpu-int4'"),
        (("--target", ","), "--target is ',', expected names of targets"),
        (("--weights", "fp32,int8"), "has no target"),
        (("--repetitions", 0), "--repetitions is 0, expected at least 1"),
        (("--threads", -3), "threads is -3"),
        (("-p", 10**6), "lower -p or -n"),
        (("--max-depth", 0), "max_depth is 0"),
        (("--draft-depth", 99), "draft_depth is 99"),
    ],
)
def test_what_is_refused_is_refused_before_measuring(
    demo_bundle: Path,
    words: tuple[object, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., Ran],
) -> None:
    monkeypatch.setattr(measuring, "stream_bandwidth", lambda *_: pytest.fail("measured before looking"))
    refused(run("bench", demo_bundle, *words), message)
