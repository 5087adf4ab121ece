"""Parity: figures by hand, near ties left out and told, real differences and NaN never passed."""

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from mythos_edge.model.manifest import EXACT_TIE_MARGIN
from mythos_edge.runtime.parity import (
    NEAR_TIE_MARGIN,
    NearTie,
    ParityReport,
    RouterTie,
    compare,
    passes,
    router_ties,
    tolerance,
)

Array = NDArray[np.float64]
Depths = NDArray[np.int64]


@pytest.fixture
def logits() -> Array:
    return np.random.default_rng(0).normal(size=(2, 4, 5))


@pytest.fixture
def depth() -> Depths:
    return np.array([[1, 2, 3, 2], [4, 1, 1, 2]])


FAR = np.full((2, 4, 8), 0.1)


def _near(*places: tuple[int, int]) -> Array:
    margin = FAR.copy()
    for place in places:
        margin[place] = NEAR_TIE_MARGIN / 2
    return margin


def test_a_run_agrees_with_itself(logits: Array, depth: Depths) -> None:
    report = compare(logits, logits, depth, depth, FAR)
    assert report == ParityReport(0.0, 0.0, 1.0, 1.0, [])
    assert passes(report, 0.0)


def test_figures_by_hand() -> None:
    reference = np.array([[[3.0, 4.0], [0.0, 1.0], [2.0, 0.0], [5.0, 12.0]]])
    other = np.array([[[3.0, 4.5], [0.0, 1.0], [0.0, 0.25], [5.0, 12.0]]])
    depths = np.array([[1, 2, 3, 4]])
    report = compare(reference, other, depths, np.array([[1, 2, 3, 5]]), np.full((1, 4, 8), 0.1))
    assert report.max_abs == 2.0
    assert report.max_rel_l2 == pytest.approx(np.hypot(2, 0.25) / 2)
    assert report.top1_agreement == 0.75
    assert report.depth_agreement == 0.75
    assert report.near_ties == []


def test_float32_is_compared_in_float64() -> None:
    reference = np.array([[[1.0, 1.0 + 1e-9]]])
    report = compare(reference, reference.astype(np.float32), np.ones((1, 1), int), np.ones((1, 1), int), FAR[:1, :1])
    assert report.max_abs == pytest.approx(1e-9, rel=1e-6)


def test_a_reference_of_zeros_is_no_division_by_zero() -> None:
    zeros, ones = np.zeros((1, 1, 3)), np.ones((1, 1), int)
    assert compare(zeros, zeros, ones, ones, FAR[:1, :1]).max_rel_l2 == 0.0


def test_a_real_depth_difference_fails(logits: Array, depth: Depths) -> None:
    for place in np.ndindex(*depth.shape):
        other = depth.copy()
        other[place] += 1
        report = compare(logits, logits, depth, other, FAR)
        assert report.depth_agreement == pytest.approx(7 / 8)
        assert report.near_ties == []
        assert not passes(report, 1.0)


def test_at_the_margin_it_is_no_tie(logits: Array, depth: Depths) -> None:
    other = depth.copy()
    other[0, 1] = 3
    assert not passes(compare(logits, logits, depth, other, np.full((2, 4, 8), NEAR_TIE_MARGIN)), 1.0)
    assert passes(compare(logits, logits, depth, other, np.full((2, 4, 8), NEAR_TIE_MARGIN * 0.99)), 1.0)


def test_a_near_tie_and_what_follows_is_left_out_and_told(logits: Array, depth: Depths) -> None:
    other_depth, other = depth.copy(), logits.copy()
    other_depth[0, 2] = 1
    other[0, 2:] += 100
    report = compare(logits, other, depth, other_depth, _near((0, 2)))
    assert (report.max_abs, report.max_rel_l2, report.top1_agreement, report.depth_agreement) == (0.0, 0.0, 1.0, 1.0)
    assert report.near_ties == [NearTie(0, 2, 3, 1, NEAR_TIE_MARGIN / 2)]
    assert report.compared == pytest.approx(6 / 8)
    assert passes(report, 0.0)


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 3)])
def test_a_near_tie_excuses_neither_what_precedes_nor_other_rows(
    logits: Array, depth: Depths, place: tuple[int, int]
) -> None:
    other_depth, other = depth.copy(), logits.copy()
    other_depth[0, 2] = 1
    other[place] += 0.5
    report = compare(logits, other, depth, other_depth, _near((0, 2)))
    assert report.max_abs == pytest.approx(0.5)
    assert not passes(report, 0.4)


