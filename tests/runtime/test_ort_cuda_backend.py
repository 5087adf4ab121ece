"""The CUDA provider is there and does the work, or one line says why not: nothing falls to the CPU unsaid."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mythos_edge.exporter.ort_cuda_target import build_ort_cuda_target
from mythos_edge.model.errors import BackendUnavailable
from mythos_edge.runtime import ort_cuda_backend
from mythos_edge.runtime.backend import OrtBackend, import_onnxruntime
from mythos_edge.runtime.ort_cuda_backend import PROVIDER, OrtCudaBackend, ort_cuda_session
from mythos_edge.runtime.session import Session

CPU = "CPUExecutionProvider"


@dataclass
class _Part:
    """What a session says of the nodes placed on one provider."""

    ep_name: str
    ops: list[str]

    def get_nodes(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(op_type=op) for op in self.ops]


@dataclass
class _FakeOnnxruntime:
    """onnxruntime-gpu as far as sessions are made with it; the graphs run on the CPU's kernels of the real one."""

    __version__: str = "1.31.1"
    available: tuple[str, ...] = (PROVIDER, CPU)
    used: tuple[str, ...] = (PROVIDER, CPU)
    parts: tuple[_Part, ...] = (_Part(PROVIDER, ["Gemm", "MoE"]), _Part(CPU, ["Squeeze", "Concat"]))
    asked: list[tuple[list[str], dict[str, str]]] = field(default_factory=list)
    __file__: str = "/nowhere/onnxruntime/__init__.py"

    def get_available_providers(self) -> list[str]:
        return list(self.available)

    def preload_dlls(self) -> None:
        print("Failed to load libcublasLt.so.13")

    def set_default_logger_severity(self, severity: int) -> None:
        assert severity == 4

    def SessionOptions(self) -> Any:
        return import_onnxruntime().SessionOptions()

    def InferenceSession(self, path: str, options: Any, providers: list[str]) -> Any:
        entry = "session.record_ep_graph_assignment_info"
        self.asked.append((providers, {entry: options.get_session_config_entry(entry)}))
        real = import_onnxruntime().InferenceSession(path, options, providers=[CPU])
        return SimpleNamespace(
            get_providers=lambda: list(self.used),
            get_provider_graph_assignment_info=lambda: self.parts,
            io_binding=real.io_binding,
            run_with_iobinding=real.run_with_iobinding,
        )


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    path = Path(shutil.copytree(demo_bundle, tmp_path / "demo.bundle"))
    build_ort_cuda_target(path, dtype="fp32")
    return path


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., _FakeOnnxruntime]:
    def install(**options: Any) -> _FakeOnnxruntime:
        fake = _FakeOnnxruntime(**options)
        monkeypatch.setattr(ort_cuda_backend, "import_onnxruntime", lambda: fake)
        return fake

    return install


def test_the_target_name_decides_the_backend(
    bundle: Path, installed: Callable[..., _FakeOnnxruntime], capsys: pytest.CaptureFixture[str]
) -> None:
    fake = installed()
    with Session.open(bundle, target="ort-cuda-fp32") as gpu, Session.open(bundle) as cpu:
        assert isinstance(gpu.backend, OrtCudaBackend)
        assert type(cpu.backend) is OrtBackend
        wanted, found = (one.generate([90, 90, 91, 15], max_new_tokens=4, stop_ids=()).ids for one in (cpu, gpu))
        assert found == wanted
    assert fake.asked == [([PROVIDER], {"session.record_ep_graph_assignment_info": "1"})] * 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"available": (CPU,)}, r"is the build for CPUs .*: run `pip uninstall --yes onnxruntime && pip install"),
        ({"__version__": "1.27.2"}, r"onnxruntime-gpu is 1.27.2, expected 1.31 or newer.*run `pip install --upgrade"),
        ({"used": (CPU,)}, r"could not load its CUDAExecutionProvider: .*No such file.*run `pip install"),
        (
            {"parts": (_Part(PROVIDER, ["Gemm"]), _Part(CPU, ["Squeeze", "QMoE", "Gather"]))},
            r"(step|prelude).*onnxruntime-gpu 1.31.1 has no CUDA kernel for Gather, QMoE, and",
        ),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    bundle: Path, installed: Callable[..., _FakeOnnxruntime], options: dict[str, Any], message: str
) -> None:
    installed(**options)
    with pytest.raises(BackendUnavailable, match=message) as caught:
        Session.open(bundle, target="ort-cuda-fp32")
    assert "\n" not in str(caught.value)


def test_the_build_for_cpus_is_refused(bundle: Path) -> None:
    """With the onnxruntime that is really installed here."""
    if PROVIDER in import_onnxruntime().get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    with pytest.raises(BackendUnavailable, match="onnxruntime-gpu"):
        ort_cuda_session(bundle / "step.ort-cuda-fp32.onnx")


@pytest.mark.gpu
def test_parity_on_the_gpu(bundle: Path) -> None:
    if PROVIDER not in import_onnxruntime().get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    with Session.open(bundle, target="ort-cuda-fp32") as gpu, Session.open(bundle) as cpu:
        wanted, found = (one.score([[90, 90, 91, 15, 3]], policy="full").logits for one in (cpu, gpu))
    assert abs(found - wanted).max() < 1e-3 * abs(wanted).max()
