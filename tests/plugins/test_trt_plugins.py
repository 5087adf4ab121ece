"""The TensorRT plugins: negotiation and building with the real TensorRT for RTX, running on a fake driver."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from ctypes.util import find_library
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import plugin_graphs
import pytest
from fakes.driver import FakeDriver
from fakes.kernels import fake_kernel
from plugin_graphs import ATTRIBUTES, CASES, MAX_CONTEXT, MAX_ROWS, dtypes, sized

from mythos_edge.model.errors import BuildError, BundleError
from mythos_edge.plugins import carried_kernels, kernel_launch, launches, trt_bindings, trt_plugins
from mythos_edge.plugins.carried_kernels import MAGIC, decode, encode
from mythos_edge.plugins.launches import Float, Integer, Pointer
from mythos_edge.plugins.ops import OPS

GPUS = (86, 89)
REAL_KERNEL = carried_kernels.kernel_store.kernel
FLOATS, CODES = ("fp16", "bf16", "fp32"), ("int8", "int4", "fp8")


@pytest.fixture(autouse=True)
def _fake_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(carried_kernels.kernel_store, "kernel", fake_kernel)
    trt_plugins.take_failures()
    yield
    trt_plugins.take_failures()


@pytest.fixture
def trt() -> ModuleType:
    """TensorRT for RTX; ``test_trt_surface`` runs this file again with the bindings of full TensorRT."""
    return pytest.importorskip(os.environ.get("TEST_TENSORRT", "tensorrt_rtx"), exc_type=ImportError)


@pytest.fixture(scope="module")
def rtx() -> ModuleType:
    return pytest.importorskip("tensorrt_rtx", exc_type=ImportError)


class Maker:
    """What TensorRT does with a plugin, done by hand with the real classes of its bindings."""

    def __init__(self, trt: ModuleType, driver: FakeDriver | None = None) -> None:
        self.trt, self.driver = trt, driver or FakeDriver()
        self.loads = 0
        self._gpu = trt_plugins.GpuKernels(self._load)
        self._alive: list[Any] = []

    def _load(self) -> Any:
        self.loads += 1
        return self.driver

    def creator(self, op: str) -> Any:
        return trt_plugins.creator_class(self.trt)(OPS[op], self._gpu)

    def built(self, op: str, dtype: str = "fp16", codes: str = "", gpus: tuple[int, ...] = GPUS) -> Any:
        """A plugin as it is once both profiles are configured."""
        kinds = self.trt.PluginFieldType
        fields = []
        for name, value in ATTRIBUTES[op].items():
            array = np.array([value], np.float32 if isinstance(value, float) else np.int32)
            self._alive.append(array)
            fields.append(self.trt.PluginField(name, array, kinds.FLOAT32 if isinstance(value, float) else kinds.INT32))
        collection = self.trt.PluginFieldCollection(fields)
        with trt_plugins.carrying(gpus, MAX_ROWS):
            plugin = self.creator(op).create_plugin("a_layer", collection, self.trt.TensorRTPhase.BUILD)
            for rows in (1, MAX_ROWS):
                plugin.configure_plugin(self.dynamic(op, dtype, codes, rows), [])
        return plugin

    def from_plan(self, op: str, blob: bytes) -> Any:
        array = np.frombuffer(blob, np.uint8)
        field = self.trt.PluginField("kernels", array, self.trt.PluginFieldType.UNKNOWN)
        fields = self.trt.PluginFieldCollection([field])
        return self.creator(op).create_plugin("a_layer", fields, self.trt.TensorRTPhase.RUNTIME)

    def running(self, op: str, dtype: str = "fp16", codes: str = "") -> Any:
        """A plugin out of a plan, attached to a context."""
        self.driver.retain_primary_context(0)
        return self.from_plan(op, blob_of(self.built(op, dtype, codes))).attach_to_context(None)

    def descriptions(self, op: str, dtype: str, codes: str, rows: int, context: int = 64) -> list[Any]:
        shapes = sized(op, rows, context)
        return [self.description(kind, shapes[name]) for name, kind in dtypes(op, dtype, codes).items()]

    def description(self, dtype: str, shape: tuple[int, ...], form: str = "LINEAR") -> Any:
        made = self.trt.PluginTensorDesc()
        made.dims, made.format = self.trt.Dims(shape), getattr(self.trt.TensorFormat, form)
        made.type = {name: getattr(self.trt.DataType, kind) for kind, name in trt_plugins.DTYPES.items()}[dtype]
        return made

    def dynamic(self, op: str, dtype: str, codes: str, max_rows: int) -> list[Any]:
        made = []
        least, most = sized(op, 1, 1), sized(op, max_rows, MAX_CONTEXT + MAX_ROWS)
        for name, description in zip(least, self.descriptions(op, dtype, codes, 1), strict=True):
            ranged = self.trt.DynamicPluginTensorDesc()
            ranged.desc = description
            ranged.min, ranged.max = self.trt.Dims(least[name]), self.trt.Dims(most[name])
            made.append(ranged)
        return made


@pytest.fixture
def maker(trt: ModuleType) -> Maker:
    return Maker(trt)


def blob_of(plugin: Any) -> bytes:
    (field,) = plugin.get_fields_to_serialize()
    assert field.name == "kernels"
    return np.asarray(field.data).tobytes()


# Building.


@pytest.fixture(scope="module")
def builds(
    rtx: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Path]:
    """Every case built for each GPU, and some that must fail: in a process that finds its parser's library."""
    folder = tmp_path_factory.mktemp("plans")
    wanted: list[dict[str, Any]] = [
        {"op": op, "dtype": dtype, "codes": codes, "compute_capabilities": [gpu]}
        for gpu in (86, 89, 120)
        for op, dtype, codes in CASES
    ]
    fp16 = {"op": "SparseMoE", "dtype": "fp16", "codes": ""}
    wanted += [
        {**fp16, "compute_capabilities": [86, 120]},
        {**fp16, "compute_capabilities": [80]},
        {**fp16, "compute_capabilities": [89], "attributes": {}},
        {**fp16, "compute_capabilities": [89], "attributes": {"top_k": 9}},
    ]
    environment = os.environ | trt_bindings.library_path_for_plugins(rtx)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(plugin_graphs.__file__).parent)])
    command = [sys.executable, plugin_graphs.__file__, str(folder), json.dumps(wanted)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return wanted, json.loads(done.stdout), folder


def test_rtx_builds_every_op_in_every_dtype_for_every_gpu(builds: Any) -> None:
    wanted, results, folder = builds
    for number, (case, result) in enumerate(zip(wanted, results, strict=True)):
        if number >= 3 * len(CASES) + 1:
            continue
        assert result["plugins"] == 1, case
        if case["codes"] == "fp8" and 86 in case["compute_capabilities"]:
            # TensorRT takes no FP8 tensor for Ampere, whoever reads it.
            assert "HW-specific datatypes: fp8" in result["errors"][0]
            continue
        assert result["has_plan"], (case, result)
        assert result["errors"] == []
        plan = (folder / f"{number}.plan").read_bytes()
        carried = decode(_blob_in(plan))
        assert carried.op == case["op"]
        assert carried.attributes == ATTRIBUTES[case["op"]]
        assert sorted({kernel.compute_capability for kernel in carried.kernels}) == case["compute_capabilities"]
        names = launches.variants(
            case["op"],
            sized(case["op"], 1, 1),
            dtypes(case["op"], case["dtype"], case["codes"]),
            ATTRIBUTES[case["op"]],
            MAX_ROWS,
        )
        for gpu in case["compute_capabilities"]:
            assert sorted(carried.for_gpu(gpu)) == sorted(names)


def _blob_in(plan: bytes) -> bytes:
    """The first blob of a plan, whose own header says how long it is."""
    start = plan.index(MAGIC)
    header = start + len(MAGIC) + 40
    end = header + int.from_bytes(plan[start + len(MAGIC) : start + len(MAGIC) + 8], "little")
    return plan[start : end + sum(size for _, size in json.loads(plan[header:end])["cubins"])]


def test_what_rtx_cannot_build_is_one_clear_error(builds: Any) -> None:
    _, results, _ = builds
    not_built, no_attribute, too_many = results[-3:]
    assert not not_built["has_plan"]
    assert not_built["raised"].startswith("BuildError: SparseMoE the_node (configure_plugin): kernel ")
    assert not_built["raised"].endswith(" is not built for SM 80")
    assert no_attribute["raised"] == (
        "BuildError: SparseMoE (create_plugin): the node has no attribute top_k, expected top_k"
    )
    assert not too_many["has_plan"]
    assert "the best 9 of 8 experts" in too_many["raised"]
    # TensorRT's own words are kept beside ours.
    assert any("Could not create the plugin" in line for line in no_attribute["errors"])


def test_rtx_needs_a_gpu_to_load_a_plan(builds: Any, rtx: ModuleType) -> None:
    """How far a machine without one gets: TensorRT asks for the driver before it looks at the plan."""
    _, _, folder = builds
    if find_library("cuda"):
        pytest.skip("there is a driver here")
    messages = trt_bindings.messages(rtx)
    before = len(messages.errors())
    assert rtx.Runtime(trt_bindings.logger(rtx)).deserialize_cuda_engine((folder / "0.plan").read_bytes()) is None
    assert any("CUDA driver version" in line for line in messages.errors()[before:])


def test_registering_twice_is_registering_once(trt: ModuleType) -> None:
    def never() -> Any:
        raise AssertionError("registering loads no driver")

    for _ in range(2):
        trt_plugins.register(trt, never)


def test_the_registry_of_rtx_knows_the_plugins(rtx: ModuleType) -> None:
    trt_plugins.register(rtx)
    registry = rtx.get_plugin_registry()
    for spec in trt_plugins.PLUGINS:
        assert registry.get_creator(spec.name, "1", "mythos") is not None


# Negotiation.


@pytest.mark.parametrize(("op", "dtype", "codes"), CASES)
def test_types_and_formats(maker: Maker, op: str, dtype: str, codes: str) -> None:
    trt, plugin = maker.trt, maker.built(op, dtype, codes)
    kinds = [*dtypes(op, dtype, codes).values(), dtype]
    names = [*OPS[op].inputs, ""]
    tensors = [trt.DynamicPluginTensorDesc() for _ in kinds]
    count = len(OPS[op].inputs)

    def accepts(position: int, kind: str, form: str = "LINEAR") -> bool:
        tensors[position].desc = maker.description(kind, (1, 1), form)
        accepted = plugin.supports_format_combination(position, tensors, count)
        assert type(accepted) is bool
        return accepted

    # The first of x and of the codes decides; those after it follow.
    free = {"q": FLOATS, "x": FLOATS, "fc1_codes": CODES}
    for position, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        for other in (*FLOATS, *CODES, "int64"):
            assert accepts(position, other) is (other in free.get(name, (kind,))), (name, other)
        assert not accepts(position, kind, "CHW32")
        assert accepts(position, kind)
    types = [tensor.desc.type for tensor in tensors]
    assert plugin.get_output_data_types(types[:-1]) == types[-1:]
    assert plugin.num_outputs == 1


def test_shapes(maker: Maker) -> None:
    class Builder:
        """Expressions as numbers: the real ones exist in a build alone."""

        def constant(self, value: int) -> int:
            return value

    x = object()
    assert maker.built("SparseMoE").get_output_shapes([x], [], Builder()) == [x]
    plugin = maker.built("LatentAttention")
    plugin.trt = SimpleNamespace(DimsExprs=lambda size: [0] * size)
    assert plugin.get_output_shapes([[1, 7, 4, 80]], [], Builder()) == [[1, 7, 4, 64]]


def test_inputs_are_counted(maker: Maker) -> None:
    half = maker.trt.DataType.HALF
    with pytest.raises(BuildError, match="has 7 inputs, expected 5: x, router"):
        maker.built("SparseMoE").get_output_data_types([half] * 7)
    assert "SparseMoE a_layer (get_output_data_types): has 7 inputs" in trt_plugins.take_failures()[0]


@pytest.mark.parametrize(("op", "dtype", "codes"), CASES)
def test_no_workspace_is_asked_of_tensorrt(maker: Maker, op: str, dtype: str, codes: str) -> None:
    plugin = maker.built(op, dtype, codes)
    assert plugin.get_workspace_size(maker.dynamic(op, dtype, codes, MAX_ROWS), []) == 0


def test_scratch_grows_and_what_a_graph_may_use_stays(maker: Maker) -> None:
    driver, plugin = maker.driver, maker.running("SparseMoE")
    before, used = driver.live_bytes, []
    for rows in (1, MAX_ROWS, 1):
        plugin.on_shape_change(maker.descriptions("SparseMoE", "fp16", "", rows), [])
        used.append(plugin._workspace)
    # The larger one serves fewer rows as well.
    assert used[0] != used[1] == used[2]
    least = launches.program(
        "SparseMoE", sized("SparseMoE", MAX_ROWS, 64), dtypes("SparseMoE", "fp16", ""), {"top_k": 2}
    )
    assert driver.live_bytes - before >= least.workspace_bytes
    assert all(driver.device_memory.holds(pointer, 1) for pointer in used)
    del plugin
    gc.collect()
    assert driver.live_bytes == before


# What travels in a plan.


def test_a_plugin_comes_back_from_its_plan(maker: Maker) -> None:
    blob = blob_of(maker.built("LatentAttention"))
    assert blob == blob_of(maker.built("LatentAttention").clone())
    plugin = maker.from_plan("LatentAttention", blob)
    assert plugin.attributes == ATTRIBUTES["LatentAttention"]
    assert blob_of(plugin.clone()) == blob
    assert {kernel.compute_capability for kernel in plugin.carried.kernels} == set(GPUS)
    assert encode(decode(blob)) == blob
    # The driver is not asked for before a plugin runs.
    assert maker.loads == 0


def test_every_damaged_byte_is_seen(maker: Maker) -> None:
    blob = blob_of(maker.built("LatentAttention", gpus=(89,)))
    for position in range(0, len(blob), 7):
        damaged = bytearray(blob)
        damaged[position] ^= 0x10
        with pytest.raises(BundleError, match="damaged"):
            decode(bytes(damaged))
    for cut in (blob[:-1], blob + b"x", blob[:20], b""):
        with pytest.raises(BundleError, match="damaged"):
            decode(cut)


def test_a_damaged_plan_is_one_line(maker: Maker) -> None:
    blob = blob_of(maker.built("SparseMoE"))
    with pytest.raises(BundleError):
        maker.from_plan("SparseMoE", blob[:-1] + b"?")
    (line,) = trt_plugins.take_failures()
    assert line.startswith("SparseMoE (create_plugin): the kernels in this plan are damaged (cubin ")
    assert line in trt_bindings.messages(maker.trt).errors()
    with pytest.raises(BundleError, match="kernels of SparseMoE, expected LatentAttention"):
        maker.from_plan("LatentAttention", blob)


def test_a_plan_without_kernels_for_this_gpu(trt: ModuleType) -> None:
    maker = Maker(trt, FakeDriver(devices=(120,)))
    with pytest.raises(BundleError, match=r"kernels for SM 86, 89, and this GPU is SM 120: build the target for it"):
        maker.running("SparseMoE")
    (failure,) = trt_plugins.take_failures()
    assert "SM 120" in failure


def test_kernels_are_for_the_gpus_of_the_build(maker: Maker) -> None:
    maker.built("SparseMoE")
    fields = maker.trt.PluginFieldCollection([])
    with pytest.raises(BuildError, match="no attribute top_k"):
        maker.creator("SparseMoE").create_plugin("", fields, maker.trt.TensorRTPhase.BUILD)
    trt_plugins.take_failures()
    with pytest.raises(BuildError, match="not built for SM 80"):
        maker.built("SparseMoE", gpus=(80,))


# Running.


@pytest.mark.parametrize(("op", "dtype", "codes"), CASES)
@pytest.mark.parametrize("rows", [1, 5, MAX_ROWS])
def test_launches_are_those_of_the_program(maker: Maker, op: str, dtype: str, codes: str, rows: int) -> None:
    driver, plugin = maker.driver, maker.running(op, dtype, codes)
    kinds = dtypes(op, dtype, codes)
    program = launches.program(op, sized(op, rows, 64), kinds, ATTRIBUTES[op])
    spec = OPS[op]
    places = {name: driver.allocate(64) for name in (*spec.inputs, spec.output)}
    stream = driver.stream()
    descriptions = maker.descriptions(op, dtype, codes, rows)
    modules = len(driver.modules)
    plugin.on_shape_change(descriptions, [])
    inputs, outputs = [places[name] for name in spec.inputs], [places[spec.output]]
    plugin.enqueue(descriptions, [], inputs, outputs, 0, stream)
    assert len(driver.launches) == len(program.launches)
    for launch, record in zip(program.launches, driver.launches, strict=True):
        kernel = fake_kernel(launch.kernel, 89)
        assert (record.entry, record.grid) == (kernel.entry, launch.grid)
        assert (record.threads, record.shared_bytes) == (kernel.threads, kernel.shared_bytes)
        expected = [
            places[given.name]
            if isinstance(given, Pointer)
            else given.value
            if isinstance(given, Integer)
            else pytest.approx(given.value, rel=1e-7)
            if isinstance(given, Float)
            # A kernel that needs no scratch gets a null.
            else plugin._workspace + given.offset_bytes or None
            for given in launch.arguments
        ]
        # After them nulls, for the scratch memory that Triton's kernels take.
        assert list(record.arguments) == [*expected, *[None] * kernel.hidden_pointers]
        assert record.stream == stream
    # Attaching loaded everything, once.
    assert len(driver.modules) == modules
    assert maker.loads == 1


@pytest.mark.parametrize(("op", "dtype", "codes"), CASES)
def test_the_kernels_we_ship_load_and_launch(
    maker: Maker, monkeypatch: pytest.MonkeyPatch, op: str, dtype: str, codes: str
) -> None:
    """Entries are in their cubins, shared memory is asked for, for few rows and for many."""
    monkeypatch.setattr(carried_kernels.kernel_store, "kernel", REAL_KERNEL)
    driver = maker.driver
    driver.retain_primary_context(0)
    plugin = maker.from_plan(op, blob_of(maker.built(op, dtype, codes, gpus=(89,)))).attach_to_context(None)
    stream = driver.stream()
    places = [driver.allocate(64) for _ in (*OPS[op].inputs, OPS[op].output)]
    for rows in (1, MAX_ROWS):
        descriptions = maker.descriptions(op, dtype, codes, rows)
        plugin.on_shape_change(descriptions, [])
        plugin.enqueue(descriptions, [], places[:-1], places[-1:], 0, stream)
    assert {record.entry for record in driver.launches} <= {kernel.entry for kernel in plugin.carried.kernels}
    assert all(record.arguments[-1] is None for record in driver.launches)


def test_kernels_are_loaded_once_for_all_plugins(maker: Maker) -> None:
    first = maker.running("SparseMoE")
    count = len(maker.driver.modules)
    assert count > 0
    for plugin in (first.clone(), maker.running("SparseMoE"), first.attach_to_context(None)):
        plugin.on_shape_change(maker.descriptions("SparseMoE", "fp16", "", 3), [])
    assert len(maker.driver.modules) == count


def test_running_can_be_captured(maker: Maker) -> None:
    driver, plugin = maker.driver, maker.running("LatentAttention")
    descriptions = maker.descriptions("LatentAttention", "fp16", "", 4, context=256)
    plugin.on_shape_change(descriptions, [])
    places = [driver.allocate(64) for _ in range(6)]
    stream = driver.stream()
    driver.begin_capture(stream)
    plugin.enqueue(descriptions, [], places[:5], places[5:], 0, stream)
    graph = driver.end_capture(stream)
    assert driver.launches == []
    # Another run has other pointers; the graph keeps those it was captured with.
    others = [driver.allocate(64) for _ in range(6)]
    plugin.enqueue(descriptions, [], others[:5], others[5:], 0, stream)
    count = len(driver.launches)
    driver.launch_graph(graph, stream)
    assert len(driver.launches) == 2 * count > 2
    assert driver.launches[0].arguments[0] == others[0]
    assert driver.launches[count].arguments[0] == places[0]


def test_more_rows_than_were_built_for(maker: Maker) -> None:
    plugin = maker.running("SparseMoE")
    kernels = {kernel.name: kernel for kernel in plugin.carried.kernels if "prefill" not in kernel.name}
    loaded = kernel_launch.LoadedKernels(maker.driver).load(kernels.values())
    program = launches.program(
        "SparseMoE", sized("SparseMoE", 40, 0), dtypes("SparseMoE", "fp16", ""), ATTRIBUTES["SparseMoE"]
    )
    with pytest.raises(BundleError, match="kernel prefill_gate_up_fp16 is asked for and not carried"):
        kernel_launch.PreparedProgram(maker.driver, program, loaded)


def test_running_before_the_shapes_are_known_is_an_error(maker: Maker) -> None:
    plugin = maker.running("SparseMoE")
    with pytest.raises(AssertionError):
        plugin.enqueue([], [], [1, 2, 3, 4, 5], [6], 0, 0)
    assert "before telling it the shapes" in trt_plugins.take_failures()[0]


def test_outside_of_a_build_nothing_is_carried(maker: Maker) -> None:
    plugin = maker.built("SparseMoE").clone()
    plugin.build = None
    with pytest.raises(BuildError, match=r"outside of trt_plugins\.carrying"):
        plugin.configure_plugin(maker.dynamic("SparseMoE", "fp16", "", 1), [])
