"""``mythos-edge validate``: is the bundle whole, and is it still the same model?"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bundle import Bundle, open_bundle, verify_hashes
from mythos_edge.model.errors import CapacityError, UsageError, unavailable
from mythos_edge.model.looped import LoopedModel
from mythos_edge.model.machine import free_memory_bytes
from mythos_edge.runtime import parity
from mythos_edge.runtime.backends.opening import open_backend
from mythos_edge.runtime.backends.ort_session import graph_runner
from mythos_edge.runtime.selftest import self_test
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import arguments, deep_verb, given_tokens, options, other_verb, quality_gate
from mythos_edge.scripts.console import Console
from mythos_edge.scripts.weight_noise import references_of

if TYPE_CHECKING:
    from mythos_edge.model.network import Scored
    from mythos_edge.model.stored_checkpoint import Checkpoint

HELP = "check a bundle's files and self-test, and compare it with its checkpoint or a target with the fp32 one"
LEVELS = ("smoke", "standard", "deep")
LEVELS_HELP = (
    "smoke: files and self-test; standard (default): also logits and depth by every route; deep: inside every loop "
    "step, to find the first part that differs"
)
EXAMPLE = "mythos-edge validate model.bundle --against step_0001000.pt"

_SECOND_CHUNK = 7
_POSITIONS = 48
_TIES = {
    "router": "a tie of the router: two experts are equally good, and another kernel may choose the other",
    "halting": "a tie of halting: its mass meets the threshold, and another kernel may halt a loop step later",
}
# Where positions halt at depths of their own, for a gate whose own threshold none reaches.
_HALTING_THRESHOLD = 0.5
# Random sequences to try until on one of them no tie of the router leaves anything undecided.
_SEQUENCES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_bundle(parser)
    parser.add_argument(
        "--against",
        type=arguments.file_name,
        metavar="CHECKPOINT|TARGET|OTHER.onnx",
        help="the checkpoint to compare with, in torch; or a whole model in one file, as a bundle's model.onnx is, "
        "which somebody edited or converted; or a target of the bundle, or the word "
        f"{quality_gate.FP32} for its first: compare --target with that, at --level deep inside every loop step",
    )
    parser.add_argument("--level", choices=LEVELS, default="standard", help=LEVELS_HELP)
    text = "write what --level deep finds as one HTML page, with plots and what the model does"
    parser.add_argument("--report", type=arguments.path, metavar="HTML", help=text)
    arguments.add_checkpoint(parser, "the rotary table the bundle was exported with, where its checkpoint has another")
    parser.add_argument(
        "--ids", type=arguments.file_name, metavar="NPY", help="tokens to compare on (default: random ones)"
    )
    given_tokens.add_text(parser)
    given_tokens.add_row_tokens(parser)
    text = f"length of the random sequence (default: {_POSITIONS})"
    parser.add_argument("--positions", type=int, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    quality_gate.add_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    options.check_seed(args.seed)
    bundle = open_bundle(args.bundle, trust_engines=args.trust)
    _check_checkpoint_options(args, bundle)
    deep_verb.check_arguments(args, bundle, console)
    ids = _tokens(args, bundle)
    with ExitStack() as opened:
        compare = _comparison(args, bundle, ids, console, opened)  # before minutes of hashing
        verify_hashes(bundle, lambda share: console.progress("hashing the files", share))
        console.progress("self-test", 0.0)
        # Of the manifest whose files were hashed, whatever stands there meanwhile.
        session = opened.enter_context(Session(bundle, open_backend(bundle, bundle.manifest.default_target)))
        tested = self_test(session)
        report: dict[str, Any] = {
            "passed": tested.passed,
            "self_test_max_abs": tested.max_abs,
            "self_test_tie": tested.tie or None,
        }
        console.say(f"files     whole ({len(bundle.manifest.files)} files)")
        console.say(f"self-test largest logit difference {tested.max_abs:.2g}, allowed {tested.allowed:.2g}")
        if tested.tie:
            console.say(f"          not decisive: {_TIES[tested.tie]}, so the difference is no failure")
        if compare is not None:
            compared = compare(session)
            report |= compared | {"passed": report["passed"] and compared["passed"]}
    console.say("passed" if report["passed"] else "FAILED")
    console.result(report)
    return 0 if report["passed"] else 1


def _comparison(
    args: argparse.Namespace, bundle: Bundle, ids: NDArray[np.int64], console: Console, opened: ExitStack
) -> Callable[[Session], dict[str, Any]] | None:
    """Opens what --against names and returns the comparison to run; None without it."""
    if args.against is None:
        return None
    bundle.require_whole("compare")
    if quality_gate.is_model_file(args, bundle):
        return other_verb.of_file(args, bundle, ids, console, opened)
    if args.level == "deep" and quality_gate.target_against(args, bundle) is not None:
        return deep_verb.of_target(args, bundle, ids, console, opened)
    if quality_gate.target_against(args, bundle) is not None:
        rounded = open_backend(bundle, args.target, trust=args.trust, cache=args.cache)
        opened.callback(rounded.close)
        return lambda session: quality_gate.compare(args, bundle, rounded, ids, console)
    try:
        from mythos_edge.model.checkpoint import open_checkpoint
    except ImportError as error:
        raise unavailable(error, "comparing with a checkpoint", "pip install 'mythos-edge[export]'") from error
    with suppress(OSError):  # a name that no file can have is told below
        if not Path(args.against).exists():
            targets = ", ".join(bundle.manifest.targets)
            raise UsageError(
                f"--against {args.against}: no such file, and no target of the bundle, which has {targets}"
            )
    record = bundle.manifest.rope_table
    if args.rope_table not in (None, record):
        raise UsageError(f"--rope-table is {args.rope_table}, but the bundle was made with the table {record}")
    # The bundle's record settles what to compute with, but a table of another theta it does not excuse.
    chosen = record if record == "stored" else args.rope_table
    checkpoint = opened.enter_context(
        open_checkpoint(Path(args.against), args.config, key=args.key, rope_table=chosen, tolerate=("real",))
    )
    for note in checkpoint.notes:
        console.note(f"note: {note}")
    if checkpoint.config.to_dict() != bundle.manifest.config:
        raise UsageError(
            f"{args.against}: has another config than the bundle: validate against the checkpoint it was made from"
        )
    if args.level == "deep":
        deep_verb.check_memory(checkpoint.n_parameters)
        return deep_verb.of_checkpoint(args, bundle, checkpoint, ids, console, opened)
    needed, free = 8 * checkpoint.n_parameters, free_memory_bytes()
    if free is not None and free < needed:
        raise CapacityError(
            f"comparing in float64 needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: "
            "use a larger machine, or validate without --against"
        )
    return lambda session: _compare(args, checkpoint, session, ids, console)


def _check_checkpoint_options(args: argparse.Namespace, bundle: Bundle) -> None:
    """Raises UsageError for an option about a checkpoint where --against names none."""
    stray = next((name for name in ("rope_table", "key", "config") if getattr(args, name) is not None), None)
    if stray is None:
        return
    about = f"--{stray.replace('_', '-')} is about a checkpoint"
    if args.against is None:
        raise UsageError(f"{about}: add --against CHECKPOINT")
    if quality_gate.is_model_file(args, bundle):
        raise UsageError(f"{about}, but {args.against} is a graph: leave it out")
    if quality_gate.target_against(args, bundle) is not None:
        raise UsageError(f"{about}, but {args.against} is a target of the bundle: leave it out")


def _compare(
    args: argparse.Namespace, checkpoint: "Checkpoint", session: Session, ids: NDArray[np.int64], console: Console
) -> dict[str, Any]:
    """The comparison on ``ids``, or on the first random ones after them on which no tie of the router counts.

    Where ties count on all sequences, one that failed is reported before one that passed.
    """
    undecided: list[dict[str, Any]] = []
    for seed in range(args.seed, args.seed + (_SEQUENCES if args.ids is None and args.text is None else 1)):
        if undecided:
            console.say(f"undecided after ties of the router: comparing on the random tokens of seed {seed}")
            ids = _random_ids(args, session.bundle, seed)
        report = _compare_on(args, checkpoint, session, ids, console)
        if not any(_undecided(route) for route in report["routes"].values()):
            return report
        undecided.append(report)
    return min(undecided, key=lambda report: bool(report["passed"]))


def _undecided(route: dict[str, Any]) -> bool:
    """Whether a tie of the router left positions out, or is what the first difference follows."""
    return bool(route["router_ties"]) and (route["compared"] < 1 or route["inconclusive"] > 0)


def _compare_on(
    args: argparse.Namespace, checkpoint: "Checkpoint", session: Session, ids: NDArray[np.int64], console: Console
) -> dict[str, Any]:
    references, own_error = _references(args, checkpoint, session.bundle, ids, console)
    largest = max(float(reference.logits.abs().max()) for reference in references.values())
    allowed = parity.tolerance(own_error, largest)
    routes: dict[str, parity.ParityReport] = {}
    for threshold, reference in references.items():
        logits, depth, margin, router_margin, _ = (part.numpy() for part in reference)
        for name, run_route in _routes(session, ids, threshold).items():
            console.progress(f"running {name}", 0.0)
            routes[name] = parity.compare(logits, run_route[0], depth, run_route[1], margin, router_margin, allowed)
    passed = all(parity.passes(route, allowed) for route in routes.values())
    second = min(_SECOND_CHUNK, ids.shape[1])
    exact = session.score(ids, prefill=second, threshold=threshold).logits
    last = session.score(ids, prefill=second, threshold=threshold, policy="last")
    router_ties = parity.router_ties(router_margin)
    ties = {(tie.row, tie.position): tie for route in routes.values() for tie in route.near_ties}
    width = max(map(len, routes))
    for name, route in routes.items():
        verdict = "DIFFERS" if not parity.passes(route, allowed) else "ok" if route.compared else "tie"
        console.field(
            f"{name:{width}} {verdict:8}",
            f"max abs {route.max_abs:.2g}, max rel l2 {route.max_rel_l2:.2g}, "
            f"top-1 {route.top1_agreement:.1%}, depth {route.depth_agreement:.1%}"
            + (f", {route.compared:.1%} of positions compared" if route.compared < 1 else "")
            + (f", {route.inconclusive:.1%} inconclusive" if route.inconclusive else ""),
            width + 10,
        )
    console.say(f"allowed max abs {allowed:.2g}: the reference's own float32 error is {own_error:.2g}")
    console.say(f"near ties of halting: {len(ties)}")
    if session.model.experts_per_token:
        console.say(f"ties of the router: {len(router_ties)} of {ids.size} positions")
    if router_ties:
        console.say(
            "there experts are equally good: a bundle takes the lowest index, torch and others may take another"
        )
    if any(route.inconclusive for route in routes.values()):
        console.say(
            "inconclusive: these positions differ after a near tie of the router, where float32 may choose either "
            "expert: compare on other tokens, with another --seed, fewer --positions, other --ids or another --text"
        )
    divergence = float(np.abs(last.logits - exact).max())
    console.say(f"policy last differs from exact by up to {divergence:.2g} (it is an approximation)")
    return {
        "passed": passed,
        "max_abs": float(np.max([route.max_abs for route in routes.values()])),  # keeps NaN, as max does not
        "max_rel_l2": float(np.max([route.max_rel_l2 for route in routes.values()])),
        "top1_agreement": min(route.top1_agreement for route in routes.values()),
        "depth_agreement": min(route.depth_agreement for route in routes.values()),
        "near_ties": [vars(tie) for tie in ties.values()],
        "router_ties": [vars(tie) for tie in router_ties],
        "allowed_max_abs": allowed,
        "reference_fp32_error": own_error,
        "routes": {name: route.to_dict() for name, route in routes.items()},
        "last_policy_max_abs": divergence,
    }


def _thresholds(model: LoopedModel) -> list[float]:
    """The model's threshold; of a gate that never halts at that, another at which it does."""
    never = model.exit_rule == "gate" and model.threshold >= 1
    return [model.threshold, *([_HALTING_THRESHOLD] if never else [])]


