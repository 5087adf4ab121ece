import dataclasses

import numpy as np

from mythos_edge.scripts.deep_compare import growth_of
from mythos_edge.scripts.deep_reference import FreeRun
from mythos_edge.scripts.deep_run import StageRun, TargetRun

_STEPS, _POSITIONS = 3, 4


def _runs(random: np.random.Generator) -> tuple[TargetRun, FreeRun]:
    """A target and its reference that agree, whose positions halt at the second loop step by a clear margin."""
    h, logits = random.normal(size=(_STEPS, _POSITIONS, 8)), random.normal(size=(_POSITIONS, 5))
    depth, mass = np.full(_POSITIONS, 2), np.repeat([[0.5], [1.4], [1.4]], _POSITIONS, axis=1)
    target = TargetRun(np.arange(_POSITIONS), 1.0, [], [], logits, depth, h.copy())
    return target, FreeRun(logits, depth, h, mass, None)


def test_runs_that_agree_do_not_diverge(random: np.random.Generator) -> None:
    target, exact = _runs(random)

    assert growth_of(target, exact, [exact], 0, 1e-6).divergence is None


def test_another_depth_of_the_same_states_is_a_halting_tie(random: np.random.Generator) -> None:
    target, exact = _runs(random)
    depth = target.depth.copy()
    depth[2] = 3

    first = growth_of(dataclasses.replace(target, depth=depth), exact, [exact], 0, 1e-6).divergence

    assert first is not None
    assert (first.position, first.step_index, first.part, first.kind) == (2, 1, "halting", "halting tie")
    assert first.detail == "takes 3 loop steps, not 2"


def test_a_state_that_drifts_is_precision_growth(random: np.random.Generator) -> None:
    target, exact = _runs(random)
    h, logits = target.h.copy(), target.logits.copy()
    h[1:, 1] *= 1.1
    logits[1] += 1

    first = growth_of(dataclasses.replace(target, h=h, logits=logits), exact, [exact], 0, 1e-6).divergence

    assert first is not None
    assert (first.position, first.step_index, first.kind) == (1, 1, "precision growth")


def test_a_state_that_drifts_over_to_other_experts_is_a_router_tie(random: np.random.Generator) -> None:
    target, exact = _runs(random)
    scores = np.tile([0.5, 0.4, 0.3, 0.2], (_STEPS, _POSITIONS, 1))
    exact = dataclasses.replace(exact, scores=scores)
    h, logits, given = target.h.copy(), target.logits.copy(), scores[1].copy()
    h[1:, 1] *= 1.1
    logits[1] += 1
    given[1] = [0.5, 0.3, 0.4, 0.2]
    positions = np.arange(_POSITIONS)
    runs = [
        StageRun("step", 1, positions, {}, {"router.0": scores[1]}),  # rolled back
        StageRun("step", 1, positions, {}, {"router.0": given}),
        StageRun("step", 2, positions, {}, {"router.0": given}),
    ]
    drifted = dataclasses.replace(target, h=h, logits=logits, runs=runs)

    first = growth_of(drifted, exact, [exact], 2, 1e-6).divergence

    assert first is not None
    assert (first.position, first.step_index, first.part, first.kind) == (1, 1, "router", "router tie")
    assert abs(first.error - 0.1) < 1e-12
    same = dataclasses.replace(drifted, runs=runs[:1])
    again = growth_of(same, exact, [exact], 2, 1e-6).divergence
    assert again is not None
    assert again.kind == "precision growth"
