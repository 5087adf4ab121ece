"""``mythos-edge validate --against TARGET``: how far rounding has moved a target from another, such as fp32.

Both targets of the bundle see the same tokens, at full depth so that every loop step can be compared: an error that
the loop carries along grows from one loop step to the next, which logits alone do not show.
"""

import argparse
import warnings
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import UsageError
from mythos_edge.model.manifest import TargetRecord
from mythos_edge.runtime.backends.opening import open_backend
from mythos_edge.runtime.backends.protocol import Backend
from mythos_edge.runtime.quality import Gate, QualityReport, Trace, difference, quality_report
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import addition, arguments, options
from mythos_edge.scripts.console import Console
from mythos_edge.scripts.loop_watch import StepRun, Watched, router_probe

FP32 = "fp32"
# By kind of weights: fp32 differs by the order of sums alone; for the others a choice of ours, several times what the
# demo model loses; its exact sums as promised.
GATES = {
    "fp32": Gate(1e-5, 0.999, 1e-4, 0.999, 0.0),
    "int8": Gate(0.01, 0.98, 0.05, 0.95, 0.002),
    "int4": Gate(0.1, 0.9, 0.3, 0.8, 0.01),
}
_STREAMS = 256
_DIGITS = 12
_DEMO_DEPTH = 16
_OPTIONS = ("target", "cache", "demo_streams", "max_kl", "min_top1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quality, with --against TARGET")
    options.add_trust(group)
    group.add_argument("--target", metavar="T", help="the target to compare (default: the bundle's first)")
    options.add_cache(group)
    group.add_argument(
        "--demo-streams",
        type=int,
        nargs="?",
        const=_STREAMS,
        metavar="N",
        help=f"compare on random additions, which the demo model knows, and count exact sums (default N: {_STREAMS})",
    )
    kinds = "; ".join(f"{kind}: {gate.max_kl:g}, {gate.min_top1:g}" for kind, gate in GATES.items())
    group.add_argument(
        "--max-kl", type=float, metavar="NATS", help=f"largest mean KL divergence, and least top-1 by weights: {kinds}"
    )
    group.add_argument(
        "--min-top1", type=float, metavar="SHARE", help="least share of positions with the same top token"
    )


def target_against(args: argparse.Namespace, bundle: Bundle) -> str | None:
    """The target of the bundle that --against means; None for a checkpoint."""
    if args.against == FP32:
        return bundle.manifest.default_target
    return args.against if args.against in bundle.manifest.targets else None


def is_model_file(args: argparse.Namespace, bundle: Bundle) -> bool:
    """Whether --against names a file with a whole model in it, as a bundle's ``model.onnx``."""
    return args.against is not None and args.against.endswith(".onnx") and target_against(args, bundle) is None


def check_arguments(args: argparse.Namespace, bundle: Bundle) -> None:
    """Raises UsageError for options that do not go together, or not with the bundle."""
    reference = target_against(args, bundle)
    if reference is None:
        stray = next((name for name in _OPTIONS if getattr(args, name) is not None), None)
        if stray is not None:
            raise UsageError(f"--{stray.replace('_', '-')} is for quality: add --against {FP32}, or another target")
        return
    args.target = args.target or bundle.manifest.default_target
    if args.target == reference and args.cache in (None, bundle.target(reference).own_cache):
        raise UsageError(
            f"--against {args.against} compares another target, or caches, with {reference}: name it with --target, or "
            "give --cache fp16 or int8"
        )
    given = next((name for name in ("ids", "text") if getattr(args, name) is not None), None)
    if args.demo_streams is not None and given is not None:
        raise UsageError(f"--{given} and --demo-streams both say which tokens to compare on: give one of them")
    arguments.require_positive(args, "demo_streams")
    if args.max_kl is not None:
        options.check_nats(args.max_kl)
    # Written so that NaN fails.
    if args.min_top1 is not None and not 0 <= args.min_top1 <= 1:
        raise UsageError(f"--min-top1 is {args.min_top1}, expected a share from 0 to 1")


def demo_ids(args: argparse.Namespace, bundle: Bundle) -> NDArray[np.int64]:
    """Streams of random additions (streams, positions). Raises UsageError unless the bundle is the demo model."""
    vocab_size = bundle.manifest.model.vocab_size
    if vocab_size != addition.VOCAB_SIZE:
        raise UsageError(
            f"--demo-streams is for the demo model of {addition.VOCAB_SIZE} tokens, this one has {vocab_size}: "
            "give --ids"
        )
    return addition.random_streams(np.random.default_rng(args.seed), args.demo_streams, _DIGITS)


