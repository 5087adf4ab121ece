"""``pack``: a packed bundle is small, says the same as its source, and says where to go for what it no longer has."""

import errno
import shutil
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
from built import build_cpu
from command_line import Ran, refused
from conftest import ROOT
from sample_bundle import tree

from mythos_edge.model.bundle import open_bundle
from mythos_edge.runtime.session import Session

DEMO = ROOT / "scripts" / "assets" / "carry_adder.pt"
IDS = [90, 90, 91, 15, 22]


def _ids(bundle: Path, target: str) -> tuple[list[int], list[int]]:
    with Session.open(bundle, target=target) as session:
        generation = session.generate(IDS, max_new_tokens=12)
    return list(generation.ids), list(generation.depths)


def _bytes(bundle: Path) -> int:
    return sum(len(data) for data in tree(bundle).values())


@pytest.fixture(params=["ort-cpu", "ort-cpu-int4"])
def packed(run: Callable[..., Ran], rounded_bundle: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    output = tmp_path / "small.bundle"
    ran = run("pack", rounded_bundle, "--target", request.param, "-o", output, "--json")
    assert ran.code == 0, ran.err
    assert ran.json == {
        "bundle": str(output),
        "targets": [request.param],
        "bytes": sum(record.bytes for record in open_bundle(output).manifest.files.values()),
        "of": sum(record.bytes for record in open_bundle(rounded_bundle).manifest.files.values()),
    }
    return output


def test_it_is_small_and_says_the_same(run: Callable[..., Ran], rounded_bundle: Path, packed: Path) -> None:
    target = next(iter(open_bundle(packed).manifest.targets))
    assert _bytes(packed) < 0.6 * _bytes(rounded_bundle)
    assert _ids(packed, target) == _ids(rounded_bundle, target)
    assert run("validate", packed).code == 0
    with Session.open(packed) as small, Session.open(rounded_bundle, target=target) as whole:
        scores = [session.score([IDS]).logits for session in (small, whole)]
    np.testing.assert_array_equal(*scores)


def test_saved_sessions_go_on(rounded_bundle: Path, packed: Path, tmp_path: Path) -> None:
    target = next(iter(open_bundle(packed).manifest.targets))
    state = tmp_path / "state.npz"
    with Session.open(rounded_bundle, target=target) as session:
        session.generate(IDS, max_new_tokens=2)
        session.save(state)
        continued = [*session.ids, 15, 22]
        expected = session.generate(continued, max_new_tokens=6).ids
    with Session.open(packed) as session:
        session.restore(state)
        assert session.generate(continued, max_new_tokens=6).ids == expected


def test_what_it_no_longer_has_is_in_the_full_bundle(run: Callable[..., Ran], packed: Path) -> None:
    (target,) = open_bundle(packed).manifest.targets
    before = tree(packed)
    source = "the bundle it was packed from"
    refused(run("build", packed, "--weights", "int8"), f"was packed for {target}", source)
    refused(run("inline", packed), f"was packed for {target}", source)
    refused(run("validate", packed, "--against", DEMO), f"was packed for {target}", source)
    refused(run("generate", packed, "--ids", "1,2", "--target", "ort-cpu-int8"), "pack it from the full bundle")
    refused(run("pack", packed, "--target", "ort-cpu-int8", "-o", packed.parent / "z"), "pack it from the full bundle")
    assert tree(packed) == before
    assert not (packed.parent / "z").exists()


def test_wrong_requests_leave_nothing(run: Callable[..., Ran], rounded_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "small.bundle"
    refused(run("pack", rounded_bundle, "--target", "ort-cpu-int9", "-o", output), "'ort-cpu-int9'", "ort-cpu-int4")
    refused(run("pack", rounded_bundle, "--target", ",", "-o", output), "expected names of targets")
    refused(run("pack", rounded_bundle, "--target", "ort-cpu", "-o", rounded_bundle / "a"), "choose another folder")
    weights = rounded_bundle / "weights.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    refused(run("pack", rounded_bundle, "--target", "ort-cpu-int4", "-o", output), "weights.safetensors", "sha256")
    assert sorted(file.name for file in tmp_path.iterdir()) == [rounded_bundle.name]


def test_several_targets_stay_in_the_order_asked_for(run: Callable[..., Ran], rounded_bundle: Path) -> None:
    build_cpu(rounded_bundle, "int8")
    output = rounded_bundle.parent / "two.bundle"
    names = ["ort-cpu-int8", "ort-cpu-int4"]
    assert run("pack", rounded_bundle, "--target", ",".join(names), "-o", output).code == 0
    assert list(open_bundle(output).manifest.targets) == names
    for name in names:
        assert _ids(output, name) == _ids(rounded_bundle, name)


def test_a_bundle_of_links_is_packed_to_files(run: Callable[..., Ran], rounded_bundle: Path, tmp_path: Path) -> None:
    linked, store = tmp_path / "linked", tmp_path / "store"
    linked.mkdir()
    shutil.copytree(rounded_bundle, store)
    for file in store.iterdir():
        (linked / file.name).symlink_to(file)
    output = tmp_path / "small.bundle"
    assert run("pack", linked, "--target", "ort-cpu-int4", "-o", output).code == 0
    assert not any(file.is_symlink() for file in output.iterdir())
    assert _ids(output, "ort-cpu-int4") == _ids(rounded_bundle, "ort-cpu-int4")


def test_the_tokenizer_stays(run: Callable[..., Ran], text_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "small.bundle"
    assert run("pack", text_bundle, "--target", "ort-cpu", "-o", output).code == 0
    texts = [run("generate", bundle, "-p", "def ", "--max-new-tokens", 8).out for bundle in (text_bundle, output)]
    assert texts[0] == texts[1] != ""


def test_tune_wants_a_reference_that_is_not_rounded(
    run: Callable[..., Ran], rounded_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "small.bundle"
    assert run("pack", rounded_bundle, "--target", "ort-cpu-int4", "-o", output).code == 0
    np.save(tmp_path / "ids.npy", np.arange(64).reshape(2, 32))
    refused(run("tune", output, "--data", tmp_path / "ids.npy"), "ort-cpu-int4 is rounded", "tune the full bundle")


class _Unreadable(FileIO):
    def readinto(self, buffer: object) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_weights_that_cannot_be_read_and_a_disk_that_cannot_be_written_are_told_apart(
    run: Callable[..., Ran], rounded_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("pack", rounded_bundle, "--target", "ort-cpu-int4", "-o", tmp_path / "small")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mythos_edge.model.entry_reader.FileIO", _Unreadable)
        refused(run(*argv), "weights.safetensors: cannot read ", "Input/output error")
    for writes, told in {"os.pwrite": "cannot write weights.safetensors", "shutil.copyfile": "cannot copy"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(writes, full)
            refused(run(*argv), told, "No space left on device")
    assert list(tmp_path.iterdir()) == [rounded_bundle]
