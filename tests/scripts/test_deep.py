import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import build_cpu
from conftest import FIXTURES
from deep_runs import MODELS, deep
from planted_faults import Planted

from mythos_edge.runtime.slots import Slot

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_the_deep_level_is_told_and_is_the_exit_code(run: Callable[..., Any], mla_bundle: Path) -> None:
    ran = run(
        "validate", mla_bundle, "--against", FIXTURES / "mla-small", "--level", "deep", "--positions", 6, "--json"
    )

    assert ran.code == 0
    report = json.loads(ran.out.splitlines()[-1])
    assert report["passed"] is True
    assert report["first_divergence"] is None
    assert report["router_agreement"] == 1.0
    assert report["parts"].keys() >= {"attention", "experts", "router", "lora", "injection", "halting"}


def test_the_first_divergence_is_told(run: Callable[..., Any], mla_bundle: Path, tmp_path: Path) -> None:
    planted = Planted(mla_bundle, tmp_path / "spoilt.bundle")
    planted.graph("step", lambda graph: graph.bypass("observed/attention.0"))
    arguments = ("validate", planted.path, "--against", FIXTURES / "mla-small", "--level", "deep", "--positions", 6)

    ran = run(*arguments, "--json")

    assert ran.code == 1
    first = json.loads(ran.out.splitlines()[-1])["first_divergence"]
    found = {name: first[name] for name in ("position", "step_index", "part", "class")}
    assert found == {"position": 0, "step_index": 0, "part": "attention", "class": "graph"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--level", "deep"), "--level deep compares with something: add --against CHECKPOINT"),
        (("--level", "smoke", "--against", "fp32"), "--level smoke compares with nothing but an OTHER.onnx"),
        (("--level", "deep", "--against", "fp32"), "--against fp32 is the target ort-cpu itself: name another"),
        (("--level", "deep", "--against", "ort-cpu"), "--against ort-cpu is the target ort-cpu itself: name another"),
        (("--level", "deep", "--against", "x", "--cache", "fp16"), "--cache is for quality"),
        (("--level", "deep", "--against", "x", "--max-kl", "1"), "--max-kl is for quality"),
    ],
)
def test_levels_and_options_that_do_not_go_together(
    run: Callable[..., Any], mla_bundle: Path, options: tuple[str, ...], said: str
) -> None:
    ran = run("validate", mla_bundle, *options)

    assert ran.code == 1
    assert said in ran.err


def test_smoke_is_files_and_self_test(run: Callable[..., Any], mla_bundle: Path) -> None:
    ran = run("validate", mla_bundle, "--level", "smoke")

    assert ran.code == 0
    assert "self-test" in ran.out


def test_nothing_diverges_in_a_rounded_target_by_its_own_yardstick(mla_bundle: Path, tmp_path: Path) -> None:
    bundle = build_cpu(Path(shutil.copytree(mla_bundle, tmp_path / "rounded.bundle")), "int4")

    report = deep(bundle, FIXTURES / "mla-small", target="ort-cpu-int4")

    assert report.first_divergence is None
    assert not report.other_weights
