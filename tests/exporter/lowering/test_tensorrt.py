"""The graphs TensorRT gets, run by ONNX Runtime through the bodies of their ops, against the eager network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from lowered_models import CHECKPOINTS, CONTEXT, ROWS, Lower

from mythos_edge.exporter.lowering.tensorrt import EngineOptions, LoweredForTensorRT, lower_for_tensorrt
from mythos_edge.exporter.lowering.tensorrt_weights import ENGINE_WEIGHTS_FILE
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.families.openmythos.network import Network
from mythos_edge.model.layout import load_network
from mythos_edge.model.network import Halting, LoopState
from mythos_edge.runtime.backends.ort_session import ort_session

Arrays = dict[str, np.ndarray]
IDS = np.arange(3, 16)[None]
# Largest difference of a logit, over the largest logit. These random networks are sensitive on purpose: they magnify
# the 2^-24 of float32, and the 2^-11 of fp16, a hundredfold in six loop steps. A row in a wrong place makes it 1.
TOLERANCE = {"fp32": 1e-4, "fp16": 0.03}


@pytest.fixture(scope="module")
def networks() -> Callable[[str], Network]:
    def load(name: str) -> Network:
        with open_checkpoint(CHECKPOINTS[name]) as checkpoint:
            return load_network(checkpoint, dtype=torch.float64)

    return load


def eager(network: Network, head: torch.Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits and depth of ``IDS``; ``head`` is the matrix of the last product where it is not the embedding's."""
    if head is None:
        scored = network(torch.from_numpy(IDS))
        return scored.logits.numpy(), scored.depth.numpy()
    model = network.looped
    window, rows = network_window(), torch.arange(IDS.shape[1])
    no_past = [network._no_past(1)]
    e, _ = network.prelude(torch.from_numpy(IDS), window, *no_past * model.prelude_slots)
    state = LoopState(e, torch.zeros_like(e), torch.zeros(IDS.shape, dtype=e.dtype), torch.zeros(IDS.shape, dtype=int))
    halting = Halting(torch.tensor(model.threshold), torch.tensor(1))
    for index in range(model.max_depth):
        state, _ = network.loop_step(state, e, torch.full(IDS.shape, index), halting, window, *no_past)
    network.embed.data = head
    logits, _ = network.coda(state.out, rows, window, *no_past * model.coda_slots)
    return logits.numpy(), state.depth.numpy()


def network_window() -> Any:
    from mythos_edge.model.network import Window

    return Window(torch.tensor(0), torch.zeros(1, dtype=torch.int64))


