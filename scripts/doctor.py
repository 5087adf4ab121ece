"""``mythos-edge doctor``: what this machine can do, and the install line for what is missing."""

import argparse
import platform
import shutil
from importlib import metadata, util
from pathlib import Path

from mythos_edge.model.machine import free_memory_bytes
from mythos_edge.plugins.processor import has_integer_dot_products
from mythos_edge.runtime.backend import cores
from mythos_edge.scripts.console import Console

HELP = "show what this machine can export and run"
EXAMPLE = "mythos-edge doctor --json"

_RUN = {"numpy": "numpy", "onnxruntime": "onnxruntime", "tokenizers": "tokenizers"}
_EXPORT = {
    "torch": "torch",
    "onnx": "onnx",
    "onnx-ir": "onnx_ir",
    "onnxscript": "onnxscript",
    "jaxtyping": "jaxtyping",
}
_INSTALL = {"run": "pip install mythos-edge", "export": "pip install 'mythos-edge[export]'"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(args: argparse.Namespace, console: Console) -> int:
    memory = free_memory_bytes()
    report = {
        "mythos_edge": metadata.version("mythos-edge"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": cores(),
        "int8_units": has_integer_dot_products(),
        "free_memory_gb": None if memory is None else round(memory / 1e9, 1),
        "free_disk_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "can": {purpose: _purpose(purpose, packages) for purpose, packages in (("run", _RUN), ("export", _EXPORT))},
    }
    for name in (
        "mythos_edge",
        "python",
        "machine",
        "processor",
        "cores",
        "int8_units",
        "free_memory_gb",
        "free_disk_gb",
    ):
        console.say(f"{name:15} {report[name]}")
    can = report["can"]
    assert isinstance(can, dict)
    for purpose, found in can.items():
        versions = ", ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items())
        console.say(f"{purpose:15} {'yes' if found['ok'] else 'no'}: {versions}")
        if not found["ok"]:
            console.say(f"{'':15} mend: {found['install']}")
    console.result(report)
    return 0 if can["run"]["ok"] else 1


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _purpose(purpose: str, packages: dict[str, str]) -> dict[str, object]:
    versions = {
        name: metadata.version(name) if util.find_spec(module) is not None else None
        for name, module in packages.items()
    }
    return {"ok": None not in versions.values(), "packages": versions, "install": _INSTALL[purpose]}
