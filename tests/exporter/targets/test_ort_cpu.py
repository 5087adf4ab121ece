"""Targets added to a bundle: whole or not at all, what they say of themselves, and how near to float32 they stay."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from built import build_cpu
from command_line import Ran, refused
from conftest import ROOT

from mythos_edge.exporter.targets import ort_cpu, ort_files
from mythos_edge.exporter.targets.build import build
from mythos_edge.exporter.targets.ort_cpu import OrtCpuTarget
from mythos_edge.model.bundle import open_bundle, verify_hashes
from mythos_edge.model.bundle_writer import update_manifest
from mythos_edge.model.errors import BackendUnavailable, BuildError, BundleError
from mythos_edge.model.families.openmythos.shapes import expected_shapes
from mythos_edge.model.families.table import config_of
from mythos_edge.model.manifest import Preset
from mythos_edge.plugins import processor
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import addition


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "demo.bundle"))


def _files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_a_target_is_added_and_the_rest_stays(bundle: Path, weights: str) -> None:
    before = _files(bundle)
    made = build_cpu(bundle, weights, block=32 if weights == "int4" else None)
    name = f"ort-cpu-{weights}"
    assert made == open_bundle(bundle)
    assert list(made.manifest.targets) == ["ort-cpu", name]
    verify_hashes(made)
    after = _files(bundle)
    assert set(after) == set(made.manifest.files) | {"manifest.json"}
    assert all(after[file] == content for file, content in before.items() if file != "manifest.json")
    with Session.open(bundle, target=name) as session:
        assert len(session.generate([90, 90, 91, 15], max_new_tokens=4, stop_ids=()).ids) == 4
    assert build_cpu(bundle, weights, block=32 if weights == "int4" else None).manifest.files == made.manifest.files


def test_a_target_that_fails_leaves_the_bundle_as_it_was(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _files(bundle)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(BuildError, match="No space left"):
        build_cpu(bundle, "int8")
    assert _files(bundle) == before
    monkeypatch.undo()
    monkeypatch.setattr(ort_files, "write_graphs", full)
    with pytest.raises(BuildError, match="No space left"):
        build_cpu(bundle, "int8")
    assert _files(bundle) == before
    assert not list(bundle.glob(".*"))


def test_a_build_over_another_that_is_interrupted_leaves_a_sound_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build_cpu(bundle, "int4", block=32)
    moves = []
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if self.parent.name.startswith(".ort-cpu-int4"):
            moves.append(target)
            if len(moves) == 3:
                raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_cpu(bundle, "int4", block=64)
    monkeypatch.undo()
    left = open_bundle(bundle)
    verify_hashes(left)
    assert left.manifest == before.manifest
    assert not list(bundle.glob(".*"))
    assert set(_files(bundle)) == {*before.manifest.files, "manifest.json"}
    assert build_cpu(bundle, "int4", block=64).manifest.targets["ort-cpu-int4"].options["block"] == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int3"}, "weights is 'int3', expected one of fp32, int8, int4"),
        ({"weights": "int4", "block": 48}, "block is 48, expected one of 32, 64, 128"),
        ({"weights": "int4", "block": 0}, "block is 0, expected one of 32, 64, 128"),
        ({"weights": "int4", "block": 128}, "rows of 64 values do not divide into blocks of 128"),
        ({"weights": "int8", "keep": ("tail",)}, "--keep tail fits no matrix"),
        ({"weights": "fp32", "keep": ("head",)}, "fp32 rounds nothing: leave them out"),
        ({"weights": "int8", "method": "best"}, "method is 'best', expected one of rtn, search for ort-cpu"),
    ],
)
def test_bad_wishes_are_refused_in_one_line(bundle: Path, options: dict[str, Any], message: str) -> None:
    before = _files(bundle)
    with pytest.raises(BuildError, match=r"expected|divide|fits|leave") as caught:
        build_cpu(bundle, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert _files(bundle) == before


@pytest.mark.parametrize(
    ("keep", "rounded_parts"),
    [
        ([], {"embed", "prelude_blocks", "coda_blocks", "step"}),
        (["head", "prelude"], {"coda_blocks", "step"}),
        (["experts", "attention", "shared", "coda", "prelude"], {"embed"}),
    ],
)
def test_kept_parts_stay_float32(bundle: Path, keep: list[str], rounded_parts: set[str]) -> None:
    from safetensors.numpy import load_file

    build_cpu(bundle, "int4", dense="int4", block=32, keep=tuple(keep))
    stored = load_file(bundle / "weights.ort-cpu-int4-dense-int4.safetensors")
    assert {name.partition(".")[0] for name in stored} == rounded_parts
    with Session.open(bundle, target="ort-cpu-int4-dense-int4") as session, Session.open(bundle) as exact:
        ids = np.array([[1, 25, 99, 4, 58]])
        assert np.abs(session.score(ids).logits - exact.score(ids).logits).max() < 10


def test_what_is_rounded_in_a_part_that_is_kept_in_part_counts(bundle: Path) -> None:
    keep = ("head", "attention", "experts", "shared")
    made = build_cpu(bundle, "int8", block=32, keep=keep).target("ort-cpu-int8")
    assert made.weights["prelude"] == made.weights["coda"] == "fp32+int8"
    assert (made.options["block"], made.options["method"]) == (32, "rtn")
    assert not made.options["integer_rows"]
    build_cpu(bundle, "int4", dense="int8", keep=("head", "attention", "shared", "prelude", "coda"))
    only_blocks = open_bundle(bundle).target("ort-cpu-int4-dense-int8")
    assert not only_blocks.options["integer_rows"], "no rows are rounded as a whole"


def test_bytes_a_token_reads(bundle: Path) -> None:
    """In float32: every tensor of the checkpoint, of the experts the chosen share, and the embedding as the head."""
    target, config = open_bundle(bundle).manifest.targets["ort-cpu"], config_of(open_bundle(bundle).manifest)
    fixed = step = 0.0
    for name, shape in expected_shapes(config).items():
        size = 4.0 * np.prod(shape)
        if ".routed_experts." in name:
            step += size * config.n_experts_per_tok / config.n_experts
        elif name.startswith("recurrent."):
            step += size
        else:
            fixed += size
    # Vectors that are worked out at export, and rows of tables, are next to nothing.
    assert target.fixed_bytes == pytest.approx(fixed, rel=0.01)
    assert target.step_bytes == pytest.approx(step, rel=0.02)
    made = build_cpu(bundle, "int8").manifest.targets["ort-cpu-int8"]
    assert made.step_bytes < 0.5 * target.step_bytes


def test_a_target_of_another_version_is_refused(bundle: Path) -> None:
    build_cpu(bundle, "fp32")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["targets"]["ort-cpu-fp32"]["bundle"] = "0" * 64
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="built from another version of this bundle: build it again"):
        Session.open(bundle, target="ort-cpu-fp32")
    with pytest.raises(BundleError, match="has no target 'ort-cpu-int2', only ort-cpu, ort-cpu-fp32"):
        Session.open(bundle, target="ort-cpu-int2")


@pytest.mark.parametrize(("dot_products", "blocks"), [(True, [0, 64]), (False, [64, 64])])
def test_default_blocks_suit_processor_and_model(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, dot_products: bool, blocks: list[int]
) -> None:
    monkeypatch.setattr(ort_cpu, "has_integer_dot_products", lambda: dot_products)
    made = [
        build_cpu(bundle, weights).manifest.targets[f"ort-cpu-{weights}"].options["block"]
        for weights in ("int8", "int4")
    ]
    assert made == blocks


def test_a_processor_that_would_overflow_is_told_so(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_cpu(bundle, "int8", block=0)
    monkeypatch.setattr("mythos_edge.runtime.backends.ort_cpu.has_integer_dot_products", lambda: False)
    with pytest.raises(BackendUnavailable, match=r"no VNNI.*--weights int8`"):
        Session.open(bundle, target="ort-cpu-int8")


def test_processors_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    for flags, wanted in (("fpu avx2", False), ("fpu avx2 avx512_vnni", True), ("avx_vnni", True)):
        (tmp_path / "cpuinfo").write_text(f"model name : x\nflags\t\t: {flags}\n")
        monkeypatch.setattr(processor, "Path", lambda _: tmp_path / "cpuinfo")
        assert processor.has_integer_dot_products() is wanted
    monkeypatch.setattr(processor.platform, "machine", lambda: "aarch64")
    assert not processor.has_integer_dot_products()
    (tmp_path / "cpuinfo").write_text("Features\t: fp asimd asimddp\n")
    assert processor.has_integer_dot_products()
    monkeypatch.setattr(processor.platform, "system", lambda: "Darwin")
    (tmp_path / "cpuinfo").unlink()
    assert processor.has_integer_dot_products()


@pytest.fixture(scope="module")
def demo_targets(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Session]:
    path = Path(shutil.copytree(demo_bundle, tmp_path_factory.mktemp("targets") / "demo.bundle"))
    build_cpu(path, "int8")
    build_cpu(path, "int4")
    return lambda name: Session.open(path, target=name)


@pytest.mark.parametrize(("weights", "block"), [("int8", 32), ("int8", 0), ("int4", 32), ("int4", 64), ("int4", 128)])
def test_every_kind_of_rounding_runs(bundle: Path, weights: str, block: int) -> None:
    """Rows of 64 values in blocks of 128 are padded, of the embedding too; its experts then stay float32."""
    more: dict[str, Any] = {"keep": ("experts",), "dense": "int4"} if block == 128 else {}
    target = list(build_cpu(bundle, weights, block=block, **more).manifest.targets)[-1]
    ids = addition.random_columns(np.random.default_rng(2), 1, 30)
    with Session.open(bundle) as exact, Session.open(bundle, target=target) as rounded:
        wanted, found = (one.score(ids, policy="full").logits for one in (exact, rounded))
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() > 0.95
    assert np.abs(found - wanted).max() > 0


def test_presets_added_during_a_build_stay(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = Preset("ort-cpu", 3, 0.9, 0.0, 1.0, 2.0, 1.5)
    write = ort_files.write_rounded

    def slow(*arguments: Any) -> None:
        write(*arguments)
        update_manifest(open_bundle(bundle), presets={"quick": preset})

    monkeypatch.setattr(ort_files, "write_rounded", slow)
    assert build_cpu(bundle, "int8").manifest.presets == {"quick": preset}


def test_leftovers_of_a_killed_build_are_removed(bundle: Path) -> None:
    """Whatever they were of; a build that is still under way keeps its own."""
    dead = [bundle / f".{name}.partial-999999999" for name in ("ort-cpu-int8", "rtx-sm89-fp16")]
    alive = bundle / f".rtx-sm89-fp16.partial-{os.getppid()}"
    for folder in (*dead, alive):
        folder.mkdir()
        (folder / "weights").write_bytes(b"x")
    build_cpu(bundle, "int8")
    assert [folder.exists() for folder in (*dead, alive)] == [False, False, True]


@pytest.mark.parametrize(("target", "points"), [("ort-cpu-int8", 0.2), ("ort-cpu-int4", 1.0)])
def test_sums_stay_right(demo_targets: Callable[[str], Session], target: str, points: float) -> None:
    """Share of whole sums that are right, streamed as in ``demo add``; at most so many points less than in float32."""
    random = np.random.default_rng(5)
    numbers = [(int(a), int(b)) for a, b in random.integers(0, 10**8, (300, 2))]
    streams = np.array([[0, *addition.columns_of(a, b, 9)] for a, b in numbers])
    share = {}
    for name in ("ort-cpu", target):
        with demo_targets(name) as session:
            made = [session.score(row[None]).logits[0, 1:, addition.DIGIT_BASE :].argmax(-1) for row in streams]
        right = [addition.sum_from_ids((digits + addition.DIGIT_BASE).tolist()) for digits in made]
        share[name] = np.mean([found == a + b for found, (a, b) in zip(right, numbers, strict=True)])
    assert share["ort-cpu"] > 0.97
    assert share[target] >= share["ort-cpu"] - points / 100


def test_bundles_stored_narrow_are_rounded_too(exported: Callable[..., Path], tmp_path: Path) -> None:
    made = exported(ROOT / "tests" / "fixtures" / "mla-small", dtype="bf16")
    path = Path(shutil.copytree(made, tmp_path / "bf16.bundle"))
    kinds: dict[str, Counter[str]] = {}
    for weights, dense, block in (("int8", "int8", 0), ("int4", "int8", 32), ("int4", "int4", 32)):
        target = OrtCpuTarget(weights, dense, block)
        build(path, target)
        graphs = [ir.load(path / f"{stage}.{target.name}.onnx").graph for stage in ("prelude", "step", "coda")]
        kinds[f"{weights}, dense {dense}"] = Counter(node.op_type for graph in graphs for node in graph.all_nodes())
    config = config_of(open_bundle(path).manifest)
    # Down, up and out of attention, and gate-up and down of a feed-forward: in every block.
    linears = 5 * (config.prelude_layers + 1 + config.coda_layers) + 1
    assert kinds["int8, dense int8"]["QGemm"] == linears + 2 * config.n_experts
    mixed, plain = kinds["int4, dense int8"], kinds["int4, dense int4"]
    assert (mixed["QGemm"], mixed["MatMulNBits"], mixed["QMoE"]) == (linears, 0, 1)
    assert (plain["QGemm"], plain["MatMulNBits"], plain["QMoE"]) == (0, linears, 1)
    ids = np.arange(2, 26)[None]
    with Session.open(path) as exact, Session.open(path, target="ort-cpu-int8-dense-int8") as rounded:
        wanted, found = exact.score(ids, policy="full").logits, rounded.score(ids, policy="full").logits
    # Random and sensitive on purpose, see below; not rounded at all it would be 0.
    assert 1e-4 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.5


def test_grouped_query_attention_rounded(exported: Callable[..., Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(exported(ROOT / "tests" / "fixtures" / "gqa-small"), tmp_path / "gqa.bundle"))
    build_cpu(path, "int8")
    ids = np.arange(2, 26)[None]
    with Session.open(path) as exact, Session.open(path, target="ort-cpu-int8") as rounded:
        wanted, found = exact.score(ids, policy="full").logits, rounded.score(ids, policy="full", prefill=3).logits
    # This network is random and sensitive on purpose; rows in wrong places would make it 1 and more.
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.5


def test_a_target_that_would_round_nothing_is_refused(run: Callable[..., Ran], rounded_bundle: Path) -> None:
    kept = "head,attention,experts,shared,prelude,coda"
    refused(run("build", rounded_bundle, "--weights", "int8", "--keep", kept), "nothing of this model is left to round")
    refused(
        run("build", rounded_bundle, "--weights", "int4", "--keep", "experts", "--block", 32), "--block is 32", "int4"
    )
    assert "ort-cpu-int8" not in open_bundle(rounded_bundle).manifest.targets