def _routes(session: Session, ids: NDArray[np.int64], threshold: float) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Every way the bundle can compute the same: logits and depth by the route's name."""
    made: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    at = "" if threshold == session.model.threshold else f" at {threshold:g}"
    for policy in ("full", "exact"):
        for chunk in (None, min(_SECOND_CHUNK, ids.shape[1])):
            score = session.score(ids, prefill=chunk, policy=policy, threshold=threshold)
            made[f"{policy}{at}, prefill {chunk or 'all'}"] = (score.logits, score.depth)
    bundle, config = session.bundle, session.model
    run_graph = graph_runner(bundle, "model")
    feeds = {
        "input_ids": ids,
        "max_depth": np.array(config.max_depth),
        "threshold": np.array(threshold, np.float32),
    }
    logits, depth = run_graph(feeds)
    made[f"model.onnx{at}"] = (logits, depth)
    return made


def _tokens(args: argparse.Namespace, bundle: Bundle) -> NDArray[np.int64]:
    arguments.require_positive(args, "positions")
    are_given = given_tokens.are_given(args, "--ids", args.ids)
    _check_that_tokens_count(args)
    if are_given:
        return given_tokens.tokens_of(args, args.ids, bundle).ids
    if args.demo_streams is not None:
        return quality_gate.demo_ids(args, bundle)
    return _random_ids(args, bundle, args.seed)


