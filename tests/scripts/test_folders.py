"""Where bundles are written and by how many at once, through the installed command."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from built import build_cpu
from conftest import ROOT
from sample_bundle import tree

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.manifest import MANIFEST_FILE

COMMAND = str(Path(sys.executable).with_name("mythos-edge"))
DEMO = str(ROOT / "scripts" / "assets" / "carry_adder.pt")


def _start(*argv: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [COMMAND, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def _done(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return out


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "some.bundle"))


def test_builds_of_different_targets_at_once_leave_all(bundle: Path) -> None:
    wishes = (["fp32"], ["int8"], ["int4"], ["none", "--target", "ort-cuda"])
    for process in [_start("build", bundle, "--weights", *wish, "--json") for wish in wishes]:
        _done(process)
    built = open_bundle(bundle, hashes=True)
    assert set(built.manifest.targets) == {
        "ort-cpu", "ort-cpu-fp32", "ort-cpu-int8", "ort-cpu-int4", "ort-cuda-fp16"
    }  # fmt: skip
    assert set(tree(bundle)) == {*built.manifest.files, MANIFEST_FILE}


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_is_ended_leaves_the_target_before(rounded_bundle: Path, sent: signal.Signals) -> None:
    bundle, before = rounded_bundle, open_bundle(rounded_bundle)
    process = _start("build", bundle, "--weights", "int4", "--block", 32)
    for _ in range(600):
        if list(bundle.glob(".*.partial-*/weights.*")) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert open_bundle(bundle, hashes=True) == before
    after = build_cpu(bundle, "fp32").manifest
    assert after.targets["ort-cpu-int4"].options["block"] == 64
    assert set(tree(bundle)) == {*after.files, MANIFEST_FILE}


def test_the_folder_one_works_in_is_filled(tmp_path: Path) -> None:
    """As is a mount point, of which every system test would need to be root; see ``model/test_several_writers``."""
    out = subprocess.run(
        [COMMAND, "export", DEMO, "-o", ".", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(out)["bundle"] == "."
    exported = open_bundle(tmp_path, hashes=True).manifest
    assert set(tree(tmp_path)) == {*exported.files, MANIFEST_FILE}
    assert {file.parent for file in tmp_path.rglob("*")} == {tmp_path}
    again = subprocess.run(
        [COMMAND, "export", DEMO, "-o", "."], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1
    assert again.stderr.splitlines() == ["error: . exists: choose another folder or pass --force"]
