"""Probes: what they tell equals what numpy makes of the weights, on portable, lowered and narrow graphs."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import FIXTURES

from mythos_edge.exporter.probes import Probe, Router, fed, multiplied_in, router_of, stored_weights, with_whole_rows
from mythos_edge.exporter.taps import Taps
from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.errors import BundleError, MythosEdgeError
from mythos_edge.model.families.table import config_of

Feeds = dict[str, np.ndarray]
ROUTER = "step.block.ffn.router"


def _feeds(bundle: Bundle, random: np.random.Generator, rows: int = 5) -> Feeds:
    config = config_of(bundle.manifest)
    wide, flat = (1, rows, config.dim), (1, rows)
    return {
        "h": random.normal(size=wide).astype(np.float32),
        "e": random.normal(size=wide).astype(np.float32),
        "out": np.zeros(wide, np.float32),
        "halt_mass": np.zeros(flat, np.float32),
        "depth": np.zeros(flat, np.int64),
        "step_index": np.zeros(flat, np.int64),
        "threshold": np.array(0.9, np.float32),
        "min_depth": np.array(1),
        "length": np.array(0),
        "positions": np.arange(rows)[None],
        "first": np.zeros(1, np.int64),
        "past_0": np.zeros((1, 0, config.cache_width), np.float32),
    }


def _normalised(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


@pytest.fixture(params=["fp32", "bf16"])
def bundle(exported: Callable[..., Path], request: pytest.FixtureRequest) -> Bundle:
    return open_bundle(exported(FIXTURES / "mla-small", dtype=request.param))


@pytest.mark.parametrize("file", ["step.onnx", "step.ort-cpu.onnx"])
def test_what_matrices_are_multiplied_with(bundle: Bundle, file: str, random: np.random.Generator) -> None:
    feeds = _feeds(bundle, random)
    stored = {name: np.asarray(tensor.numpy()) for name, tensor in stored_weights(bundle, "step").items()}
    found = Probe(bundle, file, [ROUTER, "step.block.attn.qkv_down"], kept=["h_next"]).run(feeds)
    assert set(found) == {ROUTER, "step.block.attn.qkv_down", "h_next"}
    assert found[ROUTER].shape == (5, config_of(bundle.manifest).dim)
    table = np.zeros(config_of(bundle.manifest).dim)
    sines = len(stored["step.table.sin_frequency"])
    table[sines : sines + len(stored["step.table.cos_frequency"])] = 1.0  # loop step 0
    x = _normalised(feeds["h"][0].astype(np.float64) + feeds["e"][0] + table) * stored["step.norm.weight"]
    wanted = _normalised(x) * stored["step.block.attn_norm.weight"]
    np.testing.assert_allclose(found["step.block.attn.qkv_down"], wanted, rtol=1e-4, atol=1e-5)


def test_a_probe_changes_nothing_and_writes_nothing(bundle: Bundle, random: np.random.Generator) -> None:
    before = sorted(path.name for path in bundle.path.iterdir())
    feeds = _feeds(bundle, random)
    file = "step.ort-cpu.onnx"
    alone = Probe(bundle, file, [], kept=["h_next", "rows_0"]).run(feeds)
    probed = Probe(bundle, file, [ROUTER, "step.block.attn.wo"], kept=["h_next", "rows_0"]).run(feeds)
    for name in ("h_next", "rows_0"):
        np.testing.assert_array_equal(alone[name], probed[name])
    assert sorted(path.name for path in bundle.path.iterdir()) == before


def test_an_unknown_matrix_is_one_line(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"step\.onnx: 0 nodes use 'step\.block\.ffn\.gate', expected one"):
        Probe(bundle, "step.onnx", ["step.block.ffn.gate"])


def test_what_onnxruntime_refuses_is_one_line(bundle: Bundle, random: np.random.Generator) -> None:
    probe = Probe(bundle, "step.onnx", [ROUTER])
    with pytest.raises(MythosEdgeError, match=r"step\.onnx: ONNX Runtime failed") as caught:
        probe.run(_feeds(bundle, random) | {"h": np.zeros((1, 2, 3), np.float32)})
    assert "\n" not in str(caught.value)


def test_a_router_chooses_with_its_bias() -> None:
    router = Router("router", np.eye(3, dtype=np.float32), np.array([0.0, 0.0, 10.0], np.float32), top_k=2)
    chosen = router.chosen(np.array([[3.0, 1.0, 0.0], [1.0, 2.0, -30.0]]))
    assert [set(row) for row in chosen.tolist()] == [{0, 2}, {0, 1}]


def test_every_expert_may_be_chosen() -> None:
    router = Router("router", np.eye(2, dtype=np.float32), np.zeros(2, np.float32), top_k=2)
    assert set(router.chosen(np.ones((1, 2)))[0].tolist()) == {0, 1}


def test_the_router_of_a_bundle_is_the_graphs(mla_bundle: Path, random: np.random.Generator) -> None:
    """Experts by numpy equal the experts of the portable graph's own TopK."""
    bundle = open_bundle(mla_bundle)
    router = router_of(bundle)
    assert router is not None
    config = config_of(bundle.manifest)
    assert router.weight.shape == (config.n_experts, config.dim)
    assert router.weight.dtype == router.bias.dtype == np.float32
    assert np.any(router.bias), "the fixture's bias is what this test is about"
    x: Any = random.normal(size=(20, config.dim)).astype(np.float32)
    wanted = np.argsort(-(x @ router.weight.T + router.bias), axis=-1)[:, : config.n_experts_per_tok]
    np.testing.assert_array_equal(np.sort(router.chosen(x)), np.sort(wanted))


