"""A bundle that is replaced while it is open, by another model of the same shapes: the first one's numbers or an error.

Files that are open stay what they were when their names go, so only what is opened late could be of the other model.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import build_cpu

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.bundle_writer import record_of, update_manifest
from mythos_edge.model.errors import BundleError
from mythos_edge.model.manifest import WEIGHTS_FILE, Preset
from mythos_edge.runtime import session
from mythos_edge.runtime.backends import ort_cpu
from mythos_edge.runtime.backends.ort_session import graph_runner
from mythos_edge.runtime.session import Session

PROMPTS = [[90, 90, 91, 15], [90, 91]]
REPLACED = "the bundle was replaced while it was open: open it again"


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "some.bundle"))


@pytest.fixture
def replace(demo_bundle: Path, tmp_path: Path) -> Callable[[Path], None]:
    """Puts another model of the same shapes in a bundle's place, as ``export --force`` does."""
    other = Path(shutil.copytree(demo_bundle, tmp_path / "other.bundle"))
    weights = other / WEIGHTS_FILE
    data = bytearray(weights.read_bytes())
    half = len(data) // 2 // 4 * 4
    data[half:] = (np.frombuffer(data[half:], np.float32) * np.float32(0.5)).tobytes()
    weights.write_bytes(data)
    opened = open_bundle(other)
    source = dataclasses.replace(opened.manifest.source, sha256="0" * 64)
    made = update_manifest(opened, source=source, files=lambda files: {**files, WEIGHTS_FILE: record_of(weights)})
    export = dataclasses.replace(made.manifest.targets["ort-cpu"], bundle=made.manifest.identity)
    update_manifest(made, targets={"ort-cpu": export})

    def put(path: Path) -> None:
        shutil.rmtree(path)
        shutil.copytree(other, path)

    return put


def _one_line(caught: pytest.ExceptionInfo[BundleError]) -> bool:
    return "\n" not in str(caught.value)


def test_the_other_model_is_another(bundle: Path, replace: Callable[[Path], None]) -> None:
    with Session.open(bundle) as before:
        first = before.score([PROMPTS[0]]).logits
    replace(bundle)
    with Session.open(bundle) as after:
        assert np.abs(after.score([PROMPTS[0]]).logits - first).max() > 0.1


def test_graphs_for_several_sequences_are_not_of_another_model(bundle: Path, replace: Callable[[Path], None]) -> None:
    with Session.open(bundle) as opened:
        alone = opened.generate(PROMPTS[0], max_new_tokens=4).ids
        replace(bundle)
        with pytest.raises(BundleError, match=REPLACED) as caught:
            opened.generate(PROMPTS, max_new_tokens=4)
        assert _one_line(caught)
        # What is open already goes on.
        assert opened.generate(PROMPTS[0], max_new_tokens=4).ids == alone


def test_what_is_open_goes_on_when_the_bundle_is_replaced_or_removed(
    bundle: Path, replace: Callable[[Path], None]
) -> None:
    with Session.open(bundle) as opened:
        before = [one.ids for one in opened.generate(PROMPTS, max_new_tokens=6)]
        replace(bundle)
        assert [one.ids for one in opened.generate(PROMPTS, max_new_tokens=6)] == before
        shutil.rmtree(bundle)
        assert [one.ids for one in opened.generate(PROMPTS, max_new_tokens=6)] == before


def test_graphs_for_several_sequences_are_not_of_another_rounding(rounded_bundle: Path) -> None:
    with Session.open(rounded_bundle, target="ort-cpu-int4") as opened, Session.open(rounded_bundle) as exact:
        opened.generate(PROMPTS[0], max_new_tokens=1)
        build_cpu(rounded_bundle, "int4", block=32)
        with pytest.raises(BundleError, match="target 'ort-cpu-int4' was built again while it was open: open it again"):
            opened.generate(PROMPTS, max_new_tokens=4)
        assert len(exact.generate(PROMPTS, max_new_tokens=4)) == 2
    with Session.open(rounded_bundle, target="ort-cpu-int4") as again:
        assert len(again.generate(PROMPTS, max_new_tokens=4)) == 2


def test_files_that_a_new_build_has_removed_are_not_called_damage(rounded_bundle: Path) -> None:
    opened = open_bundle(rounded_bundle)
    build_cpu(rounded_bundle, "int4", block=32)
    with pytest.raises(BundleError, match="target 'ort-cpu-int4' was built again while it was open: open it again"):
        opened.target("ort-cpu-int4")
    assert opened.target("ort-cpu")


