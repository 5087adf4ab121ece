import dataclasses

import numpy as np

from mythos_edge.scripts.deep_compare import growth_of
from mythos_edge.scripts.deep_reference import FreeRun
from mythos_edge.scripts.deep_run import TargetRun

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
