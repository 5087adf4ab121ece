"""What our code uses of TensorRT is there: in TensorRT for RTX, and in the bindings of full TensorRT 10.9 to 11.4.

The libraries of full TensorRT are gigabytes; its bindings are small, and import with three stub libraries of the ten
functions they link to. So classes, names and signatures are real, and nothing can be built.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = (
    "plugins/trt_bindings.py",
    "plugins/trt_plugins.py",
    "exporter/engine.py",
    "runtime/trt_engine.py",
    "runtime/loop_engine.py",
)
RELEASES = [
    ("tensorrt-cu12-bindings", "10.9.*"),
    ("tensorrt-cu12-bindings", "10.13.*"),
    ("tensorrt-cu12-bindings", "10.16.*"),
    ("tensorrt-cu13-bindings", "11.4.*"),
]
BEFORE_NUMPY_2 = ("10.9.*", "10.13.*")
# Asked for with hasattr before they are used.
OPTIONAL = {"ComputeCapability", "IStreamWriter"}
OPTIONAL_MEMBERS = {"BuilderFlag.REQUIRE_USER_ALLOCATION"}
# What builders, parsers, engines and contexts are asked to do; their objects have no names that a scan could find.
METHODS = {
    "Builder": ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"),
    "INetworkDefinition": ("num_layers", "get_layer", "num_inputs", "get_input", "num_outputs", "get_output"),
    "IBuilderConfig": (
        "add_optimization_profile",
        "profiling_verbosity",
        "progress_monitor",
    ),
    "IOptimizationProfile": ("set_shape", "set_shape_input"),
    "OnnxParser": ("parse", "parse_from_file", "num_errors", "get_error"),
    "ParserError": ("desc", "node_name", "node_operator"),
    "ITensor": ("is_shape_tensor", "dtype", "name", "shape"),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "num_io_tensors",
        "get_tensor_name",
        "get_tensor_mode",
        "get_tensor_shape",
        "get_tensor_dtype",
        "get_tensor_location",
        "num_optimization_profiles",
        "get_tensor_profile_shape",
        "create_execution_context",
        "get_device_memory_size_for_profile_v2",
    ),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "IExecutionContext": (
        "set_device_memory",
        "set_tensor_address",
        "set_input_shape",
        "set_optimization_profile_async",
        "infer_shapes",
        "execute_async_v3",
    ),
    "IPluginRegistry": ("register_creator", "get_creator"),
    "IPluginV3": ("get_capability_interface", "clone"),
    "IPluginV3OneCore": ("plugin_name", "plugin_namespace", "plugin_version"),
    "IPluginV3OneBuild": (
        "num_outputs",
        "get_output_data_types",
        "get_output_shapes",
        "supports_format_combination",
        "configure_plugin",
        "get_valid_tactics",
        "get_workspace_size",
    ),
    "IPluginV3OneRuntime": (
        "attach_to_context",
        "on_shape_change",
        "set_tactic",
        "enqueue",
        "get_fields_to_serialize",
    ),
    "IPluginCreatorV3One": ("create_plugin", "name", "plugin_namespace", "plugin_version", "field_names"),
    "PluginField": ("name", "data", "type"),
}
# Every function of the plugin registry gives one answer: yes, that a creator was registered; or none, as a pointer.
STUB = r"""
#include <stdlib.h>
static void *table[256];
static void *object[1] = {table};
static unsigned long answer(void) { return 1; }
void *getPluginRegistry(void) { for (int i = 0; i < 256; i++) table[i] = (void *)answer; return object; }
void *getBuilderPluginRegistry(void) { return getPluginRegistry(); }
#define NOTHING(name) void *name(void) { return 0; }
NOTHING(createInferBuilder_INTERNAL)
NOTHING(createInferRefitter_INTERNAL)
NOTHING(createInferRuntime_INTERNAL)
NOTHING(createNvOnnxParserRefitter_INTERNAL)
NOTHING(createNvOnnxParser_INTERNAL)
NOTHING(getNvOnnxParserVersion)
NOTHING(initLibNvInferPlugins)
"""
LOOK = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
def there(name):
    place = trt
    for part in name.split("."):
        if not hasattr(place, part):
            return False
        place = getattr(place, part)
    return True
print(json.dumps([name for name in json.loads(sys.argv[2]) if not there(name)]))
"""