def test_graphs_are_fed_halves_of_whole_rows_and_tell_whole_ones(random: np.random.Generator) -> None:
    rows, h = random.standard_normal((1, 3, 8)).astype(np.float32), np.zeros(2, np.float32)
    feeds = {"past_1": rows, "h": h}
    np.testing.assert_array_equal(fed(feeds, "past_1.keys"), rows[..., :4])
    np.testing.assert_array_equal(fed(feeds, "past_1.values"), rows[..., 4:])
    assert fed(feeds, "past_1") is rows
    assert fed(feeds, "h") is h
    parted = {"rows_0.keys": rows[..., :4], "h_next": h, "rows_0.values": rows[..., 4:]}
    found = with_whole_rows(parted)
    assert list(found) == ["rows_0", "h_next"]
    np.testing.assert_array_equal(found["rows_0"], rows)
    assert found["h_next"] is h


@pytest.mark.parametrize("look", [Probe, Taps, multiplied_in], ids=["probe", "taps", "multiplied_in"])
def test_a_graph_whose_weights_lie_elsewhere_is_not_looked_into(
    exported: Callable[..., Path], tmp_path: Path, look: Callable[..., Any]
) -> None:
    path = Path(shutil.copytree(exported(FIXTURES / "mla-small"), tmp_path / "hostile.bundle"))
    model = onnx.load(path / "step.ort-cpu.onnx", load_external_data=False)
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    next(entry for entry in entries if entry.key == "location").value = "/etc/passwd"
    onnx.save(model, path / "step.ort-cpu.onnx")
    matrices = () if look is Taps else ([ROUTER],)

    with pytest.raises(BundleError, match=r"lies in '/etc/passwd', which is no file of the bundle"):
        look(_listed_anew(path), "step.ort-cpu.onnx", *matrices)


def _listed_anew(path: Path) -> Bundle:
    """The bundle, whose manifest lists the graph as it is now."""
    listed = json.loads((path / "manifest.json").read_text())
    file = path / "step.ort-cpu.onnx"
    found = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    listed["files"][file.name] = found
    (path / "manifest.json").write_text(json.dumps(listed))
    return open_bundle(path)
