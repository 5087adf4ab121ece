"""The graphs TensorRT gets, run by ONNX Runtime through the bodies of their ops, against the eager network."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import FIXTURES, GOLDENS, ROOT, copy_links

from mythos_edge.exporter.graph_checks import check_graph
from mythos_edge.exporter.lowering import tensorrt_passes
from mythos_edge.exporter.lowering.tensorrt import EngineOptions, LoweredForTensorRT, lower_for_tensorrt
from mythos_edge.exporter.lowering.tensorrt_weights import ENGINE_WEIGHTS_FILE
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import BuildError
from mythos_edge.model.families.openmythos.network import Network
from mythos_edge.model.layout import load_network
from mythos_edge.model.manifest import WEIGHTS_FILE
from mythos_edge.model.network import Halting, LoopState
from mythos_edge.runtime.backends.ort_session import ort_session

Arrays = dict[str, np.ndarray]
Lower = Callable[..., LoweredForTensorRT]
CHECKPOINTS = {name: FIXTURES / name for name in (*GOLDENS, "dory-small")}
CHECKPOINTS["demo"] = ROOT / "scripts" / "assets" / "carry_adder.pt"
IDS = np.arange(3, 16)[None]
# Largest difference of a logit, over the largest logit. These random networks are sensitive on purpose: they magnify
# the 2^-24 of float32, and the 2^-11 of fp16, a hundredfold in six loop steps. A row in a wrong place makes it 1.
TOLERANCE = {"fp32": 1e-4, "fp16": 0.03}
CONTEXT, ROWS = 64, 8
FLOATS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@pytest.fixture(scope="module")
def lower(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Lower:
    """``lower(name, dtype, layout, weights)``: each lowering made once."""
    made: dict[Any, LoweredForTensorRT] = {}

    def lowered(name: str, dtype: str, layout: str = "step", weights: str = "none") -> LoweredForTensorRT:
        key = (name, dtype, layout, weights)
        if key not in made:
            folder = tmp_path_factory.mktemp("-".join(key))
            options = EngineOptions(dtype, layout, weights, CONTEXT, ROWS)
            made[key] = lower_for_tensorrt(open_bundle(exported(CHECKPOINTS[name])), folder, options)
            copy_links(folder)
        return made[key]

    return lowered


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


KINDS = [(dtype, layout) for dtype in ("fp32", "fp16", "bf16") for layout in ("step", "loop")]


@pytest.mark.parametrize(("dtype", "layout"), KINDS)
def test_types(lower: Lower, golden_name: str, dtype: str, layout: str) -> None:
    """Every tensor has the type it should; float32 appears in 16-bit graphs only where depth is decided."""
    lowered = lower(golden_name, dtype, layout)
    for path in lowered.graphs.values():
        model = ir.load(path)
        check_graph(model)
        nodes = list(model.graph.all_nodes())
        values = [value for node in nodes for value in node.outputs]
        values += [*model.graph.inputs, *model.graph.initializers.values()]
        kinds = {value.dtype for value in values if value.dtype is not None}
        allowed = {FLOATS[dtype], ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL}
        assert kinds <= allowed
        if dtype == "fp32":
            continue
        wide = [
            node for node in nodes if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT
        ]
        # The loop table's step, h for halting, and the logits at the very end; nothing of a block.
        names = {str(node.outputs[0].name).rpartition("/")[2] for node in wide}
        per_stage = {"prelude": 0, "step": 2, "coda": 1, "model": 3}[path.stem]
        assert len(names) == len(wide) == per_stage
        for value in model.graph.initializers.values():
            if value.dtype == ir.DataType.FLOAT and isinstance(value.const_value, ir.ExternalTensor):
                assert str(value.name).startswith(("step.table.", "step.halt_"))


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("layout", ["step", "loop"])
def test_a_cast_to_float32_in_the_hot_path_is_found(lower: Lower, weights: str, layout: str) -> None:
    """Products, their scales and the experts are of the compute dtype; each product reads codes at once."""
    lowered = lower("mla-small", "fp16", layout, weights)
    for path in lowered.graphs.values():
        model = ir.load(path)
        check_graph(model)
        for node in model.graph.all_nodes():
            if node.op_type in ("Gemm", "MatMul", "RMSNormalization", "Attention", "QuantizedSparseMoE"):
                codes = {ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.BOOL}
                given = {value.dtype for value in node.inputs if value is not None and value.dtype is not None}
                assert given - codes == {ir.DataType.FLOAT16}, node.name
            if node.op_type == "DequantizeLinear":
                assert [user.op_type for user, _ in node.outputs[0].uses()] == ["Gemm"]


def test_inputs_and_outputs_are_those_of_the_contract(lower: Lower) -> None:
    half, long = "tensor(float16)", "tensor(int64)"
    cache = [1, 1, CONTEXT + ROWS, 40]
    step = ort_session(lower("mla-small", "fp16").graphs["step"])
    state = {
        "h": (half, [1, "chunk", 96]),
        "out": (half, [1, "chunk", 96]),
        "halt_mass": ("tensor(float)", [1, "chunk"]),
    }
    state["depth"] = (long, [1, "chunk"])
    assert {given.name: (given.type, given.shape) for given in step.get_inputs()} == {
        **state,
        "e": (half, [1, "chunk", 96]),
        "step_index": (long, [1, "chunk"]),
        "threshold": ("tensor(float)", []),
        "min_depth": (long, []),
        "length": (long, []),
        "past_0": (half, cache),
    }
    made = {f"{name}_next": kind for name, kind in state.items()} | {"past_0_next": (half, cache)}
    assert {output.name: (output.type, output.shape) for output in step.get_outputs()} == made
    coda = ort_session(lower("mla-small", "fp32").graphs["coda"])
    assert {given.name: given.shape for given in coda.get_inputs()} == {
        "out": [1, "chunk", 96],
        "logit_rows": ["logit_count"],
        "length": [],
        "past_0": [1, "context", 40],
        "past_1": [1, "context", 40],
    }
    assert {output.name: output.shape for output in coda.get_outputs()} == {
        "logits": [1, "logit_count", 331],
        "rows_0": [1, "chunk", 40],
        "rows_1": [1, "chunk", 40],
    }


@pytest.mark.parametrize(
    ("name", "dtype", "layout", "plugins", "ops"),
    [
        ("mla-small", "fp32", "step", {"prelude": 1, "step": 2, "coda": 2}, {"LatentAttention": 4, "SparseMoE": 1}),
        ("mla-small", "fp16", "step", {"prelude": 0, "step": 1, "coda": 0}, {"Attention": 4, "SparseMoE": 1}),
        ("mla-small", "fp16", "loop", {"model": 5}, {"LatentAttention": 4, "SparseMoE": 1}),
        (
            "gqa-small",
            "fp32",
            "step",
            {"prelude": 0, "step": 1, "coda": 0},
            {"GroupedQueryAttention": 3, "SparseMoE": 1},
        ),
        ("gqa-small", "bf16", "step", {"prelude": 0, "step": 1, "coda": 0}, {"Attention": 3, "SparseMoE": 1}),
        ("gqa-small", "bf16", "loop", {"model": 1}, {"GroupedQueryAttention": 3, "SparseMoE": 1}),
    ],
)
def test_what_becomes_a_plugin(
    lower: Lower, name: str, dtype: str, layout: str, plugins: dict[str, int], ops: dict[str, int]
) -> None:
    lowered = lower(name, dtype, layout)
    assert lowered.plugins == plugins
    found: Counter[str] = Counter()
    for path in lowered.graphs.values():
        for node in ir.load(path).graph.all_nodes():
            if node.domain == "mythos" or node.op_type == "Attention":
                found[node.op_type] += 1
                is_plugin = node.domain == "mythos" and node.op_type != "GroupedQueryAttention"
                assert ("plugin_namespace" in node.attributes) == is_plugin
                assert node.op_type != "SparseMoE" or len(node.inputs) == 5
    assert found == ops


def test_rules_of_the_loop(lower: Lower) -> None:
    """See notes of ``loop_graph``; and no RotaryEmbedding, beside which TensorRT builds no Loop."""
    graph = ir.load(lower("mla-small", "fp16", "loop").graphs["model"]).graph
    loop = next(node for node in graph if node.op_type == "Loop")
    body = loop.attributes["body"].as_graph()
    assert not list(body.inputs[1].uses())
    assert len(loop.outputs) == 4
    assert not any(node.op_type in ("RotaryEmbedding", "TensorScatter", "Attention") for node in graph.all_nodes())
    assert not any(0 in value.const_value.shape.numpy() for value in graph.initializers.values() if value.const_value)


def test_the_bundles_weights_are_linked_where_nothing_changes(
    lower: Lower, exported: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = exported(FIXTURES / "mla-small")
    lower_for_tensorrt(open_bundle(bundle), tmp_path, EngineOptions("fp32", "step", "none", CONTEXT, ROWS))
    assert (tmp_path / WEIGHTS_FILE).samefile(bundle / WEIGHTS_FILE)
    assert not (tmp_path / ENGINE_WEIGHTS_FILE).exists()
    assert (bundle / WEIGHTS_FILE).stat().st_nlink == 1
    narrow = lower("mla-small", "fp16").graphs["step"].parent
    assert 0 < (narrow / ENGINE_WEIGHTS_FILE).stat().st_size < 0.6 * (bundle / WEIGHTS_FILE).stat().st_size


def test_without_links_weights_are_copied(
    exported: Callable[..., Path], lower: Lower, networks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refused)
    bundle = open_bundle(exported(FIXTURES / "mla-small"))
    lowered = lower_for_tensorrt(bundle, tmp_path, EngineOptions("fp32", "loop", "none", CONTEXT, ROWS))
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", ENGINE_WEIGHTS_FILE}
    network = networks("mla-small")
    assert_near(run_loop(lowered, network), eager(network), "fp32")


def test_bytes_read(lower: Lower, golden_name: str) -> None:
    """Half as many in fp16, about a quarter in int8; the same in either layout."""
    sizes = {
        key: (one.fixed_bytes, one.step_bytes)
        for key, one in {
            "fp32": lower(golden_name, "fp32"),
            "fp16": lower(golden_name, "fp16"),
            "loop": lower(golden_name, "fp16", "loop"),
            "int8": lower(golden_name, "fp32", "step", "int8"),
        }.items()
    }
    assert sizes["loop"] == sizes["fp16"]
    for wide, narrow, eighth in zip(sizes["fp32"], sizes["fp16"], sizes["int8"], strict=True):
        assert narrow == pytest.approx(wide / 2, rel=0.01)
        assert 0.25 * wide < eighth < 0.45 * wide


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_experts_whose_input_does_not_divide(weights: str, lower: Lower) -> None:
    model = ir.load(lower("mla-small", "fp32").graphs["step"])
    for name, shape in (("fc1", [8, 64, 100]), ("fc2", [8, 100, 32])):
        model.graph.initializers[f"step.block.ffn.{name}"].shape = ir.Shape(shape)
    with pytest.raises(BuildError, match=r"fc1: rows of 100 values are no multiple of 32: build with --weights none"):
        tensorrt_passes.round_weights(model, weights, set())


def test_a_weight_beyond_fp16_is_named(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(exported(FIXTURES / "mla-small"))
    from mythos_edge.model.stored_checkpoint import Checkpoint

    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, *where: read(self, *where) + 1e6)
    with pytest.raises(BuildError, match=r"^embed: a weight of 1e\+06 does not fit fp16 .*: build with bf16$"):
        lower_for_tensorrt(bundle, tmp_path, EngineOptions("fp16", "loop", "none", CONTEXT, ROWS))
