from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES
from deep_runs import deep
from planted_faults import FAULTS, Fault, Planted

from mythos_edge.runtime.backends.memory import HostMemory
from mythos_edge.runtime.backends.protocol import Backend
from mythos_edge.runtime.caches import ColumnBuffer
from mythos_edge.runtime.slots import Slot

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_named(exported: Callable[..., Path], tmp_path: Path, fault: Fault) -> None:
    planted = Planted(exported(FIXTURES / fault.model), tmp_path / "spoilt.bundle")
    fault.plant(planted)

    report = deep(planted.path, FIXTURES / fault.model, positions=10)

    first = report.first_divergence
    assert not report.passed
    assert first is not None
    assert (first.part, first.step_index, first.kind) == (fault.part, fault.step_index, fault.kind), first


def _late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new row comes a call too late into the cache: what is read of it is the row before."""
    seen = Slot.seen

    def late(slot: Slot) -> Any:
        rows = seen(slot).copy()
        if rows.shape[1] > 7:
            rows[0, -1] = rows[0, -2]
        return rows

    monkeypatch.setattr(Slot, "seen", late)


def _stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rollback the row that was drafted is read in place of the one that was computed anew."""
    grow, truncate, kept = Slot.grow, Slot.truncate, {}

    def remember(slot: Slot, columns: int) -> None:
        if slot.end > columns:
            kept[id(slot)] = columns, slot.view(columns, columns + 1).copy()
        truncate(slot, columns)

    def put_back(slot: Slot, chunk: int) -> None:
        grow(slot, chunk)
        column, rows = kept.pop(id(slot), (-1, None))
        if slot.end == column + 1:
            slot.write(column, rows)

    monkeypatch.setattr(Slot, "truncate", remember)
    monkeypatch.setattr(Slot, "grow", put_back)


def _pending(monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of columns that lag are not moved on."""
    monkeypatch.setattr(ColumnBuffer, "write", lambda *_: None)


def _ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs after the first loop step."""
    monkeypatch.setattr(HostMemory, "watch", lambda *_, **__: lambda mass, begins: mass.shape[1] if begins else 0)


RUNTIME = {
    "late": (_late, "cache", 0),
    "stale": (_stale, "cache", 0),
    "pending": (_pending, "cache", 1),
    "ends_early": (_ends_early, "halting", 1),
}


@pytest.mark.parametrize("model", ["mla-small", "ouro-small"])
@pytest.mark.parametrize("name", RUNTIME)
def test_a_fault_of_the_runtime_is_named(
    exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, model: str, name: str
) -> None:
    plant, part, step_index = RUNTIME[name]
    path = exported(FIXTURES / model)
    plant(monkeypatch)

    first = deep(path, FIXTURES / model, positions=10).first_divergence

    assert first is not None
    assert (first.part, first.step_index) == (part, step_index), first


class _OtherThreshold:
    """A backend that is told another threshold than the request has."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self.memory, self.max_context = backend, backend.memory, backend.max_context

    def run(self, stage: str, feeds: Any, outputs: Any) -> None:
        changed = {"threshold": np.array(0.5, np.float32)} if stage == "step" else {}
        self._backend.run(stage, {**feeds, **changed}, outputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def test_another_threshold_inside_the_backend_is_halting(mla_bundle: Path) -> None:
    first = deep(mla_bundle, FIXTURES / "mla-small", changed=_OtherThreshold, positions=10).first_divergence

    assert first is not None
    assert (first.part, first.step_index, first.kind) == ("halting", 0, "graph")


def test_an_injection_that_does_not_contract_is_said(exported: Callable[..., Path], tmp_path: Path) -> None:
    planted = Planted(exported(FIXTURES / "mla-small"), tmp_path / "spoilt.bundle")
    planted.weight("step.decay", lambda values: values[:4].fill(1.5))

    contraction = deep(planted.path, FIXTURES / "mla-small", positions=4).contraction

    assert contraction is not None
    assert not contraction.contracts
    assert contraction.largest == 1.5