class Driver:
    """Prelude, every loop step and coda over chunks of ``IDS``, with a cache for each slot, as a runtime drives them.

    Columns that are not filled hold sevens, which must not matter.
    """

    def __init__(self, lowered: LoweredForTensorRT, network: Network, spare: int) -> None:
        self.model = network.looped
        self.stages = {stage: ort_session(path) for stage, path in lowered.graphs.items()}
        self.float = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[self._type("step", "h")]
        self.in_place = len(self._input("step", "past_0").shape) == 4
        columns = CONTEXT + ROWS if self.in_place else IDS.shape[1] + spare
        shape = (1, 1, columns, self.model.cache_width) if self.in_place else (1, columns, self.model.cache_width)
        steps = [slot for index in range(self.model.max_depth) for slot in self._slots("step", index)]
        slots = [*self._slots("prelude"), *steps, *self._slots("coda")]
        self.caches = {slot: np.full(shape, 7, self.float) for slot in slots}

    def run(self, chunks: list[int]) -> tuple[np.ndarray, np.ndarray]:
        logits, depths, start = [], [], 0
        for count in chunks:
            made = self._chunk(IDS[:, start : start + count], start)
            logits.append(made[0])
            depths.append(made[1])
            start += count
        assert start == IDS.shape[1]
        return np.concatenate(logits, axis=1), np.concatenate(depths, axis=1)

    def _chunk(self, ids: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        rows = ids.shape
        e = self._run("prelude", length, {"input_ids": ids})["e"]
        state: Arrays = {
            "h": e,
            "out": np.zeros_like(e),
            "halt_mass": np.zeros(rows, np.float32),
            "depth": np.zeros(rows, np.int64),
        }
        halting = {"threshold": np.float32(self.model.threshold), "min_depth": np.int64(1)}
        for index in range(self.model.max_depth):
            feeds = {**state, **halting, "e": e, "step_index": np.full(rows, index)}
            made = self._run("step", length, feeds, index)
            state = {name: made[f"{name}_next"] for name in state}
        coda = self._run("coda", length, {"out": state["out"], "logit_rows": np.arange(rows[1])})
        return coda["logits"], state["depth"]

    def _run(self, stage: str, length: int, feeds: Arrays, index: int = 0) -> Arrays:
        session = self.stages[stage]
        slots = self._slots(stage, index)
        names = [f"past_{number}" for number in range(len(slots))]
        pasts = {name: self.caches[slot] for name, slot in zip(names, slots, strict=True)}
        feeds = {**feeds, **pasts, "length": np.array(length)}
        feeds = {name: np.asarray(value) for name, value in feeds.items()}
        made = dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))
        for name, slot in zip(names, slots, strict=True):
            if self.in_place:
                self.caches[slot] = made.pop(f"{name}_next")
            else:
                rows = made.pop(name.replace("past", "rows"))
                self.caches[slot][:, length : length + rows.shape[1]] = rows
        return made

    def _slots(self, stage: str, index: int = 0) -> list[str]:
        return [f"{stage}@{index}.{number}" for number in range(self.model.slots[stage])]

    def _input(self, stage: str, name: str) -> Any:
        return next(given for given in self.stages[stage].get_inputs() if given.name == name)

    def _type(self, stage: str, name: str) -> str:
        return str(self._input(stage, name).type)


def run_loop(lowered: LoweredForTensorRT, network: Network) -> tuple[np.ndarray, np.ndarray]:
    model = network.looped
    feeds = {
        "input_ids": IDS,
        "max_depth": np.array(model.max_depth),
        "threshold": np.array(model.threshold, np.float32),
    }
    logits, depth = ort_session(lowered.graphs["model"]).run(None, feeds)
    return logits, depth


def assert_near(found: tuple[np.ndarray, np.ndarray], wanted: tuple[np.ndarray, np.ndarray], dtype: str) -> None:
    assert found[0].dtype == np.float32
    assert np.abs(found[0] - wanted[0]).max() <= TOLERANCE[dtype] * np.abs(wanted[0]).max()
    # In fp16 a position near the threshold may take one step more or less.
    assert (found[1] != wanted[1]).mean() <= (0 if dtype == "fp32" else 0.1)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("chunks", [[13], [1] * 13, [5, 1, 1, 6]])
def test_step_layout(lower: Lower, networks: Any, golden_name: str, dtype: str, chunks: list[int]) -> None:
    """Decoding and chunks, with a cache that is longer than what is filled of it."""
    network = networks(golden_name)
    for spare in (0, 9) if dtype == "fp32" else (9,):
        found = Driver(lower(golden_name, dtype), network, spare).run(chunks)
        assert_near(found, eager(network), dtype)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_loop_layout(lower: Lower, networks: Any, golden_name: str, dtype: str) -> None:
    network = networks(golden_name)
    assert_near(run_loop(lower(golden_name, dtype, "loop"), network), eager(network), dtype)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("chunks", [[13], [1] * 13, [5, 1, 1, 6]])
def test_windows_and_inner_layers(lower: Lower, networks: Any, dtype: str, chunks: list[int]) -> None:
    """In fp16 by TensorRT's own attention, with the window in its mask."""
    network = networks("dory-small")
    lowered = lower("dory-small", dtype)
    assert_near(Driver(lowered, network, 9).run(chunks), eager(network), dtype)


