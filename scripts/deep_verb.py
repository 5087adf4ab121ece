"""``mythos-edge validate --level deep``: its options, what is compared with what, and the report for people."""

import argparse
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import CapacityError, UsageError, unavailable
from mythos_edge.model.machine import free_memory_bytes
from mythos_edge.model.output_files import check_output
from mythos_edge.runtime.backends.opening import open_backend
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import quality_gate
from mythos_edge.scripts.console import Console
from mythos_edge.scripts.deep_run import target_run

if TYPE_CHECKING:
    from mythos_edge.model.stored_checkpoint import Checkpoint
    from mythos_edge.scripts.deep_report import DeepReport

Comparison = Callable[[Session], dict[str, Any]]
# Options of the comparison by logits alone. Targets are looked into with caches in their own form.
_QUALITY = ("cache", "demo_streams", "max_kl", "min_top1")
# A reference in float64 and two copies in float32 make 16; measured 17.7 with all else, on a model of 83 million.
_BYTES_A_PARAMETER = 18


def check_arguments(args: argparse.Namespace, bundle: Bundle, console: Console) -> None:
    """Raises UsageError for options that do not go together, or not with the bundle."""
    if args.report is not None and args.level != "deep":
        raise UsageError("--report shows the deep comparison: add --level deep, or leave it out")
    if args.level == "smoke" and args.against is not None and not quality_gate.is_model_file(args, bundle):
        raise UsageError(
            "--level smoke compares with nothing but an OTHER.onnx: leave --against out, or choose standard or deep"
        )
    if args.level != "deep":
        quality_gate.check_arguments(args, bundle)
        return
    if args.against is None:
        raise UsageError("--level deep compares with something: add --against CHECKPOINT, or a target of the bundle")
    beside = quality_gate.target_against(args, bundle)
    if beside is not None:
        _check_pair(args, bundle, beside)
    stray = next((name for name in _QUALITY if getattr(args, name) is not None), None)
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
    return telling(args, bundle, target, ids, console, deep.report)


def of_target(
    args: argparse.Namespace, bundle: Bundle, ids: NDArray[np.int64], console: Console, opened: ExitStack
) -> Comparison:
    """The deep comparison of a target with another of the same bundle."""
    beside = quality_gate.target_against(args, bundle)
    assert beside is not None
    backends = [open_backend(bundle, target, trust=args.trust) for target in (beside, args.target)]
    for backend in backends:
        opened.callback(backend.close)
    try:
        from mythos_edge.exporter.target_weights import TargetWeights
        from mythos_edge.model.families.table import config_of
        from mythos_edge.model.layout import recipes
        from mythos_edge.scripts.deep_check import taps_of
        from mythos_edge.scripts.deep_pair import Pair
    except ImportError as error:
        raise unavailable(error, "looking inside targets", "pip install 'mythos-edge[export]'") from error
    check_memory(sum(math.prod(recipe.shape) for recipe in recipes(config_of(bundle.manifest), 1)))
    pair = Pair(bundle, beside, backends[0], args.target, args.seed, console.progress)
    native = bundle.target(args.target).is_native
    weights = None if native else TargetWeights(bundle, args.target)

    def report(row: NDArray[np.int64]) -> "DeepReport":
        console.progress("running the target", 0.0)
        threshold = bundle.manifest.model.threshold
        given = target_run(bundle, backends[1], taps_of(bundle, args.target), row, threshold)
        return pair.report(given, weights)

    return telling(args, bundle, args.target, ids, console, report)


def check_memory(parameters: int) -> None:
    """Raises CapacityError where a reference of so many parameters does not fit beside its runs in float32."""
    needed, free = _BYTES_A_PARAMETER * parameters, free_memory_bytes()
    if free is not None and free < needed:
        raise CapacityError(
            f"the deep comparison needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: use a larger "
            "machine, or --level standard"
        )


def telling(
    args: argparse.Namespace,
    bundle: Bundle,
    target: str,
    ids: NDArray[np.int64],
    console: Console,
    report_of: Callable[[NDArray[np.int64]], "DeepReport"],
    about: str | None = None,
) -> Comparison:
    """The comparison that ``report_of`` makes of a row of tokens, told on the console and, if asked for, as a page."""

    def compare(session: Session) -> dict[str, Any]:
        report = _reports(report_of, ids)
        told = _told(target, report, console)
        if args.report is not None:
            from mythos_edge.scripts import deep_page

            told_of = about or (
                f"Target {target} against {args.against}, on {len(report.ids)} tokens. What is allowed is measured: it "
                "follows how far float32 takes the reference itself from float64 on the same inputs."
            )
            deep_page.write(args.report, bundle, target, report, told_of, args.trust)
            console.say(f"written   {args.report}")
        return {**told, "report": None if args.report is None else str(args.report)}

    return compare


def _check_pair(args: argparse.Namespace, bundle: Bundle, beside: str) -> None:
    args.target = args.target or bundle.manifest.default_target
    if args.target == beside:
        raise UsageError(
            f"--against {args.against} is the target {beside} itself: name another one of {bundle.path.name} with "
            f"--target, of {', '.join(bundle.manifest.targets)}"
        )
    if bundle.target(beside).is_native:
        raise UsageError(
            f"--against {beside}: its engines show nothing of their inside: compare --target {beside} with one for "
            "ONNX Runtime, or use --level standard"
        )


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
    console.say("| loop step | state's error | reference's own | carried on by A |")
    console.say("|----------:|--------------:|----------------:|----------------:|")
    bound = ["-"] * len(report.growth) if report.bound is None else [f"{one:.2g}" for one in report.bound]
    for index, (found, own) in enumerate(zip(report.growth, report.reference_growth, strict=True)):
        console.say(f"| {index:9} | {found:13.2g} | {own:15.2g} | {bound[index]:>15} |")
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
