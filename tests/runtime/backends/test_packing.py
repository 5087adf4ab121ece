"""Several sequences in one run of a stage, against each alone: on the real graphs of every kind of target."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import build_cpu
from fakes.driver import FakeDriver
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.families.openmythos.config import MythosConfig
from mythos_edge.model.families.table import config_of
from mythos_edge.model.stages import MAX_TOGETHER
from mythos_edge.runtime.backends.device import DeviceMemory
from mythos_edge.runtime.backends.gpu import Gpu
from mythos_edge.runtime.backends.memory import HostMemory
from mythos_edge.runtime.backends.ort_cpu import OrtCpuBackend
from mythos_edge.runtime.backends.packing import Call, packed, unpack

# Rows of another chunk change the blocking of float32 sums; what is rounded to 8 bits may then fall to the next code.
TOLERANCES = {"ort-cpu": 3e-5, "ort-cpu-fp32": 3e-5, "ort-cpu-int8": 2e-2, "ort-cpu-int4": 2e-2}


@pytest.fixture(scope="module", params=TOLERANCES)
def backend(
    request: pytest.FixtureRequest, exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OrtCpuBackend]:
    made = exported(Path(__file__).parents[2] / "fixtures" / "mla-small")
    path = Path(shutil.copytree(made, tmp_path_factory.mktemp("packing") / "mla.bundle"))
    if request.param in ("ort-cpu-int8", "ort-cpu-fp32"):
        build_cpu(path, request.param.removeprefix("ort-cpu-"))
    elif request.param == "ort-cpu-int4":
        build_cpu(path, "int4", block=32)
    bundle = open_bundle(path)
    with OrtCpuBackend(bundle, request.param) as opened:
        opened.name, opened.config = request.param, config_of(bundle.manifest)
        yield opened


def _step(config: MythosConfig, random: np.random.Generator, rows: int, active: int, context: int, index: int) -> Call:
    def noise(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    feeds = {
        "h": noise(1, rows, config.dim),
        "out": noise(1, active, config.dim),
        "halt_mass": 1.5 * random.random((1, active)).astype(np.float32),
        "depth": np.full((1, active), index),
        "e": noise(1, rows, config.dim),
        "step_index": np.full((1, rows), index),
        "threshold": np.array(0.99, np.float32),
        "min_depth": np.array(1),
        "past_0": noise(1, context, config.cache_width),
        "length": np.array(context),
        "first": np.zeros(1, np.int64),
    }
    outputs = {
        "h_next": np.empty((1, rows, config.dim), np.float32),
        "out_next": np.empty((1, active, config.dim), np.float32),
        "halt_mass_next": np.empty((1, active), np.float32),
        "depth_next": np.empty((1, active), np.int64),
        "rows_0": np.empty((1, rows, config.cache_width), np.float32),
    }
    return Call(feeds, outputs)


def _coda(config: MythosConfig, random: np.random.Generator, rows: int, wanted: int, context: int) -> Call:
    past = random.standard_normal((1, context, config.cache_width)).astype(np.float32)
    feeds: dict[str, Any] = {
        "out": random.standard_normal((1, rows, config.dim)).astype(np.float32),
        "logit_rows": np.sort(random.choice(rows, wanted, replace=False)),
        "length": np.array(context),
        "first": np.zeros(1, np.int64),
    }
    outputs = {"logits": np.empty((1, wanted, config.vocab_size), np.float32)}
    for layer in range(config.coda_layers):
        feeds[f"past_{layer}"] = past
        outputs[f"rows_{layer}"] = np.empty((1, rows, config.cache_width), np.float32)
    return Call(feeds, outputs)


def _alone_and_together(backend: OrtCpuBackend, stage: str, calls: list[Call]) -> float:
    """Largest difference of any output, relative to the largest value of that output."""
    alone = []
    for call in calls:
        backend.run(stage, *call)
        alone.append({name: array.copy() for name, array in call.outputs.items()})
        for array in call.outputs.values():
            array.fill(-77)
    backend.run_together(stage, calls)
    differences = [0.0]
    for one, call in zip(alone, calls, strict=True):
        for name, array in call.outputs.items():
            scale = max(1.0, float(np.abs(one[name]).max(initial=0)))
            differences.append(float(np.abs(one[name] - array).max(initial=0)) / scale)
    return max(differences)


sizes = st.tuples(st.integers(1, 6), st.floats(0, 1), st.integers(0, 40), st.integers(0, 5))


@settings(max_examples=25, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=MAX_TOGETHER), st.integers(0, 99))
def test_loop_steps_of_several_sequences(backend: Any, shapes: list[tuple[int, float, int, int]], seed: int) -> None:
    random = np.random.default_rng(seed)
    calls = [
        _step(backend.config, random, rows, round(share * rows), context, index)
        for rows, share, context, index in shapes
    ]
    assert _alone_and_together(backend, "step", calls) < TOLERANCES[backend.name]


@settings(max_examples=15, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=MAX_TOGETHER), st.integers(0, 99))
def test_codas_of_several_sequences(backend: Any, shapes: list[tuple[int, float, int, int]], seed: int) -> None:
    random = np.random.default_rng(seed)
    calls = [_coda(backend.config, random, rows, round(share * rows), context) for rows, share, context, _ in shapes]
    assert _alone_and_together(backend, "coda", calls) < TOLERANCES[backend.name]


@pytest.fixture(params=["host", "device"])
def memory(request: pytest.FixtureRequest, fake_gpu: FakeDriver) -> Iterator[HostMemory | DeviceMemory]:
    if request.param == "host":
        yield HostMemory()
        return
    gpu = Gpu()
    opened = DeviceMemory(gpu, "fp32")
    yield opened
    opened.close()
    gpu.close()
    assert fake_gpu.live_bytes == 0


def _moved(call: Call, memory: Any) -> Call:
    """``call`` with what is not the host's in ``memory``."""
    of_host = ("step_index", "threshold", "min_depth", "length", "first")
    feeds = {name: array if name in of_host else memory.from_host(array) for name, array in call.feeds.items()}
    return Call(feeds, {name: memory.from_host(array) for name, array in call.outputs.items()})


