"""Bundles for a fake GPU: TensorRT targets whose engines ONNX Runtime runs, and targets of ONNX Runtime itself."""

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from built import build_cuda
from conftest import copy_links
from fakes.driver import FakeDriver
from fakes.onnxruntime import FakeOnnxruntime
from fakes.tensorrt import VERSION, FakeTensorRT, plan_of

from mythos_edge.exporter.lowering.tensorrt import EngineOptions, lower_for_tensorrt
from mythos_edge.exporter.targets import spec as spec_module
from mythos_edge.exporter.targets.gpus import Gpus
from mythos_edge.exporter.targets.spec import Written
from mythos_edge.exporter.targets.tensorrt import TensorRTTarget
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.bundle_writer import record_of, update_manifest
from mythos_edge.model.target_options import EngineSpec, Profile
from mythos_edge.plugins import kernel_store, trt_bindings, trt_plugins
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.runtime.backends import ort_cuda as ort_cuda_backend

MAX_ROWS = 6
MAX_CONTEXT = 48
KERNELS = "ef" * 32


@pytest.fixture(scope="session")
def engine_bundle(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``engine_bundle(checkpoint, dtype)``: a bundle with the target ``rtx-sm89-<dtype>`` whose engines are fakes.

    With ``layout="loop"`` it is ``rtx-sm89-<dtype>-loop``.
    """
    made: dict[tuple[Path, str, str], Path] = {}

    def build(checkpoint: Path, dtype: str, layout: str = "step") -> Path:
        key = (checkpoint, dtype, layout)
        if key not in made:
            path = tmp_path_factory.mktemp("engines") / "with.bundle"
            shutil.copytree(exported(checkpoint), path)
            _add_target(path, EngineOptions(dtype, layout, "none", MAX_CONTEXT, MAX_ROWS))
            made[key] = path
        return made[key]

    return build


def _add_target(path: Path, options: EngineOptions) -> None:
    bundle, name = open_bundle(path), TensorRTTarget(Gpus("rtx", (89,)), options.dtype, layout=options.layout).name
    graphs = path.with_suffix(".graphs")
    graphs.mkdir()
    lowered = lower_for_tensorrt(bundle, graphs, options)
    copy_links(graphs)
    records = {}
    for stage, graph in lowered.graphs.items():
        plan = path / f"{stage}.{name}.engine"
        plan.write_bytes(plan_of(graph, MAX_ROWS, MAX_CONTEXT))
        records[plan.name] = record_of(plan)
    written = Written(
        graphs={stage: f"{stage}.{name}.engine" for stage in lowered.graphs},
        compute_dtype=options.dtype,
        weights={"experts": options.dtype},
        fixed_bytes=lowered.fixed_bytes,
        step_bytes=lowered.step_bytes,
        summary=options.dtype,
        options=EngineSpec(
            flavour="rtx",
            version=VERSION,
            compute_capabilities=(89,),
            device="",
            layout=options.layout,
            max_context=MAX_CONTEXT,
            max_rows=MAX_ROWS,
            profiles=(Profile(1, 1), Profile(MAX_ROWS, MAX_ROWS)),
            plugin_layers=lowered.plugins,
            kernels=KERNELS,
        ),
    )
    spec = spec_module.record_of("tensorrt", written, bundle.manifest.identity)
    files = {**bundle.manifest.files, **records}
    update_manifest(bundle, targets={**bundle.manifest.targets, name: spec}, files=files)


def _running_columns(
    driver: FakeDriver, grid: Any, halt_mass: int, threshold: int, count: int, columns: int, *_: Any
) -> None:
    mass, limit = driver.array(halt_mass, np.float32, (columns,)), driver.array(threshold, np.float32, ())
    below = np.flatnonzero(mass < limit)
    driver.array(count, np.int32, ())[...] = below[-1] + 1 if len(below) else 0


def _output_so_far(dtype: type) -> Callable[..., None]:
    def kernel(
        driver: FakeDriver,
        grid: tuple[int, ...],
        out: int,
        halt_mass: int,
        threshold: int,
        so_far: int,
        dim: int,
        *_: Any,
    ) -> None:
        rows = grid[0]
        mass, limit = driver.array(halt_mass, np.float32, (rows,)), driver.array(threshold, np.float32, ())
        share = np.where((mass > 0) & (mass < limit), mass, np.float32(1))[:, None]
        made = driver.array(out, dtype, (rows, dim)).astype(np.float32) / share
        driver.array(so_far, dtype, (rows, dim))[...] = made

    return kernel


_KERNELS = {
    "running_columns": _running_columns,
    "output_so_far_fp32": _output_so_far(np.float32),
    "output_so_far_fp16": _output_so_far(np.float16),
}


def _kernel(name: str, compute_capability: int) -> SimpleNamespace:
    """A compiled kernel in which the fake driver finds one of those above."""
    assert compute_capability == 89
    return SimpleNamespace(
        name=name,
        entry=name,
        cubin=name.encode(),
        threads=128,
        shared_bytes=0,
        hidden_pointers=2,
        sha256=f"sha256 of {name}",
    )


@pytest.fixture(params=[False, True], ids=["at once", "delayed"])
def driver(request: pytest.FixtureRequest) -> FakeDriver:
    made = FakeDriver(delayed=request.param)
    made.kernels = _KERNELS
    return made


@pytest.fixture
def fake_gpu(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """The driver that is found, and kernels that it can run."""
    monkeypatch.setattr(Driver, "load", lambda: driver)
    monkeypatch.setattr(kernel_store, "kernel", _kernel)
    return driver


@pytest.fixture
def trt(fake_gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT(fake_gpu)
    monkeypatch.setattr(trt_bindings, "load", lambda flavour: fake)
    monkeypatch.setattr(trt_bindings, "logger", lambda trt: None)
    monkeypatch.setattr(trt_bindings, "messages", lambda trt: fake.messages)
    monkeypatch.setattr(trt_plugins, "register", lambda trt: None)
    monkeypatch.setattr(kernel_store, "manifest_sha256", lambda: KERNELS)
    return fake


@pytest.fixture(scope="module")
def golden_targets(golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network, sensitive on purpose, with both targets."""
    return _with_targets(golden_bundle, tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def targets(mla_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of one of the networks."""
    return _with_targets(mla_bundle, tmp_path_factory.mktemp("mla"))


def _with_targets(bundle: Path, folder: Path) -> Path:
    path = Path(shutil.copytree(bundle, folder / "with.bundle"))
    build_cuda(path, dtype="fp32")
    return path


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    path = Path(shutil.copytree(demo_bundle, tmp_path / "demo.bundle"))
    build_cuda(path, dtype="fp32")
    return path


@pytest.fixture
def installed(fake_gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeOnnxruntime]]:
    """``installed(**options)``: onnxruntime-gpu as ``FakeOnnxruntime`` is; all that it opened is given back."""

    def install(**options: Any) -> FakeOnnxruntime:
        fake = FakeOnnxruntime(fake_gpu, **options)
        monkeypatch.setattr(ort_cuda_backend, "import_onnxruntime", lambda: fake)
        return fake

    yield install
    gc.collect()
    assert fake_gpu.live_bytes == 0
