"""The page of the deep comparison: the verdict first, every figure of the report, and no need of another file."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import Ran, refused
from conftest import FIXTURES
from deep_runs import deep
from html_pages import Page

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.errors import UsageError
from mythos_edge.scripts import deep_page
from mythos_edge.scripts.deep_report import ADVICE, PARTS, Contraction, DeepReport, Disagreement, Divergence, Tie
from mythos_edge.scripts.routing import Routing

TEXTS = ["if", " a", " <b>", "\n", " re", "turn", None, "?"]
STEPS = 3


@pytest.fixture
def report(random: np.random.Generator) -> DeepReport:
    """A healthy target, of which the coda shows nothing and the last position was not needed at the last loop step."""
    error = random.uniform(0.001, 0.9, (len(PARTS), STEPS, len(TEXTS)))
    error[PARTS.index("coda")] = np.nan
    error[:, -1, -1] = np.nan
    return DeepReport(
        ids=np.arange(100, 100 + len(TEXTS)),
        first_divergence=None,
        error=error,
        ties=(Tie(2, 1, "router tie", 3e-6, True), Tie(4, 0, "halting tie", 2e-5, False)),
        router_agreement=0.9875,
        disagreements=(Disagreement(2, 1, 3e-6, True),),
        growth=np.array([1e-7, 4e-7, 5e-7]),
        reference_growth=np.array([1e-7, 2e-7, 3e-7]),
        bound=np.array([1e-7, 9e-8, 8.1e-8]),
        contraction=Contraction(0.2, 0.9, True),
        depth=np.array([1, 2, 3, 3, 2, 1, 1, 2]),
        reference_depth=np.array([1, 2, 3, 3, 2, 1, 1, 2]),
        missing=("coda: logits",),
    )


@pytest.fixture
def diverging(report: DeepReport) -> DeepReport:
    error = report.error.copy()
    error[PARTS.index("experts"), 1, 2], error[PARTS.index("halting"), 2, 3] = 250.0, np.inf
    found = Divergence(2, 1, "experts", "weights", "experts.0", 0.5, 0.002, "fc1 differs in 3 values")
    return dataclasses.replace(
        report, first_divergence=found, error=error, other_weights=("step.block.ffn.fc1: 3 values",)
    )


def made(report: DeepReport, routing: Routing | None = None) -> str:
    return deep_page.page("Deep check", "Of a made-up target.", report, TEXTS, routing)


def test_a_healthy_target(report: DeepReport) -> None:
    text = made(report)
    page = Page(text)
    assert "Passed" in page.text
    assert "1 ties fell the other way, which is no failure" in page.text
    assert "FAILED" not in page.text
    assert 'class="cell bad"' not in text
    assert 'class="bar bad"' not in text
    ties, disagreements, missing = page.tables
    assert ties[1] == ["2", "' <b>'", "1", "router tie", "3e-06", "yes"]
    assert ties[2] == ["4", "' re'", "0", "halting tie", "2e-05", "no"]
    assert disagreements[1] == ["2", "' <b>'", "1", "3e-06", "yes"]
    assert missing[1] == ["coda: logits"]
    assert "98.75% of the choices" in page.text
    assert "from 0.2 to 0.9: 0 < A < 1 holds" in page.text


def test_every_value_of_the_heat_map_and_of_the_plots(report: DeepReport) -> None:
    text = made(report)
    for index, position in np.ndindex(STEPS, len(TEXTS)):
        values = report.error[:, index, position]
        if np.isnan(values).all():
            assert f", loop step {index}: not compared</title>" in text
            continue
        at = int(np.nanargmax(values))
        assert f"loop step {index}: {PARTS[at]} {values[at]:.3g} of what is allowed</title>" in text
    for index, value in enumerate(report.growth):
        assert f"this target, loop step {index}: {value:.3g}</title>" in text
    assert report.bound is not None
    for index, value in enumerate(report.bound):
        assert f"bound of the contraction, loop step {index}: {value:.3g}</title>" in text
    for depth, count in ((1, 3), (2, 3), (3, 2)):
        assert f"<title>{depth}: {count}</title>" in text


def test_a_divergence_is_told_first_with_what_to_try(diverging: DeepReport) -> None:
    text = made(diverging)
    page = Page(text)
    verdict = page.text.index("FAILED")
    assert verdict < page.text.index("Error by position")
    assert "position 2 (' <b>'), loop step 1, in the part experts (experts.0). It is off by 0.5" in page.text
    assert f"Its class is weights: {ADVICE['weights']}." in page.text
    assert "fc1 differs in 3 values" in page.text
    assert text.count('class="cell bad"') == 2
    assert text.count('class="bar bad"') == 2
    assert "halting inf of what is allowed" in text
    assert page.tables[-1][1] == ["coda: logits"]
    assert ["step.block.ffn.fc1: 3 values"] in page.tables[-2]


def test_many_positions_share_columns(report: DeepReport, random: np.random.Generator) -> None:
    count = 1000
    error = random.uniform(0.001, 0.5, (len(PARTS), STEPS, count))
    error[4, 2, 777] = 40.0
    long = dataclasses.replace(
        report, ids=np.arange(count), error=error, depth=np.ones(count, np.int64), ties=(), disagreements=()
    )
    text = deep_page.page("Deep check", "", long, [None] * count, None)
    assert text.count('<rect class="cell') == 220 * STEPS
    assert text.count('class="cell bad"') == 1
    assert "position 777 (777), loop step 2: experts 40 of what is allowed" in text
    assert len(text) < 400_000


def test_routing_stands_below(report: DeepReport) -> None:
    routing = Routing(4, 1)
    routing.add(np.array([[[0], [1]], [[0], [2]]]), np.ones((2, 2)), np.ones((2, 2), np.bool_))
    page = Page(made(report, routing))
    assert page.text.index("Near ties") < page.text.index("Routing per loop step")
    assert "1 of 4 experts were chosen at no loop step: 3." in page.text


def test_a_report_of_little(report: DeepReport) -> None:
    little = dataclasses.replace(
        report,
        error=np.full_like(report.error, np.nan),
        ties=(),
        router_agreement=None,
        growth=np.zeros(STEPS),
        reference_growth=np.full(STEPS, math.nan),
        bound=None,
        contraction=None,
        missing=(),
    )
    page = Page(made(little))
    assert "No error." in page.text
    assert page.tables == []


def test_the_page_of_a_bundle(mla_bundle: Path, tmp_path: Path) -> None:
    bundle, report = open_bundle(mla_bundle), deep(mla_bundle, FIXTURES / "mla-small")
    deep_page.write(tmp_path / "page.html", bundle, "ort-cpu", report, "Against its checkpoint.")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert "Passed" in page.text
    assert f"{len(report.ids)} positions went" in page.text
    assert "Routing per loop step" in page.text
    routed = page.tables[-1]
    for index, row in enumerate(routed[1:]):
        assert row[:2] == [str(index), str(int((report.depth > index).sum()))]
    with pytest.raises(UsageError, match="cannot write the page"):
        deep_page.write(tmp_path / "nowhere" / "page.html", bundle, "ort-cpu", report, "")


def test_the_verb_writes_it(mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    argv = ("validate", mla_bundle, "--against", FIXTURES / "mla-small", "--positions", 8)
    ran = run(*argv, "--level", "deep", "--report", tmp_path / "page.html", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["passed"], ran.json["report"]) == (True, str(tmp_path / "page.html"))
    page = Page((tmp_path / "page.html").read_text())
    assert "Passed" in page.text
    assert f"against {FIXTURES / 'mla-small'}, on 8 tokens" in page.text
    refused(run(*argv, "--report", tmp_path / "other.html"), "--report shows the deep comparison: add --level deep")
    argv = (*argv, "--level", "deep", "--report", tmp_path / "nowhere" / "page.html")
    refused(run(*argv), "cannot write the page")
