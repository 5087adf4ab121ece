"""A short, seeded part of the long runs; and that they find what they look for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES

from mythos_edge.runtime.session import Session
from mythos_edge.scripts.lab.leavers import ServerRun, run_server
from mythos_edge.scripts.lab.long_run import Run, run_family, table
from mythos_edge.scripts.lab.schedules import Found, Schedule


@pytest.mark.parametrize("name", ["mla-small", "ouro-small", "dory-small"])
def test_a_short_schedule_leaves_caches_as_they_would_be_anew(exported: Callable[..., Path], name: str) -> None:
    run = run_family(name, exported(FIXTURES / name), tokens=100, seed=0, check_share=0.8, answer=5)
    assert run.found.wrong == []
    assert run.found.tokens >= 100
    assert run.found.checks >= 1
    assert sum(run.found.actions.values()) >= 10
    assert f"| {name} | fp32 | {run.found.tokens} | {run.found.checks} |" in table([run])


@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_a_short_schedule_of_a_narrow_cache(exported: Callable[..., Path], cache: str) -> None:
    bundle = exported(FIXTURES / "dory-small")
    run = run_family("dory", bundle, tokens=100, seed=0, check_share=0.8, answer=5, cache=cache)
    assert run.found.wrong == []
    assert run.found.tipped <= 1
    assert run.found.checks >= 1


@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_a_wrong_row_of_a_narrow_cache_is_found(exported: Callable[..., Path], cache: str, tmp_path: Path) -> None:
    bundle = exported(FIXTURES / "ouro-small")
    schedule = Schedule(lambda: Session.open(bundle, cache=cache), tmp_path, np.random.default_rng(0))
    schedule._begin()
    schedule.check()
    assert schedule.found.wrong == []
    slot = schedule.session._sequences[0].staircase.loop_slots[0][0]
    slot.view(slot.start, slot.end)[0, 0] = 100
    schedule.check()
    assert "the cache " in " ".join(schedule.found.wrong)
    schedule.close()


def test_a_wrong_cache_row_and_a_wrong_depth_are_found(mla_bundle: Path, tmp_path: Path) -> None:
    schedule = Schedule(lambda: Session.open(mla_bundle, threads=1), tmp_path, np.random.default_rng(0))
    schedule._begin()
    schedule.check()
    assert schedule.found.wrong == []
    slot = schedule.session._sequences[0].staircase.loop_slots[0][0]
    slot.view(slot.start, slot.end)[0, 0] += 0.01
    schedule._depths[0] = 99
    schedule.check()
    words = " ".join(schedule.found.wrong)
    assert "took 99 loop steps" in words
    assert "the cache " in words
    schedule.close()


def test_what_piles_up_in_a_session_is_found(mla_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Session.generate

    def piling(session: Session, *args: Any, **kwargs: Any) -> Any:
        session.__dict__.setdefault("pile", []).append(bytearray(1 << 20))
        return generate(session, *args, **kwargs)

    monkeypatch.setattr(Session, "generate", piling)
    run = run_family("mla", mla_bundle, tokens=300, seed=0, check_share=0.0, answer=3)
    assert run.traced_growth > 2 << 20
    assert not run.is_flat


def test_memory_that_grows_and_answers_that_differ_are_told() -> None:
    run = Run("mla", "fp32", Found(), (100_000_000, 101_000_000), 1000, ["a.py:1 +1000"], (0.01, 0.02), 1.0)
    assert run.is_flat
    grown = replace(run, rss_bytes=(100_000_000, 150_000_000))
    assert not grown.is_flat
    assert not replace(run, traced_growth=5_000_000).is_flat
    assert "memory grew: mla, fp32: a.py:1 +1000" in table([grown])
    served = ServerRun(100, 10, 0, (100_000_000, 101_000_000), (0.1, 0.1))
    assert served.held
    assert not replace(served, differing=1).held
    assert not replace(served, rss_bytes=(100_000_000, 150_000_000)).held


def test_a_server_beside_leavers_answers_the_same_each_time(mla_bundle: Path) -> None:
    run = run_server(mla_bundle, requests=60, seed=0)
    assert run.requests == 60
    assert run.left > 0
    assert run.held, run.line()