def compare(
    args: argparse.Namespace, bundle: Bundle, rounded: Backend, ids: NDArray[np.int64], console: Console
) -> dict[str, Any]:
    """The report of ``args.target``, opened as ``rounded``, against another on ``ids (B, S)``, told on ``console`` too.

    What is rounded are weights, or cached rows, or both.
    """
    spec = bundle.target(args.target)
    cache, reference = rounded.memory.cache, target_against(args, bundle)
    assert reference is not None
    kept = "" if cache == spec.own_cache else f", caches in {cache}"
    beside = bundle.target(reference)
    by_weights = max((_coarsest(one, one.own_cache) for one in (spec, beside)), key=list(GATES).index)
    coarsest = max(by_weights, _coarsest(spec, cache), key=list(GATES).index)
    gate = _gate(args, coarsest)
    with closing(open_backend(bundle, reference, trust=args.trust)) as other:
        traced = (_Traced(bundle, reference, other), _Traced(bundle, args.target, rounded))
        differences = []
        for row in range(len(ids)):
            console.progress(f"comparing with {args.against}", row / len(ids))
            differences.append(difference(*(one.trace(ids[row : row + 1]) for one in traced)))
        report = quality_report(differences)
        sums = None
        if args.demo_streams is not None:
            console.progress("adding", 0.0)
            named = {reference: other, f"{args.target}{kept}": rounded}
            sums = {name: _exact_sums(Session(bundle, backend), ids) for name, backend in named.items()}
    lost = 0.0 if sums is None else sums[reference] - sums[f"{args.target}{kept}"]
    failures = gate.failures(report, lost)
    tied = sum(int(one.after_tie.sum()) for one in differences)
    if failures and tied and np.isfinite(report.kl_mean):
        # Of equally good experts each target's kernel may choose its own, which says nothing of rounding.
        untouched = [one.before_tie() for one in differences if not one.after_tie.all()]
        report = quality_report(untouched) if untouched else report
        failures = gate.failures(report) if untouched else []
    console.say(f"target    {args.target} ({spec.summary}{kept}) on {ids.shape[0]} x {ids.shape[1]} positions")
    if tied:
        console.say(f"exact ties of the router: {tied} positions at or after one, where a kernel may choose others")
    _tell(report, gate, sums, console)
    if failures:
        of = "weights" if coarsest == by_weights else "caches"
        console.say(f"beyond what {coarsest} {of} may cost: {', '.join(failures)}")
    return {
        "passed": not failures,
        "failures": failures,
        "after_router_ties": tied,
        "target": args.target,
        "against": reference,
        "weights": spec.weights,
        "cache": cache,
        "gate": asdict(gate),
        "quality": report.to_dict(),
        "exact_sums": sums,
    }


def _coarsest(spec: TargetRecord, cache: str) -> str:
    """The form of a target's weights, or of cached rows, that loses most, as ``GATES`` names it."""
    forms = {form for forms in spec.weights.values() for form in forms.split("+")} | {spec.compute_dtype, cache}
    if forms & {"int4", "fp8"}:
        return "int4"
    # 16-bit floats, and caches, are held to what 8-bit weights may cost, which is more than they should.
    return "fp32" if forms == {"fp32"} else "int8"


def _gate(args: argparse.Namespace, weights: str) -> Gate:
    given = {name: getattr(args, name) for name in ("max_kl", "min_top1") if getattr(args, name) is not None}
    return replace(GATES[weights], **given)


def _tell(report: QualityReport, gate: Gate, sums: dict[str, float] | None, console: Console) -> None:
    console.say(
        f"kl        mean {report.kl_mean:.2g}, p99 {report.kl_p99:.2g}, max {report.kl_max:.2g} nats; "
        f"allowed mean {gate.max_kl:g}"
    )
    console.say(f"top-1     {report.top1_agreement:.1%} the same; allowed {gate.min_top1:.1%}")
    console.say(
        f"depth     {report.depth_agreement:.1%} equal, mean difference {report.depth_difference:.2g} loop steps; "
        f"allowed {gate.min_depth:.1%}"
    )
    if sums is not None:
        console.say("sums      " + ", ".join(f"{name} {share:.1%}" for name, share in sums.items()) + " exactly right")
    console.say(f"h error   allowed {gate.max_h_error:g} on average at every loop step")
    console.say(f"| loop step | {'h error':>9} | {'p99':>9} | {'experts in common':>17} | {'same experts':>12} |")
    console.say(f"|{'-' * 10}:|{'-' * 10}:|{'-' * 10}:|{'-' * 18}:|{'-' * 13}:|")
    for index, step in enumerate(report.loop_steps):
        common, same = ("-" if share is None else f"{share:.1%}" for share in (step.common_experts, step.same_experts))
        console.say(f"| {index:9} | {step.h_error_mean:9.2g} | {step.h_error_p99:9.2g} | {common:>17} | {same:>12} |")


def _exact_sums(session: Session, streams: NDArray[np.int64]) -> float:
    """The share of the streams of which every digit is right when they are decoded, all together."""
    with warnings.catch_warnings():
        # The demo model is known to work beyond the depth it was trained with.
        warnings.simplefilter("ignore")
        logits = session.score(streams, prefill=0, max_depth=_DEMO_DEPTH).logits
    # The first column only marks the start.
    found = logits[:, 1:, addition.DIGIT_BASE :].argmax(-1)
    return float((found == addition.digits(streams)[:, 1:]).all(axis=1).mean())


class _Traced:
    """One target of a bundle, run at full depth with every loop step written down, by loop step and position."""

    def __init__(self, bundle: Bundle, target: str, backend: Backend) -> None:
        self._memory = backend.memory
        self._router = router_probe(bundle, target, "comparing targets", backend.memory.cache)
        self._session = Session(bundle, Watched(backend, self._look, self._router))

    def trace(self, ids: NDArray[np.int64], prefill: int | None = None) -> Trace:
        """Runs the target on one sequence ``ids (1, S)``, the first ``prefill`` positions in one chunk."""
        model = self._session.model
        shape = (model.max_depth, ids.shape[1])
        self._h = np.empty((*shape, model.dim), np.float32)
        self._chosen = np.empty((*shape, model.experts_per_token), np.int64)
        self._tied = np.zeros(shape, np.bool_)
        score = self._session.score(ids, policy="full", prefill=prefill)
        return Trace(score.logits[0], score.depth[0], self._h, self._chosen, self._tied)

    def _look(self, run: StepRun) -> None:
        at = run.step_index, run.positions
        self._h[at] = self._memory.to_floats(run.outputs["h_next"])[0]
        if self._router is not None and run.router_input is not None:
            self._chosen[at] = self._router.router.chosen(run.router_input)
            self._tied[at] = self._router.router.tied(run.router_input)
