"""Everything that only a GPU can tell, in one run: facts, kernels against the oracle, speed, targets, GPU tests.

    scripts/gpu_check --folder out/gpu-check

Writes report.md and report.json. What can not run here is listed as skipped, with its reason. The exit code is 0
when nothing failed, 1 when something did or there is no GPU. The bandwidth of a kernel is reported, not judged.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mythos_edge.model.config import VARIANTS
from mythos_edge.model.errors import MythosEdgeError
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.scripts import doctor, gpu_bench
from mythos_edge.scripts.console import Console
from mythos_edge.scripts.gpu_bench import BANDWIDTH_TARGET, Gpu
from mythos_edge.scripts.kernel_cases import Case, cases

_ROOT = Path(__file__).resolve().parent.parent
_CHECKPOINT = _ROOT / "scripts" / "assets" / "carry_adder.pt"
_SHAPES = ("1b", "3b")
_LAST_LINES = 3


@dataclass
class Section:
    """A part of the report; ``status`` is ok, failed or skipped, ``reason`` says why it is not ok."""

    title: str
    status: str = "ok"
    reason: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def fail(self, reason: str) -> None:
        self.status, self.reason = "failed", reason


def main(argv: Sequence[str] | None = None, load_driver: Callable[[], Driver] = Driver.load) -> int:
    """Runs the list; returns the exit code."""
    args = _parser().parse_args(argv)
    console = Console(args.json)
    try:
        driver = load_driver()
    except MythosEdgeError as error:
        console.note(f"error: gpu_check needs an NVIDIA GPU, and there is none to use: {error}")
        return 1
    sections = []
    for section in _sections(driver, args, console):
        console.say(f"{section.status:8} {section.title}{': ' + section.reason if section.reason else ''}")
        sections.append(section)
    args.folder.mkdir(parents=True, exist_ok=True)
    report = {
        "passed": all(section.status != "failed" for section in sections),
        "sections": list(map(asdict, sections)),
    }
    (args.folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.folder / "report.md").write_text(markdown(sections), encoding="utf-8")
    console.say(f"report in {args.folder / 'report.md'} and report.json")
    console.result(report)
    return 0 if report["passed"] else 1


def markdown(sections: Sequence[Section]) -> str:
    """The report for people: a table for each section."""
    lines = ["# GPU check", ""]
    for section in sections:
        lines += [
            f"## {section.title}",
            "",
            f"**{section.status}**" + (f": {section.reason}" if section.reason else ""),
        ]
        if section.rows:
            names = list(dict.fromkeys(name for row in section.rows for name in row))
            lines += ["", "| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
            lines += ["| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |" for row in section.rows]
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_check", description="Checks and measures everything that needs a GPU.")
    parser.add_argument("--folder", type=Path, default=Path("out/gpu-check"), help="where the report goes")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="number of the GPU (default: 0)")
    parser.add_argument("--shapes", default=",".join(_SHAPES), help="model shapes for the kernels (default: 1b,3b)")
    parser.add_argument("--only", choices=("kernels", "targets"), help="leave the other part out")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object on stdout")
    return parser


def _sections(driver: Driver, args: argparse.Namespace, console: Console) -> Iterator[Section]:
    facts = doctor.examine(lambda: driver)
    yield Section("device", rows=[{**gpu, "targets": ", ".join(gpu["targets"])} for gpu in facts["gpus"]])
    if args.only != "targets":
        made = [case for shape in args.shapes.split(",") for case in cases(shape, VARIANTS[shape])]
        yield from kernel_sections(driver, args.device, made, console)
    if args.only != "kernels":
        capability = driver.compute_capability(args.device)
        yield from target_sections(facts, capability, args.folder, _run)


def kernel_sections(driver: Driver, device: int, made: Sequence[Case], console: Console) -> Iterator[Section]:
    """Copy bandwidth, right answers, speed."""
    with Gpu(driver, device) as gpu:
        copies = Section("copy bandwidth")
        bandwidth = 0.0
        try:
            bandwidth = gpu_bench.copy_bandwidth(gpu)
            copies.rows.append({"gb_per_s": round(bandwidth / 1e9, 1), "counts": "bytes read and bytes written"})
        except MythosEdgeError as error:
            copies.fail(str(error))
        yield copies
        right = Section("kernels against the float64 oracle")
        for number, case in enumerate(made):
            console.progress("oracle", number / len(made))
            right.rows.append(_guarded(case, lambda case=case: gpu_bench.check(gpu, case)))  # type: ignore[misc]
        wrong = [row["case"] for row in right.rows if not row["ok"]]
        if wrong:
            right.fail(f"{len(wrong)} of {len(made)} are wrong, the first is {wrong[0]}")
        yield right
        if not bandwidth:
            yield Section(
                "speed of the kernels", "skipped", "without a copy bandwidth there is nothing to compare with"
            )
            return
        yield _speed(gpu, made, bandwidth, console)


def _speed(gpu: Gpu, made: Sequence[Case], bandwidth: float, console: Console) -> Section:
    section = Section("speed of the kernels")
    torch_us = _torch_timer()
    for number, case in enumerate(made):
        console.progress("speed", number / len(made))
        row = _guarded(case, lambda case=case: gpu_bench.measure(gpu, case, bandwidth))  # type: ignore[misc]
        if torch_us is not None:
            row["torch_us"] = torch_us(case)
        section.rows.append(row)
    failed = [row["case"] for row in section.rows if "why" in row]
    if failed:
        section.fail(f"{len(failed)} could not be measured, the first is {failed[0]}")
        return section
    decode = [row for row in section.rows if "reached" in row]
    reached = sum(row["reached"] for row in decode)
    torch = "" if torch_us is not None else "; torch with CUDA is not installed, so nothing was compared with it"
    section.reason = (
        f"{reached} of {len(decode)} decoding kernels reach {BANDWIDTH_TARGET:.0%} of the copy bandwidth{torch}"
    )
    return section


def _guarded(case: Case, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row of a case; one that fails is a row too, and the others still run."""
    try:
        return run()
    except (MythosEdgeError, MemoryError) as error:
        return {"case": case.label, "ok": False, "why": gpu_bench.one_line(error)}


