"""What doctor says of machines with and without a GPU and the packages for it."""

from typing import Any

import pytest
from fakes.driver import FakeDriver

from mythos_edge.model.errors import BackendUnavailable
from mythos_edge.model.machine import Memory, Processors
from mythos_edge.scripts import cli, doctor

EXPORT = ("torch", "onnx", "onnx-ir", "onnxscript", "jaxtyping")
RUN = ("numpy", "onnxruntime", "tokenizers")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(*packages: str) -> None:
        monkeypatch.setattr(doctor, "installed", lambda package, module: "1.2.3" if package in packages else None)

    return install


def _no_driver() -> Any:
    raise BackendUnavailable("no NVIDIA driver", "nvidia-smi")


def test_a_machine_without_a_gpu_still_builds(installed: Any) -> None:
    installed(*RUN, *EXPORT, "tensorrt-rtx-cu13")
    report = doctor.examine(_no_driver)
    assert (report["gpus"], report["no_gpu"]) == ([], "none: no NVIDIA driver: run `nvidia-smi`")
    assert report["targets"] == {
        "ort-cpu": {"build": "yes", "run": "yes"},
        "ort-cuda": {"build": "yes", "run": "no (needs ort-cuda and a GPU of sm75 or newer)"},
        "rtx-smXX": {"build": "yes", "run": "no (needs a GPU of TensorRT for RTX)"},
        "trt-this-gpu": {
            "build": "no (needs tensorrt and a GPU of sm75 or newer)",
            "run": "no (needs tensorrt and a GPU of sm75 or newer)",
        },
    }


def test_gpus_are_named_with_the_targets_for_them(installed: Any) -> None:
    installed("numpy", "tokenizers", "onnxruntime-gpu", "tensorrt", *EXPORT)
    driver = FakeDriver(devices=(89, 90, 70), total_bytes=16 << 30)
    report = doctor.examine(lambda: driver)
    assert [gpu["targets"] for gpu in report["gpus"]] == [
        ["rtx-sm89", "trt-this-gpu", "ort-cuda"],
        ["trt-this-gpu", "ort-cuda"],
        [],
    ]
    assert report["gpus"][0] == {
        "name": "Fake GPU 0",
        "compute_capability": 89,
        "memory_gb": 17.2,
        "targets": ["rtx-sm89", "trt-this-gpu", "ort-cuda"],
    }
    # onnxruntime-gpu is the module onnxruntime.
    assert report["can"]["run"]["ok"]
    assert report["targets"]["ort-cuda"] == {"build": "yes", "run": "yes"}
    assert report["targets"]["trt-this-gpu"] == {"build": "yes", "run": "yes"}
    assert report["targets"]["rtx-smXX"]["run"] == "no (needs tensorrt-rtx)"


def test_every_missing_purpose_has_an_install_line(
    installed: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed()
    monkeypatch.setattr(doctor.Driver, "load", _no_driver)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert said.count("mend: pip ") == 5
    assert "onnxruntime-gpu missing" in said
    assert "Traceback" not in said


def test_limits_of_a_container_are_told_beside_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "processors", lambda: Processors(64, 1.5))
    monkeypatch.setattr(doctor, "memory", lambda: Memory(30_000_000_000, 3_210_000_000, 4_000_000_000))
    report = doctor.examine(_no_driver)
    assert (report["cores"], report["machine_cores"], report["core_limit"]) == (2, 64, 1.5)
    memory = {name: report[name] for name in ("free_memory_gb", "machine_free_memory_gb", "memory_limit_gb")}
    assert memory == {"free_memory_gb": 3.2, "machine_free_memory_gb": 30.0, "memory_limit_gb": 4.0}
    cli.main(["doctor"])
    said = capsys.readouterr().out
    assert "2 (this container's limit: 1.5; the machine: 64 cores)\n" in said
    assert "3.2 (this container's limit: 4; the machine: 30.0 GB free)\n" in said
    monkeypatch.setattr(doctor, "processors", lambda: Processors(64, None))
    cli.main(["doctor"])
    assert "cores           64\n" in capsys.readouterr().out
