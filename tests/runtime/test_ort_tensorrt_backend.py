"""ONNX Runtime's TensorRT provider on a fake GPU: when engines are built, and whose they are."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fakes.driver import FakeDriver
from fakes.onnxruntime import FakeOnnxruntime
from ort_gpu import TENSORRT, kept_engines, random_prompt

from mythos_edge.exporter.ort_cuda_target import build_ort_cuda_target
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.bundle_writer import record_of, update_manifest
from mythos_edge.model.errors import BundleError, MythosEdgeError, UsageError
from mythos_edge.runtime import ort_gpu_session, ort_tensorrt_backend
from mythos_edge.runtime.ort_tensorrt_backend import _EngineFolder
from mythos_edge.runtime.session import Session


def test_no_engine_is_built_after_the_target_was_opened(
    targets: Path, installed: Callable[..., FakeOnnxruntime]
) -> None:
    fake = installed()
    with Session.open(targets, target=TENSORRT) as session:
        built = fake.builds
        assert built > 0
        for count in (1, 2, 4):
            session.generate(random_prompt(session, count), max_new_tokens=3)
        for policy in ("exact", "full", "last"):
            session.generate(random_prompt(session, 23), max_new_tokens=5, policy=policy, chunk=9)
            session.generate(random_prompt(session, 9), max_new_tokens=5, draft_depth=1, draft_tokens=3)
        most = open_bundle(targets).manifest.max_context
        assert (
            session.generate(random_prompt(session, most - 1), max_new_tokens=9, chunk=most).finish_reason == "context"
        )
        assert fake.builds == built


def test_engines_of_other_weights_gpus_or_libraries_are_not_shared(
    bundle: Path,
    installed: Callable[..., FakeOnnxruntime],
    driver: FakeDriver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = installed()
    build_ort_cuda_target(bundle, dtype="fp32", provider="tensorrt")

    def kept() -> int:
        Session.open(bundle, target=TENSORRT).close()
        return len(kept_engines(tmp_path))

    assert [kept(), kept()] == [1, 1]
    fake.__version__ = "1.32.0"
    assert kept() == 2
    monkeypatch.setattr(ort_tensorrt_backend, "tensorrt_version", lambda: 101600)
    assert kept() == 3
    monkeypatch.setattr(driver, "device_name", lambda device: "Another GPU")
    assert kept() == 4
    # All that the manifest says of the bundle stays the same but the weights' hash.
    opened, weights = open_bundle(bundle), bundle / "weights.safetensors"
    _flip_last_byte(weights)
    update_manifest(opened, files={**opened.manifest.files, weights.name: record_of(weights)})
    assert open_bundle(bundle).manifest.identity == opened.manifest.identity
    assert kept() == 5


@pytest.mark.parametrize("name", ["weights.safetensors", "step.ort-cuda-fp32-tensorrt.onnx"])
def test_no_engine_is_built_of_files_that_have_changed(
    name: str, bundle: Path, installed: Callable[..., FakeOnnxruntime], tmp_path: Path
) -> None:
    """It would be taken for that of every bundle with the same manifest."""
    installed()
    build_ort_cuda_target(bundle, dtype="fp32", provider="tensorrt")
    _flip_last_byte(bundle / name)
    with pytest.raises(BundleError, match=f"{name}: has changed"):
        Session.open(bundle, target=TENSORRT)
    assert not kept_engines(tmp_path)


def test_engines_are_kept_when_all_are_there(
    targets: Path, installed: Callable[..., FakeOnnxruntime], tmp_path: Path
) -> None:
    fake = installed()
    fake.fails_at = "coda"
    with pytest.raises(MythosEdgeError, match=r"an illegal address$"):
        Session.open(targets, target=TENSORRT)
    assert fake.builds > 0
    assert not kept_engines(tmp_path)
    fake.fails_at = None
    Session.open(targets, target=TENSORRT).close()
    (folder,) = kept_engines(tmp_path)
    assert len(list(folder.iterdir())) == 15
    fake.fails_at = "coda"
    with pytest.raises(MythosEdgeError, match=f"engines of an earlier time: if they are why, delete {folder}"):
        Session.open(targets, target=TENSORRT)
    assert kept_engines(tmp_path) == [folder]


def test_engines_of_whoever_was_faster_stay(
    targets: Path, installed: Callable[..., FakeOnnxruntime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed()
    keep = _EngineFolder.keep

    def after_another(folder: _EngineFolder) -> None:
        theirs = folder.path.with_name(folder.path.name.removeprefix(".").partition(".")[0])
        theirs.mkdir()
        (theirs / "theirs.engine").write_bytes(b"")
        keep(folder)

    monkeypatch.setattr(_EngineFolder, "keep", after_another)
    with Session.open(targets, target=TENSORRT) as session:
        session.generate(random_prompt(session, 3), max_new_tokens=2)
    (folder,) = kept_engines(tmp_path)
    assert [file.name for file in folder.iterdir()] == ["theirs.engine"]


def test_the_cache_must_be_writable(targets: Path, installed: Callable[..., FakeOnnxruntime], tmp_path: Path) -> None:
    installed()
    (tmp_path / "user").write_text("a file")
    with pytest.raises(UsageError, match="cannot be written: Not a directory: set XDG_CACHE_HOME"):
        Session.open(targets, target=TENSORRT)


def test_warming_up_keeps_no_caches(
    targets: Path, installed: Callable[..., FakeOnnxruntime], driver: FakeDriver
) -> None:
    installed()
    with Session.open(targets, target=TENSORRT) as session:
        # What is kept counts as free here, and is not for ONNX Runtime.
        assert session.backend.memory.free_bytes() == driver.memory_info()[0]


def test_float32_stays_whole_whatever_the_user_has_set(
    targets: Path, installed: Callable[..., FakeOnnxruntime], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed()
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(UsageError, match=r"NVIDIA_TF32_OVERRIDE is '1', expected 0 for float32 on Tens.*: unset it"):
        Session.open(targets, target=TENSORRT)
    assert ort_gpu_session.os.environ["NVIDIA_TF32_OVERRIDE"] == "1"


def _flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