def _check_that_tokens_count(args: argparse.Namespace) -> None:
    """Raises UsageError for tokens that nothing would be compared on, or a length that they have not."""
    given = [name for name in ("positions", "ids", "text", "demo_streams") if getattr(args, name) is not None]
    names = [f"--{name.replace('_', '-')}" for name in given]
    if names and args.level == "smoke":
        raise UsageError(f"{names[0]} says what to compare on, and --level smoke compares nothing: leave one out")
    if names and args.against is None:
        raise UsageError(f"{names[0]} says what to compare on: add --against CHECKPOINT, or leave it out")
    if names[1:] and names[0] == "--positions":
        raise UsageError(
            f"--positions is the length of random tokens, and {names[1]} says which to take: leave one out"
        )


def _random_ids(args: argparse.Namespace, bundle: Bundle, seed: int) -> NDArray[np.int64]:
    positions = min(args.positions or _POSITIONS, bundle.manifest.max_context)
    random = np.random.default_rng(seed)
    return random.integers(0, bundle.manifest.model.vocab_size, (1, positions))


def _references(
    args: argparse.Namespace, checkpoint: "Checkpoint", bundle: Bundle, ids: NDArray[np.int64], console: Console
) -> tuple[dict[float, "Scored"], float]:
    """Runs the checkpoint in float64 at each threshold, and measures how far its own float32 run is from that."""
    import torch

    from mythos_edge.model.layout import load_network

    stored = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[bundle.manifest.dtype]
    with torch.no_grad():
        console.progress("loading the checkpoint", 0.0)
        # The tables of angles only as long as the tokens: a bundle's may be longer than memory.
        network = load_network(checkpoint, ids.shape[1], stored=stored, dtype=torch.float64)
        return references_of(network, ids, _thresholds(bundle.manifest.model), args.seed, console.progress)
