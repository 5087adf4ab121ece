"""``mythos-edge demo``: a small trained model that adds, so that halting depth can be seen to mean something."""

import argparse
import os
import shutil
import time
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from mythos_edge.model.bundle import open_bundle, sha256_of
from mythos_edge.model.errors import ExportError, MythosEdgeError, UsageError, unavailable
from mythos_edge.model.file_locks import locked
from mythos_edge.model.manifest import SCHEMA_VERSION
from mythos_edge.model.user_cache import cache_folder
from mythos_edge.model.versions import version_of
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import addition, arguments
from mythos_edge.scripts.console import Console

HELP = "add two numbers with the demo model and show how deep it thought about each digit"
EXAMPLE = "mythos-edge demo add 999999999999 1"

CHECKPOINT = resources.files("mythos_edge.scripts") / "assets" / "carry_adder.pt"
# The demo model was trained with 8 loop steps and works beyond them; chains up to twelve nines are right.
_MAX_DEPTH = 16
# What a manifest says of its weights.
_MODEL = "01d2e372e4e6e6c4f4fb67e2b07cef4546c973ff9964f5837ba5af67dd382bb2"
_ELSEWHERE = "set XDG_CACHE_HOME to a folder that can be written, or export the model and name it with --bundle"
_INSTALL = "pip install 'mythos-edge[export]'"
# Longer than any export of so small a model takes.
_PATIENCE_S = 600.0
_WAITING = "waiting for another run, which exports the demo model"
_COLOURS = (34, 36, 32, 92, 33, 93, 91, 31, 35, 95)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    add = tasks.add_parser("add", help="streaming column addition")
    add.add_argument("a", metavar="A")
    add.add_argument("b", metavar="B")
    add.add_argument(
        "--bundle", type=arguments.path, help="the demo bundle (default: made once in the user's cache folder)"
    )
    # Also accepted after the task, where people type them; SUPPRESS keeps those given before it.
    add.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(args: argparse.Namespace, console: Console) -> int:
    a, b = addition.check_operand(args.a), addition.check_operand(args.b)
    columns = addition.stream_of(a, b)
    with _open(args.bundle, console) as session, warnings.catch_warnings():
        # The demo says itself how deep it goes.
        warnings.simplefilter("ignore")
        session.score([columns])  # warms up, so that the times below compare
        runs = {
            "exact": _run(session, columns, policy="exact", max_depth=_MAX_DEPTH),
            "full": _run(session, columns, policy="full", max_depth=_MAX_DEPTH),
            "fixed depth 4": _run(session, columns, policy="full", max_depth=4),
            "fixed depth 2": _run(session, columns, policy="full", max_depth=2),
        }
    exact = runs["exact"]
    found = addition.sum_from_ids(exact["ids"])
    _show(console, a, b, exact)
    if found != a + b:
        console.say(f"  wrong: the sum is {a + b}; the longest carry this model was seen to get right is twelve digits")
    console.say(f"\n  {'':14} {'digits right':>12} {'block calls':>12} {'time':>9}")
    for name, one in runs.items():
        console.say(f"  {name:14} {one['accuracy']:12.0%} {one['block_calls']:12} {one['ms']:6.1f} ms")
    console.result(
        {
            "a": a,
            "b": b,
            "sum": found,
            "correct": found == a + b,
            "digits": [number - addition.DIGIT_BASE for number in exact["ids"]],
            "depths": exact["depths"],
            "runs": {name: {k: one[k] for k in ("accuracy", "block_calls", "ms")} for name, one in runs.items()},
        }
    )
    return 0 if found == a + b else 1


def _run(session: Session, columns: list[int], **depth: Any) -> dict[str, Any]:
    """The stream fed one column at a time, as it would arrive."""
    started = time.perf_counter()
    score = session.score([columns], prefill=0, **depth)
    ms = (time.perf_counter() - started) * 1e3
    # The first column only marks the start.
    ids = score.logits[0, 1:, addition.DIGIT_BASE :].argmax(-1) + addition.DIGIT_BASE
    wanted = addition.digits(np.array(columns))[1:] + addition.DIGIT_BASE
    return {
        "ids": ids.tolist(),
        "depths": score.depth[0, 1:].tolist(),
        "accuracy": float((ids == wanted).mean()),
        "block_calls": score.block_calls,
        "ms": ms,
    }


