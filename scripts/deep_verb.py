"""``mythos-edge validate --level deep``: its options, what is compared with what, and the report for people."""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import UsageError
from mythos_edge.model.output_files import check_output
from mythos_edge.runtime.backends.opening import open_backend
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import quality_gate
from mythos_edge.scripts.console import Console

if TYPE_CHECKING:
    from mythos_edge.model.stored_checkpoint import Checkpoint
    from mythos_edge.scripts.deep_report import DeepReport

Comparison = Callable[[Session], dict[str, Any]]


def check_arguments(args: argparse.Namespace, bundle: Bundle, console: Console) -> None:
    """Raises UsageError for options that do not go together, or not with the bundle."""
    if args.report is not None and args.level != "deep":
        raise UsageError("--report shows the deep comparison: add --level deep, or leave it out")
    if args.level == "smoke" and args.against is not None:
        raise UsageError("--level smoke compares nothing: leave --against out, or choose standard or deep")
    if args.level != "deep":
        quality_gate.check_arguments(args, bundle)
        return
    if args.against is None:
        raise UsageError("--level deep compares with something: add --against CHECKPOINT")
    if quality_gate.target_against(args, bundle) is not None:
        raise UsageError(f"--level deep compares with a checkpoint: give one in --against in place of {args.against}")
    stray = next((name for name in ("demo_streams", "max_kl", "min_top1") if getattr(args, name) is not None), None)
    if stray is not None:
        raise UsageError(f"--{stray.replace('_', '-')} is for quality: leave it out at --level deep")
    if args.target is not None:
        bundle.target(args.target)
    if args.report is not None:
        check_output(args.report, "the page")
        console.leave_stdout_to(args.report)


def of_checkpoint(
    args: argparse.Namespace,
    bundle: Bundle,
    checkpoint: "Checkpoint",
    ids: NDArray[np.int64],
    console: Console,
    opened: ExitStack,
) -> Comparison:
    """The deep comparison of a target, by default the first, with an open checkpoint."""
    from mythos_edge.scripts.deep_check import Deep

    target = args.target or bundle.manifest.default_target
    backend = open_backend(bundle, target, trust=args.trust)
    opened.callback(backend.close)
    deep = Deep(bundle, target, backend, checkpoint, args.seed, console.progress)

    def compare(session: Session) -> dict[str, Any]:
        report = _reports(deep.report, ids)
        told = _told(target, report, console)
        if args.report is not None:
            from mythos_edge.scripts import deep_page

            about = (
                f"Target {target} against {args.against}, on {len(report.ids)} tokens. What is allowed is measured: it "
                "follows how far float32 takes the reference itself from float64 on the same inputs."
            )
            deep_page.write(args.report, bundle, target, report, about, args.trust)
            console.say(f"written   {args.report}")
        return {**told, "report": None if args.report is None else str(args.report)}

    return compare


def _reports(report_of: Callable[[NDArray[np.int64]], "DeepReport"], ids: NDArray[np.int64]) -> "DeepReport":
    """The report of the first sequence that fails, or of the last."""
    for row in ids:
        report = report_of(row)
        if not report.passed:
            break
    return report


def _told(target: str, report: "DeepReport", console: Console) -> dict[str, Any]:
    values = report.to_dict()
    console.say(f"target    {target} on {len(report.ids)} positions, inside every loop step")
    console.say("| part      | worst error, as a share of what is allowed |")
    console.say("|-----------|-------------------------------------------:|")
    for part, worst in values["parts"].items():
        console.say(f"| {part:9} | {worst:42.3g} |")
    console.say("| loop step | state's error | float32's own | carried on by A |")
    console.say("|----------:|--------------:|--------------:|----------------:|")
    bound = ["-"] * len(report.growth) if report.bound is None else [f"{one:.2g}" for one in report.bound]
    for index, (found, own) in enumerate(zip(report.growth, report.reference_growth, strict=True)):
        console.say(f"| {index:9} | {found:13.2g} | {own:13.2g} | {bound[index]:>15} |")
    if report.contraction is not None:
        one = report.contraction
        console.say(
            f"A         from {one.least:.3g} to {one.largest:.6g}: {'' if one.contracts else 'not '}within 0 .. 1"
        )
    if report.router_agreement is not None:
        console.say(f"router    {report.router_agreement:.2%} of the choices agree")
    for tie in [tie for tie in report.ties if tie.differs]:
        console.say(f"tie       {tie.kind} at position {tie.position}, loop step {tie.step_index}: {tie.margin:.2g}")
    if report.ties:
        console.say(f"near ties {len(report.ties)}, which are no failure")
    for name in report.missing:
        console.say(f"unseen    {name}: the graph does not show it")
    _tell_first(report, console)
    return {"level": "deep", "target": target, **values}


def _tell_first(report: "DeepReport", console: Console) -> None:
    from mythos_edge.scripts.deep_report import ADVICE

    first = report.first_divergence
    if first is None:
        console.say("first divergence: none")
        return
    console.say(
        f"first divergence: position {first.position}, loop step {first.step_index}, {first.part} ({first.kind}): "
        f"{first.tap} is off by {first.error:.2g}, allowed {first.allowed:.2g}"
    )
    if first.detail:
        console.say(f"          {first.detail}")
    console.say(f"try       {ADVICE[first.kind]}")