def test_a_target_that_is_added_disturbs_nobody(bundle: Path) -> None:
    with Session.open(bundle) as opened:
        build_cpu(bundle, "fp32")
        assert len(opened.generate(PROMPTS, max_new_tokens=4)) == 2


def test_a_bundle_that_is_gone_is_one_line(bundle: Path) -> None:
    with Session.open(bundle) as opened:
        shutil.rmtree(bundle)
        with pytest.raises(BundleError, match="the bundle was replaced or removed while it was open") as caught:
            opened.generate(PROMPTS, max_new_tokens=4)
        assert _one_line(caught)


@pytest.mark.parametrize("late", ["prelude", "step", "coda", "the tokenizer"])
def test_a_session_is_of_one_model_even_when_it_is_replaced_while_it_opens(
    bundle: Path, replace: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    def overtaken(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *arguments: Any) -> Any:
            if path.name.startswith(late) or late == "the tokenizer":
                monkeypatch.undo()
                replace(bundle)
            return original(path, *arguments)

        return call

    monkeypatch.setattr(ort_cpu, "ort_session", overtaken(ort_cpu.ort_session))
    if late == "the tokenizer":
        (bundle / "tokenizer.json").write_text("{}")
        files = {"tokenizer.json": record_of(bundle / "tokenizer.json")}
        update_manifest(open_bundle(bundle), files=lambda now: now | files, tokenizer="tokenizer.json")
        monkeypatch.undo()
        monkeypatch.setattr(session, "Tokenizer", overtaken(lambda path: path.read_text()))
    with pytest.raises(BundleError, match=REPLACED):
        Session.of(open_bundle(bundle))


def test_a_session_opens_on_what_took_the_place_of_a_bundle_meanwhile(
    bundle: Path, replace: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and not for ever where it is replaced at each opening."""
    with Session.open(bundle) as opened:
        old = opened.score([PROMPTS[0]]).logits
    original, left = ort_cpu.ort_session, [1]

    def overtaken(path: Path, *arguments: Any) -> Any:
        if path.name.startswith("coda") and left[0]:
            left[0] -= 1
            replace(bundle)
        return original(path, *arguments)

    monkeypatch.setattr(ort_cpu, "ort_session", overtaken)
    with Session.open(bundle) as opened:
        new = opened.score([PROMPTS[0]]).logits
    with Session.open(bundle) as again:
        np.testing.assert_array_equal(again.score([PROMPTS[0]]).logits, new)
    assert not np.array_equal(old, new)


def test_a_bundle_that_is_replaced_at_each_opening_is_one_line(
    bundle: Path, demo_bundle: Path, replace: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, openings = ort_cpu.ort_session, [0]

    def overtaken(path: Path, *arguments: Any) -> Any:
        if path.name.startswith("coda"):
            openings[0] += 1
            replace(bundle)
            if openings[0] % 2 == 0:
                shutil.rmtree(bundle)
                shutil.copytree(demo_bundle, bundle)
        return original(path, *arguments)

    monkeypatch.setattr(ort_cpu, "ort_session", overtaken)
    with pytest.raises(BundleError, match=REPLACED):
        Session.open(bundle)
    assert 1 < openings[0] < 10


def test_a_portable_graph_is_not_of_another_model(bundle: Path, replace: Callable[[Path], None]) -> None:
    """As ``validate`` opens one, after it has hashed the files."""
    opened = open_bundle(bundle, hashes=True)
    replace(bundle)
    with pytest.raises(BundleError, match=REPLACED):
        graph_runner(opened, "model")


def test_what_was_measured_is_not_saved_as_another_model_s(
    bundle: Path, rounded_bundle: Path, replace: Callable[[Path], None]
) -> None:
    """As ``tune`` saves a preset, after minutes."""
    preset = {"knee": Preset("ort-cpu-int4", 4, 0.9, 0.0, 1.0, 2.0, 1.5)}
    opened = open_bundle(rounded_bundle)
    build_cpu(rounded_bundle, "fp32")
    update_manifest(opened, held_to="ort-cpu-int4", presets=lambda presets: presets | preset)
    build_cpu(rounded_bundle, "int4", block=32)
    with pytest.raises(BundleError, match="target 'ort-cpu-int4' was built again while it was open"):
        update_manifest(opened, held_to="ort-cpu-int4", presets=lambda presets: presets | preset)
    now = open_bundle(rounded_bundle).manifest
    assert now.presets == {}
    assert list(now.targets) == ["ort-cpu", "ort-cpu-int4", "ort-cpu-fp32"]
    opened = open_bundle(bundle)
    replace(bundle)
    with pytest.raises(BundleError, match="was exported anew meanwhile: begin again"):
        update_manifest(opened, held_to="ort-cpu", presets=lambda presets: presets | preset)
