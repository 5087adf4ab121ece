import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from built import build_cpu
from conftest import FIXTURES
from deep_runs import pair
from planted_faults import FAULTS, Fault, Planted

pytestmark = pytest.mark.usefixtures("one_thread")

# One of every place that a fault can be in: (what, model).
CHOSEN = (
    ("selection bias missing", "mla-small"),
    ("wrong rotary pairing", "mla-small"),
    ("threshold off", "mla-small"),
    ("lora row always the first", "gqa-small"),
    ("an expert zeroed", "gqa-small"),
    ("post-norm dropped", "ouro-small"),
    ("gate dropped", "dory-small"),
)
SOME_FAULTS = [fault for fault in FAULTS if (fault.what, fault.model) in CHOSEN]


@pytest.fixture(scope="module")
def rounded(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a golden with the targets ort-cpu-int8 and ort-cpu-int4 beside ort-cpu."""
    made: dict[str, Path] = {}

    def with_targets(name: str) -> Path:
        if name not in made:
            path = tmp_path_factory.mktemp("rounded") / f"{name}.bundle"
            made[name] = Path(shutil.copytree(exported(FIXTURES / name), path))
            for form in ("int8", "int4"):
                build_cpu(path, form)
        return made[name]

    return with_targets


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("mla-small", ("ort-cpu", "ort-cpu-int8")),
        ("ouro-small", ("ort-cpu-int4", "ort-cpu")),
        ("dory-small", ("ort-cpu-int4", "ort-cpu-int8")),
    ],
)
def test_two_healthy_targets_agree_by_what_rounding_costs(
    rounded: Callable[[str], Path], name: str, targets: tuple[str, str]
) -> None:
    report = pair(rounded(name), *targets)

    assert report.first_divergence is None
    assert not report.missing
    # Their weights are not the same, which is neither hidden nor held against them.
    assert report.growth.max(initial=0) > 1e-3 or report.router_agreement is not None


@pytest.mark.parametrize("fault", SOME_FAULTS, ids=str)
def test_a_fault_in_a_target_is_named_against_a_healthy_one(
    rounded: Callable[[str], Path], tmp_path: Path, fault: Fault
) -> None:
    planted = Planted(rounded(fault.model), tmp_path / "spoilt.bundle")
    fault.plant(planted)

    first = pair(planted.path, "ort-cpu-int8", "ort-cpu").first_divergence

    assert first is not None
    assert (first.part, first.step_index, first.kind) == (fault.part, fault.step_index, fault.kind), first


def test_the_same_is_named_the_other_way_round_with_the_side_that_errs(
    rounded: Callable[[str], Path], tmp_path: Path
) -> None:
    planted = Planted(rounded("mla-small"), tmp_path / "spoilt.bundle")
    planted.graph("step", lambda graph: graph.bypass("observed/attention.0"))

    first = pair(planted.path, "ort-cpu", "ort-cpu-int8").first_divergence

    assert first is not None
    assert (first.part, first.step_index, first.kind) == ("attention", 0, "graph")
    assert first.detail == "the network in torch agrees with ort-cpu-int8, and not with ort-cpu"


def test_the_verb_looks_into_two_targets(
    run: Callable[..., Any], rounded: Callable[[str], Path], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    options = ("--against", "ort-cpu-int8", "--level", "deep", "--positions", 6, "--report", page, "--json")

    ran = run("validate", rounded("ouro-small"), *options)

    assert ran.code == 0
    told = json.loads(ran.out.splitlines()[-1])
    assert told["passed"] is True
    assert told["first_divergence"] is None
    assert told["target"] == "ort-cpu"
    assert told["parts"].keys() >= {"attention", "experts", "injection", "halting", "coda"}
    assert "Target ort-cpu against ort-cpu-int8" in page.read_text()


def test_too_little_memory_is_refused(
    run: Callable[..., Any], rounded: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mythos_edge.scripts.deep_verb.free_memory_bytes", lambda: 1000)

    for against in ("ort-cpu-int8", FIXTURES / "ouro-small"):
        ran = run("validate", rounded("ouro-small"), "--against", against, "--level", "deep")

        assert ran.code == 1
        assert "the deep comparison needs 0.0 GB of memory, 0.0 GB are free: use a larger machine" in ran.err
