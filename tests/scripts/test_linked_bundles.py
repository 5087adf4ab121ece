"""Bundles of links, as caches of downloads are made of, run and give the same numbers; nothing is built in them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from built import build_cpu
from command_line import Ran, refused
from sample_bundle import tree

from mythos_edge.exporter.probes import router_of
from mythos_edge.model.bundle import open_bundle, sha256_of
from mythos_edge.model.errors import BundleError
from mythos_edge.runtime.session import Session

IDS = np.array([[90, 90, 91, 15, 22], [90, 91, 15, 16, 3]])


def _snapshot(bundle: Path, cache: Path) -> Path:
    """As ``huggingface_hub.snapshot_download`` leaves a bundle: links to files that are named by their hash."""
    snapshot = cache / "snapshots" / "8a60"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in bundle.iterdir():
        shutil.copy(file, cache / "blobs" / sha256_of(file))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", sha256_of(file)))
    return snapshot


def _annexed(bundle: Path, cache: Path) -> Path:
    """As git-annex and others have it: every file in a folder of its own."""
    linked = cache / "linked"
    linked.mkdir(parents=True)
    for file in bundle.iterdir():
        own = cache / "objects" / file.name
        own.mkdir(parents=True)
        shutil.copy(file, own / "object")
        (linked / file.name).symlink_to(own / "object")
    return linked


def _weights_alone(bundle: Path, cache: Path) -> Path:
    """The large file on another disk."""
    cache.mkdir()
    copy = Path(shutil.copytree(bundle, cache / "copy"))
    for file in copy.glob("weights.*"):
        file.rename(cache / file.name)
        file.symlink_to(cache / file.name)
    return copy


@pytest.mark.parametrize("make", [_snapshot, _annexed, _weights_alone])
@pytest.mark.parametrize("target", ["ort-cpu", "ort-cpu-int4"])
def test_a_bundle_of_links_runs(
    rounded_bundle: Path, tmp_path: Path, make: Callable[[Path, Path], Path], target: str
) -> None:
    linked = make(rounded_bundle, tmp_path / "cache")
    with Session.open(rounded_bundle, target=target) as files, Session.open(linked, target=target) as links:
        wanted, found = (one.score(IDS) for one in (files, links))
        np.testing.assert_array_equal(found.depth, wanted.depth)
        # Weights that are copied may lie otherwise aligned than mapped ones, which the kernels' sums follow.
        np.testing.assert_allclose(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)
        prompts = IDS.tolist()
        assert links.generate(prompts, max_new_tokens=3)[1].ids == files.generate(prompts, max_new_tokens=3)[1].ids


@pytest.mark.parametrize("make", [_snapshot, _annexed])
def test_a_bundle_of_links_is_validated(
    rounded_bundle: Path, tmp_path: Path, run: Callable[..., Ran], make: Callable[[Path, Path], Path]
) -> None:
    linked = make(rounded_bundle, tmp_path / "cache")
    assert run("validate", linked, "--json").json["passed"]
    quality = run("validate", linked, "--against", "fp32", "--target", "ort-cpu-int4", "--demo-streams", 2, "--json")
    assert quality.code == 0, quality.err
    assert quality.json["quality"]["top1_agreement"] > 0.9
    wanted, found = (router_of(open_bundle(path)) for path in (rounded_bundle, linked))
    np.testing.assert_array_equal(found.weight, wanted.weight)


def test_nothing_is_changed_in_a_bundle_of_links(demo_bundle: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    linked = _snapshot(demo_bundle, tmp_path / "cache")
    before = tree(tmp_path)
    with pytest.raises(BundleError, match="is a bundle of links out of its folder, in which nothing is changed"):
        build_cpu(linked, "int8")
    refused(run("build", linked, "--target", "ort-cuda"), "hf download REPOSITORY --local-dir FOLDER", "cp -rL")
    refused(run("inline", linked), "in which nothing is changed", "cp -rL")
    np.save(tmp_path / "ids.npy", np.tile(IDS, 2))
    before = tree(tmp_path)
    tune = run("tune", linked, "--data", tmp_path / "ids.npy", "-o", tmp_path / "curve", "-r", 1)
    refused(tune, "in which nothing is changed", "cp -rL")
    assert tree(tmp_path) == before


def test_a_link_to_another_file_is_one_line_for_every_verb(
    demo_bundle: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    linked = _snapshot(demo_bundle, tmp_path / "cache")
    blob = (linked / "weights.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    for argv in (("generate", linked, "--ids", "1"), ("inspect", linked), ("validate", linked)):
        refused(run(*argv), "weights.safetensors: is a link out of the bundle's folder", "hf download", "cp -rL")
    # Copied without what the links lead to.
    shutil.copytree(linked, tmp_path / "deep" / "er" / "copy", symlinks=True)
    with pytest.raises(BundleError, match=r"(has no manifest|is a link to a file that is missing)"):
        open_bundle(tmp_path / "deep" / "er" / "copy")
