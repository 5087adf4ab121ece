"""Quality figures by hand: KL, top-1, trajectories, routers, depths, and what never passes the gate."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mythos_edge.runtime.quality import (
    Gate,
    LoopStepQuality,
    QualityReport,
    Trace,
    common_share,
    difference,
    kl_divergence,
    quality_report,
    relative_error,
)


@pytest.fixture
def trace(random: np.random.Generator) -> Trace:
    """3 positions, 2 loop steps, 2 of 4 experts."""
    return Trace(
        logits=random.normal(size=(3, 5)).astype(np.float32),
        depth=np.array([1, 2, 2], np.int32),
        h=random.normal(size=(2, 3, 4)).astype(np.float32),
        chosen=np.array([[[0, 1], [2, 3], [1, 3]], [[0, 3], [1, 2], [0, 1]]]),
        tied=np.zeros((2, 3), np.bool_),
    )


def _with(trace: Trace, **changes: object) -> Trace:
    return Trace(**(vars(trace) | changes))


def test_a_run_does_not_differ_from_itself(trace: Trace) -> None:
    report = quality_report([difference(trace, trace)])
    same = LoopStepQuality(0.0, 0.0, 1.0, 1.0)
    assert report == QualityReport(3, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, (same, same))
    assert Gate(0.0, 1.0, 0.0, 1.0, 0.0).failures(report) == []


def test_kl_by_hand() -> None:
    reference = np.log(np.array([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]))
    # Logits are known up to a constant.
    other = np.log(np.array([[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]])) + np.array([[3.0], [-700.0], [1e4]])
    wanted = [0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75), 0.9 * np.log(1.8) + 0.1 * np.log(0.2), 0.0]
    assert kl_divergence(reference, other) == pytest.approx(wanted, abs=1e-12)


def test_kl_of_certainty_is_finite_and_never_negative(random: np.random.Generator) -> None:
    sure = np.array([[1000.0, 0.0, 0.0]], np.float32)
    assert kl_divergence(sure, sure) == 0.0
    assert kl_divergence(sure, -sure) == pytest.approx(1000 + np.log(2))
    logits = random.normal(size=(200, 50)).astype(np.float32)
    assert (kl_divergence(logits, logits + np.float32(1e-7)) >= 0).all()


def test_relative_error_by_hand() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    assert relative_error(reference, np.array([[3.0, 4.5], [2.0, 2.0], [0.0, 0.0]])) == pytest.approx([0.1, 1.0, 0.0])


def test_experts_are_sets(trace: Trace) -> None:
    assert common_share(trace.chosen, trace.chosen[..., ::-1]).min() == 1.0
    assert common_share(np.array([[0, 1, 2, 3]]), np.array([[3, 9, 8, 0]])) == 0.5


def test_figures_by_hand(trace: Trace) -> None:
    h = trace.h.copy()
    h[1, 2] *= 1.5
    chosen = trace.chosen.copy()
    chosen[0, 0] = 3, 1
    logits = trace.logits.copy()
    logits[0] = np.roll(logits[0], 1)
    other = _with(trace, h=h, chosen=chosen, logits=logits, depth=np.array([2, 2, 1]))
    report = quality_report([difference(trace, other), difference(trace, trace)])
    kl = kl_divergence(trace.logits[:1], logits[:1])[0]
    assert report.positions == 6
    assert (report.kl_mean, report.kl_max) == (pytest.approx(kl / 6), kl)
    assert report.top1_agreement == pytest.approx(5 / 6)
    assert (report.depth_agreement, report.depth_difference) == (pytest.approx(4 / 6), pytest.approx(2 / 6))
    first, second = report.loop_steps
    assert (first.h_error_mean, first.common_experts) == (0.0, pytest.approx(5.5 / 6))
    assert first.same_experts == pytest.approx(5 / 6)
    assert second.h_error_mean == pytest.approx(0.5 / 6)
    assert second.h_error_p99 == pytest.approx(np.percentile([0.5, 0, 0, 0, 0, 0], 99))
    assert (second.common_experts, second.same_experts) == (1.0, 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_never_pass(trace: Trace, bad: float) -> None:
    logits = trace.logits.copy()
    logits[1, 2] = bad
    for reference, run in ((trace, _with(trace, logits=logits)), (_with(trace, logits=logits), trace)):
        report = quality_report([difference(reference, run)])
        assert np.isnan(report.kl_mean)
        assert "kl" in Gate(np.inf, 0.0, np.inf, 0.0, 1.0).failures(report)


@pytest.mark.parametrize(
    ("changes", "failures"),
    [
        ({}, []),
        ({"max_kl": 0.09}, ["kl"]),
        ({"min_top1": 0.91}, ["top-1"]),
        ({"max_h_error": 0.19}, ["h error"]),
        ({"min_depth": 0.81, "max_sums_lost": 0.01}, ["depth", "sums"]),
        ({"max_kl": np.nan, "min_top1": np.nan, "max_h_error": np.nan}, ["kl", "top-1", "h error"]),
    ],
)
def test_the_gate_lets_its_own_bounds_pass(changes: dict[str, float], failures: list[str]) -> None:
    gate = replace(Gate(0.1, 0.9, 0.2, 0.8, 0.02), **changes)
    steps = (LoopStepQuality(0.2, 9.0, 0.0, 0.0), LoopStepQuality(0.1, 9.0, 0.0, 0.0))
    assert gate.failures(QualityReport(1, 0.1, 1.0, 1.0, 0.9, 0.8, 9.0, steps), sums_lost=0.02) == failures


def test_a_report_is_fit_for_json(trace: Trace) -> None:
    report = quality_report([difference(trace, trace)])
    values = json.loads(json.dumps(report.to_dict()))
    assert values["loop_steps"][1] == {
        "h_error_mean": 0.0, "h_error_p99": 0.0, "common_experts": 1.0, "same_experts": 1.0,
    }  # fmt: skip