def _torch_timer() -> Callable[[Case], float | str] | None:
    """Times a case in torch, in microseconds; None where torch has no GPU."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    from mythos_edge.scripts import torch_kernels

    def microseconds(case: Case) -> float | str:
        try:
            run = torch_kernels.runner(case, "cuda")
            return "" if run is None else round(torch_kernels.seconds(run) * 1e6, 2)
        except RuntimeError as error:  # torch's own, for a GPU that is full or too old
            return gpu_bench.one_line(error)

    return microseconds


Runner = Callable[[Sequence[str]], tuple[int, str]]


def target_sections(facts: dict[str, Any], capability: int, folder: Path, run: Runner) -> Iterator[Section]:
    """The demo bundle built for every kind of target this GPU has and validated against float32; the GPU's tests."""
    bundle = folder / "demo.bundle"
    verb = [sys.executable, "-m", "mythos_edge.scripts.cli"]
    export = _steps("export of the demo", [[*verb, "export", str(_CHECKPOINT), "-o", str(bundle), "--force"]], run)
    yield export
    for kind, target, name, options in _targets(capability):
        title = f"target {name}"
        found = facts["can"][kind]
        if target is None:
            yield Section(title, "skipped", f"TensorRT for RTX does not serve sm{capability}")
        elif not found["ok"]:
            yield Section(title, "skipped", f"its package is missing: {found['install']}")
        elif export.status != "ok":
            yield Section(title, "skipped", "the demo could not be exported")
        else:
            build = [*verb, "build", str(bundle), "--target", target, *options]
            validate = [*verb, "validate", str(bundle), "--against", "fp32", "--target", name]
            yield _steps(title, [build, validate], run)
    tests = _ROOT / "tests"
    if not tests.is_dir():
        yield Section("tests marked gpu", "skipped", "the package is installed without its tests")
    else:
        yield _steps("tests marked gpu", [[sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(tests)]], run)


def _targets(capability: int) -> Iterator[tuple[str, str | None, str, list[str]]]:
    """What its packages are called, what is built, what that is called in the bundle, and options."""
    for weights in ("none", "int4"):
        suffix = "" if weights == "none" else f"-{weights}"
        chosen = ["--dtype", "fp16", "--weights", weights]
        yield "ort-cuda", "ort-cuda", f"ort-cuda-fp16{suffix}", chosen
        served = capability in doctor.RTX_GPUS
        rtx = f"rtx-sm{capability}"
        yield "tensorrt-rtx", rtx if served else None, f"{rtx}-fp16{suffix}", chosen
        yield "tensorrt", "trt-this-gpu", f"trt-sm{capability}-fp16{suffix}", chosen


def _steps(title: str, commands: Sequence[Sequence[str]], run: Runner) -> Section:
    section = Section(title)
    for command in commands:
        code, said = run(command)
        section.rows.append({"command": " ".join(command[1:]), "exit": code, "said": said})
        if code != 0:
            section.fail(said)
            break
    return section


def _run(command: Sequence[str]) -> tuple[int, str]:
    """Exit code and last lines of a command."""
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return done.returncode, " / ".join(lines[-_LAST_LINES:])


if __name__ == "__main__":
    sys.exit(main())
