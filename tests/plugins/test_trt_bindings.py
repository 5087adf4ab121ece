"""The door to TensorRT, with the real bindings of TensorRT for RTX."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mythos_edge.model.errors import BackendUnavailable, BuildError
from mythos_edge.plugins import trt_bindings


@pytest.fixture
def rtx() -> ModuleType:
    return pytest.importorskip("tensorrt_rtx", exc_type=ImportError)


def test_rtx_is_asked_for_gpus_by_name(rtx: ModuleType) -> None:
    assert trt_bindings.load("rtx") is rtx
    assert trt_bindings.version(rtx) == rtx.__version__
    assert trt_bindings.names_gpus(rtx)
    assert {75, 80, 86, 89, 120} <= set(trt_bindings.known_compute_capabilities(rtx))
    assert trt_bindings.compute_capability_member(rtx, 89) == rtx.ComputeCapability.SM89
    with pytest.raises(BuildError, match="cannot build for SM 90, expected 75, 80, 86, 89"):
        trt_bindings.compute_capability_member(rtx, 90)
    assert trt_bindings.strongly_typed(rtx) == 1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def test_the_gpus_of_rtx_are_known_without_it(rtx: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = trt_bindings.rtx_compute_capabilities()
    assert asked == trt_bindings.known_compute_capabilities(rtx)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert trt_bindings.rtx_compute_capabilities() == asked


def test_a_missing_library_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailable, match=r"tensorrt cannot be imported.*run `pip install") as failure:
        trt_bindings.load("trt")
    assert failure.value.install == "pip install 'mythos-edge[tensorrt]'"


def test_importing_the_door_opens_nothing() -> None:
    script = "import sys, mythos_edge.plugins.trt_bindings, mythos_edge.plugins.trt_plugins\n"
    script += "assert not {'tensorrt', 'tensorrt_rtx', 'triton', 'torch', 'onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_logger_keeps_errors(rtx: ModuleType) -> None:
    logger, messages = trt_bindings.logger(rtx), trt_bindings.messages(rtx)
    assert trt_bindings.logger(rtx) is logger
    before = len(messages.errors())
    severity = rtx.ILogger.Severity
    logger.log(severity.INFO, "chatter")
    logger.log(severity.WARNING, "careful")
    logger.log(severity.ERROR, "two\nlines")
    logger.log(severity.INTERNAL_ERROR, "worse")
    assert messages.errors()[before:] == ("two lines", "worse")


def test_the_parser_finds_the_library_of_the_bindings(
    rtx: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/somewhere")
    path = trt_bindings.library_path_for_plugins(rtx)["LD_LIBRARY_PATH"]
    folder, other = path.split(os.pathsep)
    assert other == "/somewhere"
    # The very file that is loaded here, not a copy.
    loaded = Path("/proc/self/maps").read_text()
    assert str((Path(folder) / "libtensorrt_rtx.so").resolve()) in loaded
    assert trt_bindings.library_path_for_plugins(rtx) == {"LD_LIBRARY_PATH": path}
    assert len(list(tmp_path.rglob("*"))) == 3


def test_an_unwritable_cache_says_how_to_mend(rtx: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"cannot be written: .*set XDG_CACHE_HOME"):
        trt_bindings.library_path_for_plugins(rtx)