def test_rows_go_back_to_their_sequence(random: np.random.Generator, mla_bundle: Path, memory: Any) -> None:
    config = config_of(open_bundle(mla_bundle).manifest)
    on_host = [_step(config, random, rows, active, 3, 0) for rows, active in ((2, 1), (1, 1), (3, 0))]
    calls = [_moved(call, memory) for call in on_host]
    whole = packed("step", calls, MAX_TOGETHER, memory)
    assert whole.feeds["row_counts"].tolist() == [2, 1, 3, 0, 0, 0, 0, 0]
    assert whole.feeds["positions"][:, 0].tolist() == [3, 4, 3, 3, 4, 5]
    assert np.isinf(memory.to_host(whole.feeds["halt_mass"])[0]).tolist() == [True, False, False, True, True, True]
    h = np.concatenate([call.feeds["h"] for call in on_host], axis=1)
    np.testing.assert_array_equal(memory.to_host(whole.feeds["h"]), h)
    for array in whole.outputs.values():
        numbers = np.arange(array.shape[1]).reshape(1, -1, *[1] * (len(array.shape) - 2))
        array[...] = memory.from_host(np.broadcast_to(numbers, array.shape).astype(array.dtype))
    unpack("step", whole.outputs, calls)
    given_back = [{name: memory.to_host(array) for name, array in call.outputs.items()} for call in calls]
    assert [outputs["h_next"][0, :, 0].tolist() for outputs in given_back] == [[0, 1], [2], [3, 4, 5]]
    assert [outputs["depth_next"][0].tolist() for outputs in given_back] == [[1], [2], []]
