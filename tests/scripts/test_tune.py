"""``tune``: points are what sessions give, the knee keeps the budget, and the preset is found again."""

import argparse
import base64
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Ran, refused
from html_pages import Page

from mythos_edge.model.bundle import open_bundle
from mythos_edge.runtime.halting import depth_of_preset
from mythos_edge.runtime.quality import kl_divergence
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import addition, tune
from mythos_edge.scripts.measuring import spread_of
from mythos_edge.scripts.tune import notes_of, settings_of
from mythos_edge.scripts.tune_points import Point, Setting, knee_of


@pytest.fixture
def data(tmp_path: Path, random: np.random.Generator) -> Path:
    np.save(tmp_path / "ids.npy", addition.random_streams(random, 3, 12))
    return tmp_path / "ids.npy"


def _point(ms: float, kl: float, spread: float = 0.0) -> Point:
    return Point(Setting("ort-cpu", 0.5, 8), kl, 1.0, 2.0, ms, spread, 1.0)


def test_a_run_measures_draws_and_saves(
    rounded_bundle: Path, data: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    argv = (
        rounded_bundle,
        "--data",
        data,
        "-o",
        tmp_path / "new" / "out",
        "--targets",
        "ort-cpu,ort-cpu-int4",
        "-r",
        1,
    )
    ran = run("tune", *argv, "--thresholds", "0.5", "--max-depths", "2", "--save", "fast", "--json")
    assert ran.code == 0
    report = ran.json
    settings = {(point["target"], point["threshold"], point["max_depth"]) for point in report["points"]}
    assert settings == {(t, x, d) for t in ("ort-cpu", "ort-cpu-int4") for x in (0.5, 0.99) for d in (2, 8)}
    for point in report["points"]:
        assert point["ms_per_token"] > 0
        assert point["speedup"] == pytest.approx(report["full_depth_ms_per_token"] / point["ms_per_token"])
    # As trained, the fp32 target is full depth itself.
    own = next(p for p in report["points"] if (p["target"], p["threshold"], p["max_depth"]) == ("ort-cpu", 0.99, 8))
    assert (own["kl"], own["top1_agreement"]) == (pytest.approx(0, abs=1e-8), 1.0)
    assert report["knee"]["kl"] <= 0.01

    manifest = open_bundle(rounded_bundle).manifest
    preset = manifest.presets["fast"]
    assert {name: report["knee"][name] for name in vars(preset)} == vars(preset)
    assert depth_of_preset(manifest, "fast") == {"max_depth": preset.max_depth, "threshold": preset.threshold}

    picture, page = (Path(file).read_bytes() for file in report["files"])
    assert picture.startswith(b"\x89PNG")
    text = page.decode()
    assert Page(text).tables
    assert text.count("<tr") == 1 + len(report["points"])
    assert text.count('class="knee"') == 1
    assert not re.search(r'(src|href)="(?!data:)', text), "the page needs no other file"
    embedded = re.search(r"base64,([^\"]+)", text)
    assert embedded is not None
    assert base64.b64decode(embedded[1]) == picture
    assert sorted(file.name for file in (tmp_path / "new" / "out").iterdir()) == ["curve.html", "curve.png"]


def test_the_page_alone(rounded_bundle: Path, data: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    bundle = Path(shutil.copytree(rounded_bundle, tmp_path / "a <b> & c.bundle"))
    words = ("tune", bundle, "--data", data, "-r", 1, "--thresholds", "0.5", "--max-depths", "2")
    ran = run(*words, "--html", tmp_path / "page.html", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["files"] == [str(tmp_path / "page.html")]
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert f"{bundle}, {data}" in page.text
    (table,) = page.tables
    points = ran.json["points"]
    assert [row[:3] for row in table[1:]] == [
        [p["target"], f"{p['threshold']:.4g}", str(p["max_depth"])] for p in points
    ]
    assert not (tmp_path / "a <b> & c.bundle-tune").exists()
    # Both where both are asked for.
    both = run(*words, "--html", tmp_path / "page.html", "-o", tmp_path / "out", "--json").json["files"]
    assert [Path(file).name for file in both] == ["curve.png", "curve.html", "page.html"]
    refused(run(*words, "--html", tmp_path), "cannot write the curve")


def test_figures_are_those_of_the_session(
    rounded_bundle: Path, data: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    argv = (rounded_bundle, "--data", data, "-o", tmp_path, "-r", 1, "--targets", "ort-cpu-int4")
    report = run("tune", *argv, "--thresholds", "0.99", "--max-depths", "3", "--max-kl", 100, "--json").json
    found = next(point for point in report["points"] if point["max_depth"] == 3)
    ids = np.load(data)
    with Session.open(rounded_bundle) as fp32, Session.open(rounded_bundle, target="ort-cpu-int4") as rounded:
        pairs = [(fp32.score(row[None], policy="full"), rounded.score(row[None], max_depth=3)) for row in ids]
    kl = [kl_divergence(wanted.logits[0], score.logits[0]) for wanted, score in pairs]
    same = [wanted.logits.argmax(-1) == score.logits.argmax(-1) for wanted, score in pairs]
    assert found["kl"] == pytest.approx(np.mean(kl), rel=1e-3)
    assert found["mean_depth"] == pytest.approx(np.mean([score.depth for _, score in pairs]))
    assert found["top1_agreement"] == pytest.approx(np.mean(same))


def test_a_budget_nothing_meets_saves_nothing(
    rounded_bundle: Path, data: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    argv = ("tune", rounded_bundle, "--data", data, "-o", tmp_path / "out", "--targets", "ort-cpu-int4", "-r", 1)
    argv += ("--thresholds", "0.99", "--max-depths", "8", "--max-kl", 0)
    ran = run(*argv)
    assert ran.code == 1
    assert "no point has KL <= 0" in ran.err
    assert "the knee" not in ran.out
    assert not re.search(r"^\*", ran.out, re.MULTILINE)
    assert open_bundle(rounded_bundle).manifest.presets == {}
    assert (tmp_path / "out" / "curve.html").is_file()


def test_people_are_told_the_knee(rounded_bundle: Path, data: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    argv = ("tune", rounded_bundle, "--data", data, "-o", tmp_path / "out", "-r", 1, "--thresholds", "0.9")
    ran = run(*argv)
    assert ran.code == 0
    shown = ran.out
    (row,) = re.findall(r"^\* ort-cpu +.* ([0-9.]+x)$", shown, re.MULTILINE)
    (own,) = re.findall(r"^. ort-cpu +0\.99 +8 .* ([0-9.]+x)$", shown, re.MULTILINE)
    told = f"* the knee: {row} the speed of full depth at KL <= 0.01\n  (the model's own depth on ort-cpu: {own}), "
    assert told in shown, "the figures of the table"
    assert re.search(r"--target ort-cpu --threshold 0\.9\d* --max-depth \d$", shown.rstrip())
    assert "note: whether the machine was steady shows from -r 3 on, this was -r 1\n" in ran.err
    assert "saved as preset 'knee':\n" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_the_knee_is_the_fastest_within_the_budget() -> None:
    points = [_point(9.0, 0.0), _point(5.0, 0.009), _point(4.0, 0.02), _point(1.0, float("nan"))]
    assert knee_of(points, 0.01) is points[1]
    assert knee_of(points, 0.02) is points[2]
    assert knee_of(points[2:], 0.01) is None
    assert knee_of([], 0.01) is None


def test_among_equally_fast_points_quality_decides() -> None:
    points = [_point(5.0, 0.009), _point(5.1, 0.001), _point(5.5, 0.0)]
    assert knee_of(points, 0.01) is points[1]


def test_points_within_the_noise_of_the_fastest_are_as_fast() -> None:
    points = [_point(5.0, 0.009, 0.15), _point(5.3, 0.001), _point(5.5, 0.0)]
    assert knee_of(points, 0.01) is points[1]


def test_a_spike_is_no_knee() -> None:
    """Its repetitions lie further apart than those of what it would beat."""
    points = [_point(4.0, 0.009, 0.4), _point(5.0, 0.008)]
    assert knee_of(points, 0.01) is points[1]
    assert knee_of(points[:1], 0.01) is None


def test_how_far_the_measuring_can_be_trusted_is_told() -> None:
    steady, spike, beyond = _point(5.0, 0.0), _point(4.0, 0.0, 0.4), _point(3.0, 1.0, 0.4)
    quiet, loud = spread_of([1.0, 1.1]), spread_of([1.0, 1.0, 1.5])
    assert notes_of([steady, steady], steady, quiet, 0.01, 5) == []
    (noisy,) = notes_of([steady], None, loud, 0.01, 5)
    assert noisy.startswith("no preset is saved: full depth is the same work every time, and its times are 50% apart")
    (none,) = notes_of([spike, beyond], None, quiet, 0.01, 5)
    assert none.startswith("no preset is saved: the times of each point with KL <= 0.01 are over 20% apart")
    assert notes_of([beyond], None, quiet, 0.01, 5)[0].startswith("no point has KL <= 0.01")
    assert notes_of([steady, spike], steady, quiet, 0.01, 5)[0].startswith("note: points marked ~ cannot be the knee")
    assert notes_of([steady], steady, quiet, 0.01, 2)[0].endswith("shows from -r 3 on, this was -r 2")


@pytest.mark.parametrize("noisy", ["full depth", "one point", "nothing"])
def test_a_noisy_machine_saves_nothing_it_cannot_know(
    noisy: str,
    rounded_bundle: Path,
    data: Path,
    tmp_path: Path,
    run: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With times that are made up: a target that is fast half of the time, or a machine that is."""
    calls: dict[str, int] = {}

    def decode_ms(session: Session, row: np.ndarray, prefill: int, **depth: Any) -> float:
        run_of = "full depth" if "policy" in depth else "one point" if depth["max_depth"] == 2 else "another"
        calls[run_of] = calls.get(run_of, 0) + 1
        spike = run_of == noisy and calls[run_of] // len(np.load(data)) % 2
        return {"full depth": 10.0, "one point": 4.0, "another": 6.0}[run_of] * (0.5 if spike else 1)

    monkeypatch.setattr(tune, "_decode_ms", decode_ms)
    argv = (rounded_bundle, "--data", data, "-o", tmp_path / "out", "--thresholds", "0.99", "--max-depths", "2")
    ran = run("tune", *argv, "--max-kl", 100)
    presets = open_bundle(rounded_bundle).manifest.presets
    if noisy == "full depth":
        assert ran.code == 1
        assert "no preset is saved: full depth is the same work" in ran.err
        assert presets == {}
    else:
        assert ran.code == 0
        assert presets["knee"].max_depth == (8 if noisy == "one point" else 2)
        assert ("points marked ~" in ran.err) is (noisy == "one point")
        assert bool(re.search(r"^~ ort-cpu .* 2 ", ran.out, re.MULTILINE)) is (noisy == "one point")


def test_settings_always_hold_the_model_as_trained(demo_bundle: Path) -> None:
    bundle = open_bundle(demo_bundle)
    given = argparse.Namespace(targets="ort-cpu,ort-cpu", thresholds="0.5,0.7,0.5", max_depths="2")
    settings = settings_of(given, bundle)
    assert settings[0] == Setting("ort-cpu", 0.99, 8)
    assert len(settings) == len(set(settings)) == 6
    by_default = settings_of(argparse.Namespace(targets="ort-cpu", thresholds=None, max_depths=None), bundle)
    assert Setting("ort-cpu", 0.99, 8) in by_default
    assert {setting.max_depth for setting in by_default} == {4, 6, 8}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--targets", "ort-tpu"), "no target 'ort-tpu'"),
        (("--targets", ","), "--targets is ',', expected names"),
        (("--thresholds", "0.5,high"), "--thresholds is '0.5,high', expected numbers like 0.5,0.9"),
        (("--thresholds", "nan"), "threshold is nan, expected a finite number above 0"),
        (("--thresholds", "0"), "threshold is 0.0, expected"),
        (("--max-depths", "2.5"), "--max-depths is '2.5', expected numbers like 4,8"),
        (("--max-depths", "0"), "max_depth is 0, expected at least 1"),
        (("--max-kl", "-1"), "--max-kl is -1.0, expected 0 or more"),
        (("--max-kl", "nan"), "--max-kl is nan"),
        (("--save", ""), "--save is empty"),
        (("--repetitions", "0"), "--repetitions is 0, expected at least 1"),
    ],
)
def test_mistakes_are_one_line(
    demo_bundle: Path, data: Path, tmp_path: Path, argv: tuple[str, ...], words: str, run: Callable[..., Ran]
) -> None:
    refused(run("tune", demo_bundle, "--data", data, "-o", tmp_path / "out", *argv), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.array([[1] * 7]), "has 7 positions a row, expected at least 8"),
        (np.array([[0, 1, 2, 3, 4, 5, 6, 110]]), "token id 110 is out of range"),
        (np.arange(8), "expected integers (batch, positions)"),
        (np.ones((1, 8)), "expected integers (batch, positions)"),
    ],
)
def test_bad_data_is_one_line(
    demo_bundle: Path, tmp_path: Path, ids: np.ndarray, words: str, run: Callable[..., Ran]
) -> None:
    np.save(tmp_path / "bad.npy", ids)
    refused(run("tune", demo_bundle, "--data", tmp_path / "bad.npy", "-o", tmp_path / "out"), words)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file", "Not a directory"),
        ("file/below", "Not a directory"),
        ("n" * 300, "File name too long"),
        ("taken", "is a folder"),
        ("/proc/nowhere", "No such file or directory"),
    ],
)
def test_a_folder_that_cannot_be_written_is_known_before_measuring(
    rounded_bundle: Path,
    data: Path,
    tmp_path: Path,
    place: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., Ran],
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "taken" / "curve.html").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(tune, "_measure", lambda *_: pytest.fail("measured before the place was looked at"))
    refused(run("tune", rounded_bundle, "--data", data, "-o", tmp_path / place), "cannot write the curve", reason)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bundle_that_cannot_take_the_preset_is_known_before_measuring(
    rounded_bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    real = tune.check_output

    def read_only(path: Path, what: str) -> None:
        real(Path("/proc/nowhere") if path.parent == rounded_bundle else path, what)

    monkeypatch.setattr(tune, "check_output", read_only)
    monkeypatch.setattr(tune, "_measure", lambda *_: pytest.fail("measured before the bundle was looked at"))
    refused(run("tune", rounded_bundle, "--data", data, "-o", tmp_path / "out"), "cannot write the preset")


def test_without_matplotlib_the_install_line_is_given(
    demo_bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    import mythos_edge.scripts as scripts

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "mythos_edge.scripts.tune_report", raising=False)
    monkeypatch.delattr(scripts, "tune_report", raising=False)
    refused(run("tune", demo_bundle, "--data", data, "-o", tmp_path / "out"), "pip install 'mythos-edge[tune]'")
