"""``mythos-edge doctor``: what this machine can do, and the install line for what is missing."""

import argparse
import platform
import shutil
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

from mythos_edge.model.errors import MythosEdgeError
from mythos_edge.model.machine import memory, processors
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.plugins.processor import has_integer_dot_products
from mythos_edge.plugins.trt_bindings import rtx_compute_capabilities
from mythos_edge.runtime import ort_cuda_backend
from mythos_edge.scripts.console import Console

HELP = "show what this machine can export and run"
EXAMPLE = "mythos-edge doctor --json"

# What each purpose needs: package -> module.
_NEEDS = {
    "run": {"numpy": "numpy", "onnxruntime": "onnxruntime", "tokenizers": "tokenizers"},
    "export": {
        "torch": "torch",
        "onnx": "onnx",
        "onnx-ir": "onnx_ir",
        "onnxscript": "onnxscript",
        "jaxtyping": "jaxtyping",
    },
    "ort-cuda": {"onnxruntime-gpu": "onnxruntime"},
    "tensorrt-rtx": {"tensorrt-rtx-cu13": "tensorrt_rtx"},
    "tensorrt": {"tensorrt": "tensorrt"},
}
_INSTALL = {
    "run": "pip install mythos-edge",
    "export": "pip install 'mythos-edge[export]'",
    "ort-cuda": ort_cuda_backend.REPLACE,
    "tensorrt-rtx": "pip install 'mythos-edge[tensorrt-rtx]'",
    "tensorrt": "pip install 'mythos-edge[tensorrt]'",
}
# The kernels of onnxruntime-gpu and of this package begin with Turing.
_OLDEST_CUDA_GPU = 75
# The column at which the text of each line begins.
_INDENT = 16
_FACTS = (
    "mythos_edge",
    "python",
    "machine",
    "processor",
    "cores",
    "int8_units",
    "free_memory_gb",
    "free_disk_gb",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(args: argparse.Namespace, console: Console) -> int:
    report = examine(Driver.load)
    for name in _FACTS:
        console.field(name, f"{report[name]}{_limit(report, name)}", _INDENT)
    can: dict[str, dict[str, Any]] = report["can"]
    for purpose, found in can.items():
        versions = ", ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items())
        console.field(purpose, f"{'yes' if found['ok'] else 'no'}: {versions}", _INDENT)
        if not found["ok"]:
            # Not broken, so that it can be copied.
            console.say(f"  mend: {found['install']}")
    if report["no_gpu"]:
        console.field("gpu", report["no_gpu"], _INDENT)
    for gpu in report["gpus"]:
        targets = ", ".join(gpu["targets"]) or "none but ort-cpu"
        text = f"{gpu['name']}, sm{gpu['compute_capability']}, {gpu['memory_gb']} GB -> {targets}"
        console.field("gpu", text, _INDENT)
    for target, found in report["targets"].items():
        console.field(target, ", ".join(f"{verb}: {found[verb]}" for verb in ("build", "run")), _INDENT)
    console.result(report)
    return 0 if can["run"]["ok"] else 1


def examine(load_driver: Callable[[], Driver]) -> dict[str, Any]:
    """Everything the verb says, as it goes into JSON."""
    usable, free = processors(), memory()
    can = {purpose: _purpose(purpose, packages) for purpose, packages in _NEEDS.items()}
    if can["ort-cuda"]["ok"]:
        # The same module under another package's name.
        can["run"]["packages"]["onnxruntime"] = can["ort-cuda"]["packages"]["onnxruntime-gpu"]
        can["run"]["ok"] = None not in can["run"]["packages"].values()
    gpus, no_gpu = _gpus(load_driver)
    return {
        "mythos_edge": metadata.version("mythos-edge"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        # What is used: the smaller of the machine's and a container's, which follow.
        "cores": usable.cores,
        "machine_cores": usable.affinity,
        "core_limit": usable.quota,
        "int8_units": has_integer_dot_products(),
        "free_memory_gb": _gigabytes(free.free_bytes),
        "machine_free_memory_gb": _gigabytes(free.machine_bytes),
        "memory_limit_gb": _gigabytes(free.limit_bytes),
        "free_disk_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "can": can,
        "gpus": gpus,
        "no_gpu": no_gpu,
        "targets": _targets(can, [gpu["compute_capability"] for gpu in gpus]),
    }


def _limit(report: dict[str, Any], name: str) -> str:
    """Explains a fact that a control group may limit: its limit, and what the machine has."""
    limit, machine, unit = {
        "cores": (report["core_limit"], report["machine_cores"], "cores"),
        "free_memory_gb": (report["memory_limit_gb"], report["machine_free_memory_gb"], "GB free"),
    }.get(name, (None, None, ""))
    return "" if limit is None else f" (this container's limit: {limit:g}; the machine: {machine} {unit})"


def _gigabytes(count: int | None) -> float | None:
    return None if count is None else round(count / 1e9, 1)


def _gpus(load_driver: Callable[[], Driver]) -> tuple[list[dict[str, Any]], str | None]:
    """What is known of each GPU, and why there is none."""
    try:
        driver = load_driver()
        return [_gpu(driver, device) for device in range(driver.device_count())], None
    except MythosEdgeError as error:
        return [], f"none: {error}"


def _gpu(driver: Driver, device: int) -> dict[str, Any]:
    driver.retain_primary_context(device)
    try:
        _, memory = driver.memory_info()
    finally:
        driver.release_primary_context(device)
    capability = driver.compute_capability(device)
    return {
        "name": driver.device_name(device),
        "compute_capability": capability,
        "memory_gb": round(memory / 1e9, 1),
        "targets": _targets_of(capability),
    }


def _targets_of(capability: int) -> list[str]:
    """Targets worth building for a GPU, the fastest first."""
    rtx = [f"rtx-sm{capability}"] if capability in rtx_compute_capabilities() else []
    return [*rtx, *(["trt-this-gpu", "ort-cuda"] if capability >= _OLDEST_CUDA_GPU else [])]


def _targets(can: dict[str, dict[str, Any]], capabilities: list[int]) -> dict[str, dict[str, str]]:
    """For each kind of target whether it can be built and run here: ``yes``, or what is missing."""
    export = {"export": can["export"]["ok"]}
    gpu = {"a GPU of sm75 or newer": any(capability >= _OLDEST_CUDA_GPU for capability in capabilities)}
    rtx_gpu = {
        "a GPU of TensorRT for RTX": any(capability in rtx_compute_capabilities() for capability in capabilities)
    }
    rtx, trt = ({purpose: can[purpose]["ok"]} for purpose in ("tensorrt-rtx", "tensorrt"))
    needs = {
        "ort-cpu": (export, {"run": can["run"]["ok"]}),
        "ort-cuda": (export, {"ort-cuda": can["ort-cuda"]["ok"]} | gpu),
        # Engines for RTX are built for any GPU on any machine, those of TensorRT on the GPU they are for.
        "rtx-smXX": (export | rtx, rtx | rtx_gpu),
        "trt-this-gpu": (export | trt | gpu, trt | gpu),
    }
    return {name: {"build": _answer(build), "run": _answer(run)} for name, (build, run) in needs.items()}


def _answer(needs: dict[str, bool]) -> str:
    missing = [name for name, there in needs.items() if not there]
    return f"no (needs {' and '.join(missing)})" if missing else "yes"


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _purpose(purpose: str, packages: dict[str, str]) -> dict[str, Any]:
    versions = {name: version_of(name, module) for name, module in packages.items()}
    return {"ok": None not in versions.values(), "packages": versions, "install": _INSTALL[purpose]}


def version_of(package: str, module: str) -> str | None:
    """The version of an installed package whose module can be found."""
    try:
        return metadata.version(package) if util.find_spec(module) is not None else None
    except metadata.PackageNotFoundError:
        return None
