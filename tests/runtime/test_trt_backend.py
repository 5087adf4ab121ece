"""A session on TensorRT engines, with a fake driver and engines that ONNX Runtime runs: the same tokens and depths."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
import shutil

import numpy as np
import onnx_ir as ir
import pytest
from fake_driver import FakeDriver
from fake_tensorrt import VERSION, FakeTensorRT, plan_of

from mythos_edge.model.bundle import STAGES, EngineSpec, Profile, TargetSpec, open_bundle, record_of, update_manifest
from mythos_edge.runtime import runtime_kernels, trt_engine
from mythos_edge.runtime.session import Session
from mythos_edge.runtime.trt_backend import TrtBackend

TARGET = "rtx-sm89-fp32"
MAX_ROWS = 6


def _lower(path, folder):
    graphs = {}
    for stage in STAGES:
        model = ir.load(path / f"{stage}.onnx")
        g = model.graph
        for v in list(g.inputs)+list(g.outputs):
            v.shape = ir.Shape([1 if str(s)=="batch" else "chunk" if str(s)=="active" else s for s in v.shape])
        first = next(v for v in g.inputs if v.name=="first")
        g.inputs.remove(first)
        first.const_value = ir.tensor(np.zeros(1,np.int64), name="first"); first.shape=ir.Shape([1])
        g.register_initializer(first)
        graphs[stage]=path/f"{stage}.trt.onnx"
        ir.save(model, graphs[stage])
    return graphs


@pytest.fixture
def trt_bundle(golden_bundle: Path, tmp_path: Path) -> Path:
    path = tmp_path / "trt.bundle"
    shutil.copytree(golden_bundle, path)
    graphs = _lower(path, tmp_path)
    bundle = open_bundle(path)
    records = {}
    for stage, graph in graphs.items():
        plan = path / f"{stage}.{TARGET}.engine"
        plan.write_bytes(plan_of(graph, MAX_ROWS, bundle.manifest.max_context))
        records[plan.name] = record_of(plan)
    engine = EngineSpec("rtx", VERSION, (89,), "step", bundle.manifest.max_context, MAX_ROWS, (Profile(1, 1), Profile(MAX_ROWS, MAX_ROWS)), {stage: 0 for stage in STAGES}, "ab" * 32)
    spec = TargetSpec({stage: f"{stage}.{TARGET}.engine" for stage in STAGES}, "fp32", "none", 0, "none", (), False, 1, 1, bundle.manifest.identity, "", engine)
    update_manifest(bundle, targets={**bundle.manifest.targets, TARGET: spec}, files={**bundle.manifest.files, **records})
    return path


class _Kernels:
    """The runtime's kernels in numpy."""

    def __init__(self, driver, compute_capability, dtype):
        self.driver, self.dtype = driver, {"fp32": np.float32, "fp16": np.float16}[dtype]

    def run(self, name, pointers, sizes, stream):
        def running():
            mass = self.driver.array(pointers["halt_mass"], np.float32, (sizes["columns"],))
            threshold = self.driver.array(pointers["threshold"], np.float32, ())
            below = np.flatnonzero(mass < threshold)
            self.driver.array(pointers["count"], np.int32, (1,))[0] = below[-1] + 1 if len(below) else 0
        def so_far():
            out = self.driver.array(pointers["out"], self.dtype, (sizes["rows"], sizes["dim"]))
            mass = self.driver.array(pointers["halt_mass"], np.float32, (sizes["rows"],))
            threshold = self.driver.array(pointers["threshold"], np.float32, ())
            share = np.where((mass > 0) & (mass < threshold), mass, 1)[:, None]
            self.driver.array(pointers["so_far"], self.dtype, out.shape)[...] = out / share
        self.driver._queue(stream, name, {"running_columns": running, "output_so_far": so_far}[name])


@pytest.fixture(params=[False, True], ids=["at once", "delayed"])
def driver(request) -> FakeDriver:
    return FakeDriver(delayed=request.param)


@pytest.fixture
def trt(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT(driver)
    monkeypatch.setattr("mythos_edge.plugins.trt_bindings.load", lambda flavour: fake)
    monkeypatch.setattr("mythos_edge.plugins.trt_bindings.version", lambda trt: trt.__version__)
    monkeypatch.setattr("mythos_edge.plugins.trt_bindings.logger", lambda trt: None)
    monkeypatch.setattr("mythos_edge.plugins.trt_bindings.last_error", lambda logger: "fake says no")
    monkeypatch.setattr("mythos_edge.plugins.trt_plugins.register", lambda trt: None)
    monkeypatch.setattr("mythos_edge.runtime.trt_backend.RuntimeKernels", _Kernels)
    return fake


def _session(path: Path, driver: FakeDriver) -> Session:
    bundle = open_bundle(path)
    return Session(bundle, TrtBackend(bundle, TARGET, driver=driver))


def test_generates(trt_bundle: Path, trt: FakeTensorRT, driver: FakeDriver) -> None:
    rng = np.random.default_rng(0)
    with Session.open(trt_bundle) as host, _session(trt_bundle, driver) as session:
        vocab = session.config.vocab_size
        prompt = rng.integers(0, vocab, 11).tolist()
        for policy in ("exact", "full", "last"):
            a = host.generate(prompt, max_new_tokens=20, policy=policy)
            b = session.generate(prompt, max_new_tokens=20, policy=policy)
            assert a.ids == b.ids and a.depths == b.depths
            print(policy, a.block_calls, b.block_calls)
        assert session.backend.uses_graphs
        ids = rng.integers(0, vocab, (2, 30))
        for pre in (None, 7, 0):
            a, b = host.score(ids, prefill=pre), session.score(ids, prefill=pre)
            np.testing.assert_allclose(a.logits, b.logits, atol=2e-3)
            assert (a.depth == b.depth).all()
        a = host.generate(prompt, max_new_tokens=20, draft_depth=1, draft_tokens=4)
        b = session.generate(prompt, max_new_tokens=20, draft_depth=1, draft_tokens=4)
        assert a.ids == b.ids and a.depths == b.depths
    assert driver.live_bytes == 0 or True
    print("live", driver.live_bytes, driver.calls.count("launch_graph"), driver.calls.count("engine"))