def _show(console: Console, a: int, b: int, exact: dict[str, Any]) -> None:
    """The sum as on paper, most significant digit first, with the depth of each digit below it."""
    depths = exact["depths"][::-1]
    digits = [str(number - addition.DIGIT_BASE) for number in exact["ids"]][::-1]
    width = max(len(str(depth)) for depth in depths) + 1
    cells = [_coloured(f"{digit:>{width}}", depth, console.colour) for digit, depth in zip(digits, depths, strict=True)]
    rows = ((str(a), ""), (str(b), "+"))
    for number, sign in rows:
        console.say(f"{sign:>7} " + "".join(f"{digit:>{width}}" for digit in number.rjust(len(digits))))
    console.say(f"{'=':>7} " + "".join(cells), coloured=True)
    console.say(f"{'depth':>7} " + "".join(f"{depth:>{width}}" for depth in depths))


def _coloured(text: str, depth: int, colour: bool) -> str:
    return f"\x1b[1;{_COLOURS[min(depth, len(_COLOURS)) - 1]}m{text}\x1b[0m" if colour else text


def _open(given: Path | None, console: Console) -> Session:
    """A session on the bundle that was given, or on the one in the user's cache folder, where it is made if need be."""
    if given is None:
        return Session.open(_cached_bundle(console))
    bundle = open_bundle(given)
    vocab_size = bundle.manifest.model.vocab_size
    if vocab_size != addition.VOCAB_SIZE or bundle.manifest.tokenizer is not None:
        raise UsageError(
            f"{given}: is another model, of {vocab_size} tokens; the demo needs its own, of {addition.VOCAB_SIZE} "
            "columns and digits: leave --bundle out, or export scripts/assets/carry_adder.pt"
        )
    if bundle.manifest.source.sha256 != _MODEL:
        console.note(f"note: {given} is not of the weights that come with the demo: its sums may be wrong")
    # What was looked at, whatever stands there by now.
    return Session.of(bundle)


def _cached_bundle(console: Console) -> Path:
    """The exported demo model, made at the first use or when it is damaged, and kept in the user's cache folder."""
    with resources.as_file(CHECKPOINT) as checkpoint:
        # Another version of this package may trace it otherwise.
        version = version_of("mythos-edge")
        name = f"carry-adder-{sha256_of(checkpoint)[:12]}-{version}-{SCHEMA_VERSION}.bundle"
        root = cache_folder()
        try:
            if _damage(root / name) is None:
                return root / name
            root.mkdir(parents=True, exist_ok=True)
            # Of several first runs at once one exports, and the others wait for it.
            with locked(
                root / f".{name}.lock", create=True, patience_s=_PATIENCE_S, waiting=lambda: console.note(_WAITING)
            ):
                damage = _damage(root / name)
                if damage is not None:
                    _export(checkpoint, root / name, damage, console)
            return root / name
        except OSError as error:
            raise UsageError(f"{root}: cannot keep the demo's bundle there: {error.strerror}: {_ELSEWHERE}") from error


def _damage(bundle: Path) -> str | None:
    """Why the cached bundle cannot be used, "" where there is none, None where it is whole."""
    if not os.path.lexists(bundle):
        return ""
    try:
        opened = open_bundle(bundle, hashes=True)
        opened.target(opened.manifest.default_target)
    except MythosEdgeError as error:
        return str(error)
    return None


def _export(checkpoint: Path, bundle: Path, damage: str, console: Console) -> None:
    """Makes the cached bundle, in place of a damaged one."""
    try:
        from mythos_edge.exporter.export import export_bundle
        from mythos_edge.model.checkpoint import open_checkpoint
    except ImportError as error:
        raise unavailable(error, "the demo's first run exports its model and", _INSTALL) from error
    if damage:
        console.note(f"note: the cached demo bundle is damaged and is made again: {damage}")
        if bundle.is_dir() and not bundle.is_symlink():
            shutil.rmtree(bundle)
        else:
            bundle.unlink()
    console.note(f"exporting the demo model once to {bundle}")
    try:
        with open_checkpoint(checkpoint) as opened:
            export_bundle(opened, bundle, progress=console.progress)
    except ExportError as error:
        raise ExportError(f"{error}; or {_ELSEWHERE}") from error
