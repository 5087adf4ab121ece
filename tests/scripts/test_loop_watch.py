"""Watched loop steps: the router is asked again with the rows that the run had, in whatever form they are cached."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES

from mythos_edge.model.bundle import open_bundle
from mythos_edge.runtime.backends.opening import open_backend
from mythos_edge.runtime.halting import Depth
from mythos_edge.runtime.staircase import Staircase
from mythos_edge.scripts.loop_watch import StepRun, Watched, router_probe

COUNT = 12


@pytest.mark.parametrize("name", ["gqa-small", "mla-small"])
@pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])
def test_the_router_sees_the_same_whatever_the_schedule(exported: Callable[..., Path], name: str, cache: str) -> None:
    bundle = open_bundle(exported(FIXTURES / name))
    model, probe = bundle.manifest.model, router_probe(bundle, "ort-cpu", "a test", cache)
    assert probe is not None
    seen: dict[int, np.ndarray] = {}

    def look(run: StepRun) -> None:
        assert run.router_input is not None
        seen.update(zip(run.positions.tolist(), run.router_input, strict=True))

    def inputs(prefill: int) -> np.ndarray:
        """The inputs of the router at the only loop step, of ``prefill`` tokens at once and the others one by one."""
        seen.clear()
        backend = Watched(open_backend(bundle, "ort-cpu", cache=cache), look, probe)
        stairs = Staircase(backend, model, Depth(max_depth=1).resolve(model), COUNT)
        for start, stop in ((0, prefill), *((at, at + 1) for at in range(prefill, COUNT))):
            stairs.feed(np.arange(start, stop)[None], np.arange(stop - start))
        backend.close()
        return np.array([seen[position] for position in range(COUNT)])

    at_once, one_by_one = inputs(COUNT), inputs(1)
    assert np.abs(at_once).max() > 1
    np.testing.assert_allclose(one_by_one, at_once, atol=1e-4 if cache == "fp32" else 2e-2)