def test_being_near_without_differing_excuses_nothing(logits: Array, depth: Depths) -> None:
    other = logits.copy()
    other[0, 2] += 0.5
    report = compare(logits, other, depth, depth, _near((0, 2)))
    assert report.near_ties == []
    assert not passes(report, 0.4)


def test_a_near_tie_does_not_excuse_a_real_difference(logits: Array, depth: Depths) -> None:
    other_depth = depth.copy()
    other_depth[0, 1], other_depth[1, 2] = 1, 4
    report = compare(logits, logits, depth, other_depth, _near((0, 1)))
    assert len(report.near_ties) == 1
    assert report.depth_agreement == pytest.approx(7 / 8)
    assert not passes(report, 1.0)


def test_ties_everywhere_leave_nothing_to_compare(logits: Array, depth: Depths) -> None:
    report = compare(logits, logits + 1, depth, depth + 1, _near(*np.ndindex(2, 4)))
    assert len(report.near_ties) == 8
    assert report.max_abs == report.compared == 0.0
    assert not passes(report, 1.0), "what was not compared is not in parity"


def test_a_tie_at_another_step_than_where_the_runs_part_excuses_nothing(logits: Array, depth: Depths) -> None:
    other = depth.copy()
    other[0, 2] = 6  # the reference halts at 3
    margin = FAR.copy()
    margin[0, 2, 4] = NEAR_TIE_MARGIN / 2
    assert not passes(compare(logits, logits, depth, other, margin), 1.0)
    margin[0, 2, 2] = NEAR_TIE_MARGIN / 2
    assert passes(compare(logits, logits, depth, other, margin), 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 3, 4)])
def test_logits_that_are_not_finite_never_pass(
    logits: Array, depth: Depths, bad: float, place: tuple[int, int, int]
) -> None:
    other = logits.copy()
    other[place] = bad
    for reference, run in ((logits, other), (other, logits)):
        with np.errstate(invalid="ignore"):
            report = compare(reference, run, depth, depth, FAR)
        for allowed in (0.0, 1.0, np.inf, np.nan):
            assert not passes(report, allowed)


def test_nan_never_passes_after_a_near_tie_either(logits: Array, depth: Depths) -> None:
    other_depth, other = depth.copy(), logits.copy()
    other_depth[0, 1] = 1
    other[0, 3, 2] = np.nan
    assert not passes(compare(logits, other, depth, other_depth, _near((0, 1))), 1.0)


def test_a_margin_that_is_nan_is_no_near_tie(logits: Array, depth: Depths) -> None:
    other = depth.copy()
    other[0, 1] = 3
    assert not passes(compare(logits, logits, depth, other, np.full((2, 4, 8), np.nan)), 1.0)


@pytest.mark.parametrize(
    ("error", "allowed", "good"), [(1e-5, 1e-5, True), (1.1e-5, 1e-5, False), (0.0, np.nan, False)]
)
def test_passing_is_at_most_what_is_allowed(error: float, allowed: float, good: bool) -> None:
    assert passes(ParityReport(error, 0.0, 0.0, 1.0), allowed) is good


def test_the_tolerance_is_three_times_the_noise_and_has_a_floor() -> None:
    assert tolerance(1e-4, 10.0) == pytest.approx(3e-4)
    assert tolerance(0.0, 10.0) == pytest.approx(9e-5)
    assert not passes(ParityReport(0.0, 0.0, 1.0, 1.0), tolerance(np.nan, 10.0))


def test_a_report_is_fit_for_json(logits: Array, depth: Depths) -> None:
    other = depth.copy()
    other[0, 2] = 1
    report = compare(logits, logits, depth, other, _near((0, 2)))
    values = json.loads(json.dumps(report.to_dict()))
    ties = [NearTie(**tie) for tie in values.pop("near_ties")]
    assert values.pop("router_ties") == []
    assert ParityReport(**values, near_ties=ties) == report


