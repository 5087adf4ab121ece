"""The self-test on the device: what the exporter saw passes, anything else is one line and nothing is generated."""

import dataclasses
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import build_cpu
from command_line import Ran, refused
from conftest import FIXTURES

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.bundle_writer import update_manifest
from mythos_edge.model.errors import SelfTestError, UsageError
from mythos_edge.runtime.backends.ort_cpu import OrtCpuBackend
from mythos_edge.runtime.selftest import self_test
from mythos_edge.runtime.session import Session


def with_sample(bundle: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a bundle whose golden sample says otherwise."""
    made = Path(shutil.copytree(bundle, folder / "other.bundle"))
    opened = open_bundle(made)
    update_manifest(opened, sample=dataclasses.replace(opened.manifest.sample, **changes))
    return made


@pytest.fixture
def other(mla_bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose exporter saw logits that are larger by a thousandth."""
    sample = open_bundle(mla_bundle).manifest.sample
    return with_sample(mla_bundle, tmp_path, top_logits=tuple(1.001 * number for number in sample.top_logits))


@pytest.mark.parametrize("name", ["mla-small", "gqa-small", "ouro-small", "dory-small", "nanbeige-small"])
def test_every_family_passes_and_leaves_no_sequence(exported: Callable[..., Path], name: str) -> None:
    bundle = exported(FIXTURES / name)
    with Session.open(bundle, selftest=True) as session:
        with pytest.raises(UsageError, match="no sequence yet"):
            _ = session.ids
        told = session.generate([1, 2, 3], max_new_tokens=4)
        found = self_test(session)
    assert found.passed
    assert found.tie == ""
    assert found.max_abs < found.allowed
    with Session.open(bundle) as session:
        assert session.generate([1, 2, 3], max_new_tokens=4).ids == told.ids


def test_other_numbers_are_an_error_and_close_the_session(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(OrtCpuBackend, "close", lambda self: closed.append(self))
    with pytest.raises(SelfTestError, match=r"other\.bundle: the self-test failed: .* target 'ort-cpu' differ by"):
        Session.open(other, selftest=True)
    assert len(closed) == 1
    Session.open(other).close()  # nobody asked
    with pytest.raises(UsageError, match="selftest is 'yes'"):
        Session.open(other, selftest="yes")  # type: ignore[arg-type]


def test_logits_that_are_none_and_other_depths(
    mla_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = open_bundle(mla_bundle).manifest.sample
    depths = with_sample(mla_bundle, tmp_path, depth=tuple(3 - depth for depth in sample.depth))
    with pytest.raises(SelfTestError, match="come of other depths"):
        Session.open(depths, selftest=True)
    run = OrtCpuBackend.run

    def broken(self: Any, stage: str, feeds: Any, outputs: Any) -> None:
        run(self, stage, feeds, outputs)
        if stage == "coda":
            outputs["logits"][...] = np.nan

    monkeypatch.setattr(OrtCpuBackend, "run", broken)
    with pytest.raises(SelfTestError, match="are not finite"):
        Session.open(mla_bundle, selftest=True)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_rounded_target_is_told_from_garbage(mla_bundle: Path, tmp_path: Path, weights: str) -> None:
    bundle = Path(shutil.copytree(mla_bundle, tmp_path / "rounded.bundle"))
    build_cpu(bundle, weights)
    target = f"ort-cpu-{weights}"
    Session.open(bundle, target=target, selftest=True).close()
    opened = open_bundle(bundle)
    numbers = np.array(opened.manifest.sample.top_logits)
    for garbage in (numbers[::-1] - 9, -numbers):
        update_manifest(opened, sample=dataclasses.replace(opened.manifest.sample, top_logits=tuple(garbage.tolist())))
        with pytest.raises(SelfTestError, match=target):
            Session.open(bundle, target=target, selftest=True)


def test_verbs_generate_nothing_where_it_fails(
    other: Path, mla_bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    argv = ("--ids", "1,2,3", "--max-new-tokens", 3, "--selftest")
    assert run("generate", mla_bundle, *argv).out == run("generate", mla_bundle, *argv[:-1]).out != ""
    refused(run("generate", other, *argv), "the self-test failed")
    (tmp_path / "prompts.jsonl").write_text('{"ids": [1, 2]}\n')
    results = tmp_path / "results.jsonl"
    refused(run("generate", other, "--file", tmp_path / "prompts.jsonl", "-o", results, "--selftest"), "self-test")
    assert not results.exists() or not results.read_text()
    refused(run("chat", other, "--selftest"), "the self-test failed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        refused(run("serve", other, "--port", free.getsockname()[1], "--selftest"), "the self-test failed")


def test_validate_says_the_same(other: Path, run: Callable[..., Ran]) -> None:
    ran = run("validate", other, "--json")
    with Session.open(other) as session:
        found = self_test(session)
    assert (ran.code, ran.json["passed"]) == (1, False)
    assert ran.json["self_test_max_abs"] == found.max_abs
