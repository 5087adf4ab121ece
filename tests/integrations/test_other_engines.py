"""OpenVINO and ONNX Runtime's build for browsers run the graphs of a bundle, in parity with the reference."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engines import Arrays, Engine, model_in, openvino_engine, stages_in, web_engine

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.families.table import config_of
from mythos_edge.runtime import parity


def _in_parity(logits: np.ndarray, depth: np.ndarray, golden: dict[str, np.ndarray]) -> None:
    allowed = parity.tolerance(float(golden["upstream_fp32_error"].max()), float(np.abs(golden["logits"]).max()))
    assert np.abs(logits - golden["logits"]).max() <= allowed
    assert (depth == golden["depth"]).all()


def _chunks(golden: dict[str, np.ndarray]) -> list[int]:
    prefill = int(golden["prefill"])
    return [prefill, 1, 1, golden["ids"].shape[1] - prefill - 2]


@pytest.fixture
def in_openvino(portable_bundle: Path) -> Engine:
    return openvino_engine(portable_bundle)


@pytest.fixture
def in_browser(portable_bundle: Path) -> Iterator[Engine]:
    with web_engine(portable_bundle) as run:
        yield run


def test_openvino_runs_the_portable_model(
    in_openvino: Engine, portable_bundle: Path, golden: dict[str, np.ndarray]
) -> None:
    config = config_of(open_bundle(portable_bundle).manifest)
    _in_parity(*model_in(in_openvino, "model.portable.onnx", config, golden["ids"]), golden)


def test_openvino_runs_the_portable_stages(
    in_openvino: Engine, portable_bundle: Path, golden: dict[str, np.ndarray]
) -> None:
    config = config_of(open_bundle(portable_bundle).manifest)
    _in_parity(*stages_in(in_openvino, ".portable", config, golden["ids"], _chunks(golden)), golden)


def test_openvino_stops_at_the_graphs_with_ops_of_ours(in_openvino: Engine) -> None:
    """The day it does not, it needs no portable graphs any more."""
    with pytest.raises(Exception, match=r"mythos\."):
        in_openvino("model.onnx", None)


def test_openvino_reads_every_portable_graph(in_openvino: Engine, portable_bundle: Path) -> None:
    files = [path.name for path in portable_bundle.glob("*.portable.onnx")]
    assert len(files) == 5
    for file in files:
        assert in_openvino(file, None) == {}


def test_a_browser_reads_every_graph(in_browser: Engine, portable_bundle: Path) -> None:
    """The lowered ones for several sequences, too."""
    files = [path.name for path in portable_bundle.glob("*.onnx")]
    assert {"step.ort-cpu.many.onnx", "model_with_past.portable.onnx"} < set(files)
    for file in files:
        assert in_browser(file, None) == {}


@pytest.mark.parametrize("form", ["", ".portable"])
def test_a_browser_runs_the_model(
    form: str, in_browser: Engine, portable_bundle: Path, golden: dict[str, np.ndarray]
) -> None:
    config = config_of(open_bundle(portable_bundle).manifest)
    _in_parity(*model_in(in_browser, f"model{form}.onnx", config, golden["ids"]), golden)


@pytest.mark.parametrize("form", ["", ".portable", ".ort-cpu"])
def test_a_browser_runs_the_stages(
    form: str, in_browser: Engine, portable_bundle: Path, golden: dict[str, np.ndarray]
) -> None:
    config = config_of(open_bundle(portable_bundle).manifest)
    _in_parity(*stages_in(in_browser, form, config, golden["ids"], _chunks(golden)), golden)


def test_what_an_engine_says_of_a_wrong_feed_is_no_answer(in_browser: Engine) -> None:
    wrong: Arrays = {"input_ids": np.zeros((1, 2), np.float32), "max_depth": np.array(1), "threshold": np.float32(1)}
    with pytest.raises(AssertionError, match="error"):
        in_browser("model.onnx", {name: np.asarray(value) for name, value in wrong.items()})
