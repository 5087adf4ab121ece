"""``mythos-edge doctor``: what this machine can do, and the install line for what is missing."""

import argparse
import platform
import shutil
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

from mythos_edge.exporter.targets.spec import EXPORT, RUN, GpuNeed, Packages
from mythos_edge.exporter.targets.table import KINDS
from mythos_edge.model.errors import MythosEdgeError
from mythos_edge.model.machine import memory, processors
from mythos_edge.model.versions import version_of
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.plugins.processor import has_integer_dot_products
from mythos_edge.scripts.console import Console

HELP = "show what this machine can export and run"
EXAMPLE = "mythos-edge doctor --json"

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
        targets = ", ".join(gpu["targets"]) or f"none but {KINDS[0].wishes}"
        text = f"{gpu['name']}, sm{gpu['compute_capability']}, {gpu['memory_gb']} GB -> {targets}"
        console.field("gpu", text, _INDENT)
    for target, found in report["targets"].items():
        console.field(target, ", ".join(f"{verb}: {found[verb]}" for verb in ("build", "run")), _INDENT)
    console.result(report)
    return 0 if can["run"]["ok"] else 1


def examine(load_driver: Callable[[], Driver]) -> dict[str, Any]:
    """Everything the verb says, as it goes into JSON."""
    usable, free = processors(), memory()
    can = {packages.name: _purpose(packages) for packages in _packages()}
    _count_other_names(can)
    gpus, no_gpu = _gpus(load_driver)
    return {
        "mythos_edge": version_of("mythos-edge"),
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
    """The facts about each GPU, and why there is none."""
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
    return [
        machine.wish.replace("smXX", f"sm{capability}")
        for kind in reversed(KINDS)
        for machine in kind.machines
        if any(isinstance(need, GpuNeed) and need.fits(capability) for need in machine.run)
    ]


def _packages() -> list[Packages]:
    """The sets of packages that anything needs."""
    machines = [machine for kind in KINDS for machine in kind.machines]
    needs = [RUN, EXPORT, *(need for machine in machines for need in (*machine.build, *machine.run))]
    return list({need.name: need for need in needs if isinstance(need, Packages)}.values())


def _targets(can: dict[str, dict[str, Any]], capabilities: list[int]) -> dict[str, dict[str, str]]:
    """For each kind of target whether it can be built and run here: ``yes``, or what is missing."""

    def there(need: Packages | GpuNeed) -> bool:
        return can[need.name]["ok"] if isinstance(need, Packages) else any(map(need.fits, capabilities))

    return {
        machine.wish: {
            verb: _answer({need.name: there(need) for need in needs})
            for verb, needs in (("build", machine.build), ("run", machine.run))
        }
        for kind in KINDS
        for machine in kind.machines
    }


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


def _purpose(packages: Packages) -> dict[str, Any]:
    versions = {name: installed(name, module) for name, module in packages.modules.items()}
    return {"ok": None not in versions.values(), "packages": versions, "install": packages.install}


def _count_other_names(can: dict[str, dict[str, Any]]) -> None:
    """Counts a module of the runtime as installed where another package brings it, as onnxruntime-gpu does."""
    run = can[RUN.name]
    for packages in _packages():
        for name, module in packages.modules.items():
            other = next((own for own, brings in RUN.modules.items() if brings == module and own != name), None)
            if other is not None and can[packages.name]["ok"]:
                run["packages"][other] = can[packages.name]["packages"][name]
    run["ok"] = None not in run["packages"].values()


def installed(package: str, module: str) -> str | None:
    """The version of an installed package whose module can be found."""
    try:
        return metadata.version(package) if util.find_spec(module) is not None else None
    except metadata.PackageNotFoundError:
        return None