# --- ties of the router -------------------------------------------------------------------------------------------


def _routed(*places: tuple[int, int, int], margin: float = NEAR_TIE_MARGIN / 2) -> Array:
    found = FAR.copy()
    for place in places:
        found[place] = margin
    return found


def test_what_differs_after_an_exact_tie_of_the_router_is_left_out_and_told(logits: Array, depth: Depths) -> None:
    other, deeper = logits.copy(), depth.copy()
    other[0, 2:] += 100
    deeper[0, 3] += 1
    routed = _routed((0, 1, 3), (0, 3, 0), (1, 1, 1), margin=EXACT_TIE_MARGIN / 2)
    report = compare(logits, other, depth, deeper, FAR, routed, 1e-3)
    assert report.router_ties == [RouterTie(0, 1, 3, EXACT_TIE_MARGIN / 2)]
    assert report.inconclusive == 0.0
    assert (report.max_abs, report.depth_agreement) == (0.0, 1.0)
    assert report.compared == pytest.approx(6 / 8)
    assert passes(report, 1e-3)


@pytest.mark.parametrize("margin", [EXACT_TIE_MARGIN, NEAR_TIE_MARGIN / 2])
def test_what_differs_after_a_near_tie_of_the_router_is_compared(margin: float, logits: Array, depth: Depths) -> None:
    other, deeper = logits.copy(), depth.copy()
    other[0, 2:] += 100
    deeper[0, 3] += 1
    for run, depths in ((other, depth), (logits, deeper), (other, deeper)):
        report = compare(logits, run, depth, depths, FAR, _routed((0, 1, 3), margin=margin), 1e-3)
        assert report.router_ties == [RouterTie(0, 1, 3, margin)]
        assert report.compared == 1.0
        assert not passes(report, 1e-3)
    assert report.inconclusive == pytest.approx(2 / 8)
    assert report.max_abs == pytest.approx(100)
    other[1, 0] += 1
    report = compare(logits, other, depth, deeper, FAR, _routed((0, 1, 3), margin=margin), 1e-3)
    assert report.inconclusive == 0.0, "what no tie precedes is wrong, whatever follows one"


@pytest.mark.parametrize("margin", [0.0, NEAR_TIE_MARGIN / 2])
@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_a_tie_of_the_router_excuses_neither_what_precedes_nor_other_rows(
    logits: Array, depth: Depths, place: tuple[int, int], margin: float
) -> None:
    other = logits.copy()
    other[place] += 0.5
    routed = _routed((0, 1, 0), margin=margin)
    report = compare(logits, other, depth, depth, FAR, routed, 1e-3)
    assert (report.router_ties, report.inconclusive) == ([], 0.0)
    assert report.max_abs == pytest.approx(0.5)
    assert not passes(report, 1e-3)
    deeper = depth.copy()
    deeper[place] += 1
    assert not passes(compare(logits, logits, depth, deeper, FAR, routed, 1e-3), 1e-3)


def test_ties_that_change_nothing_are_compared(logits: Array, depth: Depths) -> None:
    everywhere = _routed(*np.ndindex(2, 4, 8), margin=0.0)
    report = compare(logits, logits + 1e-4, depth, depth, FAR, everywhere, 1e-3)
    assert (report.compared, report.router_ties) == (1.0, [])
    assert passes(report, 1e-3)
    assert len(router_ties(everywhere)) == 8


@pytest.mark.parametrize(("margin", "good"), [(0.0, True), (EXACT_TIE_MARGIN / 2, True), (NEAR_TIE_MARGIN / 2, False)])
def test_only_exact_ties_may_leave_nothing_to_compare(margin: float, good: bool, logits: Array, depth: Depths) -> None:
    routed = _routed((0, 0, 2), (1, 0, 7), margin=margin)
    report = compare(logits, logits + 1, depth, depth, FAR, routed, 1e-3)
    assert report.compared == (0.0 if good else 1.0)
    assert passes(report, 1e-3) is good
    spoiled = compare(logits, np.full_like(logits, np.nan), depth, depth, FAR, routed, 1e-3)
    assert not passes(spoiled, 1e-3)
