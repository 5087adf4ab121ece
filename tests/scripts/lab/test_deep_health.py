"""Healthy models of random shapes, of which the deep comparison must name nothing: a fast part of the lab's run."""

from pathlib import Path

import pytest

from mythos_edge.scripts.lab.deep_health import alarms

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seed", [1, 5])
def test_nothing_is_named_in_a_healthy_model(tmp_path: Path, seed: int) -> None:
    found = dict(alarms(seed, tmp_path, ("fp32", "int4")))

    assert found["fp32"] is None
    assert set(found.values()) == {None}