def test_windows_and_inner_layers_in_one_loop(lower: Lower, networks: Any) -> None:
    network = networks("dory-small")
    assert_near(run_loop(lower("dory-small", "fp32", "loop"), network), eager(network), "fp32")


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("layout", ["step", "loop"])
def test_rounded_weights(
    lower: Lower, networks: Any, golden_name: str, weights: str, layout: str, exported: Callable[..., Path]
) -> None:
    """Against the eager network with the values that codes and scales stand for."""
    lowered, network = lower(golden_name, "fp32", layout, weights), networks(golden_name)
    rounded = dequantised(lowered)
    wanted = {name for name, parameter in network.named_parameters() if parameter.ndim > 1 and _is_rounded(name)}
    assert set(rounded) == wanted
    head = torch.from_numpy(rounded.pop("embed")).double()
    for name, parameter in network.named_parameters():
        if name in rounded:
            apart = float((parameter - torch.from_numpy(rounded[name])).norm() / parameter.norm())
            assert 1e-4 < apart < {"int8": 0.01, "int4": 0.15, "fp8": 0.05}[weights], name
            parameter.data = torch.from_numpy(rounded[name]).double()
    exact = eager(network, head)
    found = run_loop(lowered, network) if layout == "loop" else Driver(lowered, network, 3).run([7, 1, 5])
    assert_near(found, exact, "fp32")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounded_weights_in_fp16(lower: Lower, networks: Any, weights: str) -> None:
    lowered, network = lower("mla-small", "fp16", "step", weights), networks("mla-small")
    rounded = {name: torch.from_numpy(matrix).double() for name, matrix in dequantised(lowered).items()}
    head = rounded.pop("embed")
    for name, parameter in network.named_parameters():
        parameter.data = rounded.get(name, parameter.data)
    assert_near(Driver(lowered, network, 3).run([7, 1, 5]), eager(network, head), "fp16")


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_experts_are_padded(weights: str, lower: Lower, networks: Any) -> None:
    """The demo's hidden size of 48 becomes 64."""
    lowered, network = lower("demo", "fp32", "step", weights), networks("demo")
    rounded = dequantised(lowered)
    assert rounded["step.block.ffn.fc1"].shape == (4, 128, 64)
    assert rounded["step.block.ffn.fc2"].shape == (4, 64, 64)
    head = torch.from_numpy(rounded.pop("embed")).double()
    for name, parameter in network.named_parameters():
        if name in rounded:
            whole = torch.from_numpy(rounded[name]).double()
            kept = tuple(slice(size) for size in parameter.shape)
            parameter.data = whole[kept]
            assert torch.count_nonzero(whole) == torch.count_nonzero(parameter)
    assert_near(Driver(lowered, network, 3).run([7, 1, 5]), eager(network, head), "fp32")


def _is_rounded(name: str) -> bool:
    kept = ("rope.", "lora", "key_up", "value_up", "router", "halt", "table")
    return not any(part in name for part in kept)


def dequantised(lowered: LoweredForTensorRT) -> Arrays:
    """The matrices in float32 that the codes and scales of the graphs stand for."""
    found: Arrays = {}
    for path in lowered.graphs.values():
        initializers = ir.load(path).graph.initializers
        for name, value in initializers.items():
            if name.endswith(".codes"):
                source = name.removesuffix(".codes")
                scale = initializers[f"{source}.scale"].const_value
                assert value.const_value is not None
                assert scale is not None
                codes, scales = (tensor.numpy().astype(np.float32) for tensor in (value.const_value, scale))
                assert (scales > 0).all()
                wide = np.repeat(scales.reshape(-1), codes.size // scales.size).reshape(codes.shape)
                found[source] = codes * wide
    return found


def test_without_links_weights_are_copied(
    exported: Callable[..., Path], lower: Lower, networks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refused)
    bundle = open_bundle(exported(CHECKPOINTS["mla-small"]))
    lowered = lower_for_tensorrt(bundle, tmp_path, EngineOptions("fp32", "loop", "none", CONTEXT, ROWS))
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", ENGINE_WEIGHTS_FILE}
    network = networks("mla-small")
    assert_near(run_loop(lowered, network), eager(network), "fp32")
