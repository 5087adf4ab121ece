from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES
from deep_runs import MODELS, deep

from mythos_edge.runtime.slots import Slot


@pytest.mark.parametrize("name", MODELS)
def test_nothing_diverges_in_a_healthy_bundle(exported: Callable[..., Path], name: str) -> None:
    report = deep(exported(FIXTURES / name), FIXTURES / name)

    assert report.first_divergence is None
    assert report.passed
    assert not report.missing
    compared = {part for part, error in zip(report.parts, report.error, strict=True) if np.isfinite(error).any()}
    assert {"prelude", "injection", "attention", "experts", "halting", "coda"} <= compared
    assert (report.error[np.isfinite(report.error)] < 1).all()
    assert report.growth.shape == report.reference_growth.shape
    assert (report.depth == report.reference_depth).all()


def test_the_router_and_the_contraction_of_a_model_that_has_both(mla_bundle: Path) -> None:
    report = deep(mla_bundle, FIXTURES / "mla-small")

    assert report.router_agreement == 1.0
    assert report.contraction is not None
    assert report.contraction.contracts
    assert report.bound is not None
    assert (np.diff(report.bound) < 0).all()


def test_a_stale_cache_row_is_the_caches_and_not_the_attentions(
    mla_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Slot.seen

    def stale(slot: Slot) -> Any:
        rows = seen(slot)
        if slot.end == 10:
            rows = rows.copy()
            rows[0, 8] = rows[0, 3]
        return rows

    monkeypatch.setattr(Slot, "seen", stale)
    first = deep(mla_bundle, FIXTURES / "mla-small").first_divergence

    assert first is not None
    assert (first.position, first.step_index, first.part, first.kind) == (8, 0, "cache", "cache")