def names_used() -> list[str]:
    """Every ``trt.A.B`` in our sources, and the methods above."""
    found: set[str] = set()
    for source in SOURCES:
        path = ROOT / source
        if path.exists():
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                found |= set(_chain(node))
    # These are told apart by hasattr, or are of modules.
    found = {name for name in found if name.split(".")[0] not in OPTIONAL | {"__name__", "__version__"}}
    found -= OPTIONAL_MEMBERS
    return sorted(found | {f"{owner}.{method}" for owner, methods in METHODS.items() for method in methods})


def _chain(node: ast.AST) -> Iterator[str]:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
        owner = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if owner in ("trt", "_trt"):
            yield ".".join(parts)
            return


def missing_in(module: str, environment: dict[str, str]) -> list[str]:
    command = [sys.executable, "-c", LOOK, module, json.dumps(names_used())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    missing: list[str] = json.loads(done.stdout)
    return missing


def test_the_scan_finds_what_is_used() -> None:
    names = names_used()
    assert {"IPluginV3OneRuntime", "PluginFieldType.UNKNOWN", "NetworkDefinitionCreationFlag.STRONGLY_TYPED"} <= set(
        names
    )


def test_rtx_has_all_names() -> None:
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    assert missing_in("tensorrt_rtx", dict(os.environ)) == []


@pytest.fixture(scope="module", params=RELEASES, ids=lambda release: f"{release[0]}-{release[1]}")
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which ``import tensorrt`` gives the bindings of one release."""
    compiler = shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs gcc and Linux, for stubs of TensorRT's libraries")
    name, version = request.param
    folder = tmp_path_factory.mktemp("bindings")
    _install(folder, f"{name}=={version}")
    (folder / "tensorrt").symlink_to("tensorrt_bindings")
    libraries = folder / "stubs"
    libraries.mkdir()
    (libraries / "stub.c").write_text(STUB)
    for library in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        file = f"{library}.so.{version.split('.')[0]}"
        link = ["-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", str(libraries / file), str(libraries / "stub.c")]
        subprocess.run([compiler, *link], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    if version in BEFORE_NUMPY_2:
        _check_that_numpy_2_is_refused({**environment, "PYTHONPATH": str(folder)})
        _install(folder, "numpy<2")
    return {**environment, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests")])}


def _install(folder: Path, package: str) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--only-binary=:all:", f"--target={folder}", package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        pytest.skip(f"{package} cannot be installed: {reason[-1]}")


def _check_that_numpy_2_is_refused(environment: dict[str, str]) -> None:
    if np.__version__.startswith("1."):
        return
    script = """
from mythos_edge.model.errors import BackendUnavailable
from mythos_edge.plugins import trt_bindings, trt_plugins
try:
    trt_plugins.register(trt_bindings.load("trt"))
except BackendUnavailable as error:
    assert error.install == "pip install 'numpy<2'", error
else:
    raise AssertionError("the plugins were registered with bindings that misread them")
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_full_tensorrt_has_all_names(full: dict[str, str]) -> None:
    assert missing_in("tensorrt", full) == []


def test_full_tensorrt_builds_for_the_gpu_at_hand(full: dict[str, str]) -> None:
    script = """
from mythos_edge.plugins import trt_bindings
trt = trt_bindings.load("trt")
assert not trt_bindings.names_gpus(trt)
assert trt_bindings.known_compute_capabilities(trt) == ()
assert trt_bindings.library_path_for_plugins(trt) == {}
assert trt_bindings.strongly_typed(trt) == (1 if trt_bindings.version(trt).startswith("11.") else 2)
trt_bindings.logger(trt).log(trt.ILogger.Severity.ERROR, "heard")
assert trt_bindings.messages(trt).errors() == ("heard",)
"""
    done = subprocess.run([sys.executable, "-c", script], env=full, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_full_tensorrt_runs_the_plugins_by_hand(full: dict[str, str]) -> None:
    """The tests of the plugins again, with these bindings, but for those that build."""
    file = Path(__file__).with_name("test_trt_plugins.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not rtx"]
    done = subprocess.run(
        [*command, str(file)],
        env={**full, "TEST_TENSORRT": "tensorrt"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout, done.stdout
