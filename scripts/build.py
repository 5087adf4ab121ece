"""``mythos-edge build``: adds a target to a bundle. Its options are those that the kinds of targets declare."""

import argparse
from collections import defaultdict
from dataclasses import asdict
from typing import Any

from mythos_edge.exporter.targets.spec import Option, log_of
from mythos_edge.exporter.targets.table import KINDS, target_from
from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.errors import unavailable
from mythos_edge.scripts import arguments, given_tokens
from mythos_edge.scripts.console import Console

HELP = "add a target for a backend to a bundle: rounded or prepacked weights, TensorRT engines"
EXAMPLE = "mythos-edge build model.bundle --target rtx-sm89 --weights int4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_bundle(parser)
    default, wishes = KINDS[0].wishes, ", ".join(kind.wishes for kind in KINDS)
    parser.add_argument("--target", default=default, metavar="NAME", help=f"{wishes} (default: {default})")
    for field, declared in _declared().items():
        told = "; ".join(f"{wishes}: {option.help}" for wishes, option in declared)
        # One flag for all kinds that have the field; each kind refuses the values that are not its own.
        choices = list(dict.fromkeys(choice for _, option in declared for choice in option.choices)) or None
        option = declared[0][1]
        parser.add_argument(
            option.flag, dest=field, choices=choices, type=option.type, metavar=option.metavar, help=told
        )
    given_tokens.add_text(parser)
    given_tokens.add_row_tokens(parser)


def _declared() -> dict[str, list[tuple[str, Option]]]:
    """The options of all kinds by field, each with the name of its kind."""
    found: dict[str, list[tuple[str, Option]]] = defaultdict(list)
    for kind in KINDS:
        for option in kind.options:
            found[option.field].append((kind.kind, option))
    return found


def run(args: argparse.Namespace, console: Console) -> int:
    given = {name: getattr(args, name) for name in _declared() if getattr(args, name) is not None}
    calibrated = given_tokens.are_given(args, "--calibrate", args.calibrate)
    if calibrated:
        given["calibrate"] = args.calibrate or args.text
    target_from(args.target, given)  # refuses what no bundle could change
    before = open_bundle(args.bundle)
    if calibrated:
        given["calibrate"] = given_tokens.tokens_of(args, args.calibrate, before).ids
    target = target_from(args.target, given)
    try:
        from mythos_edge.exporter.targets.build import build

        built = build(before, target, console.progress)
    except ImportError as error:
        raise unavailable(error, "building a target", "pip install 'mythos-edge[export]'") from error
    for stage, report in built.reports.items():
        console.say(
            f"{stage}: engine of {report['plan_bytes'] / 1e6:.1f} MB from {report['layers']} layers, of which "
            f"{report['plugin_layers']} plugins; building took {report['peak_bytes'] / 1e9:.1f} GB of memory"
        )
    _tell(console, before, built.bundle, built.name, **({"engines": built.reports} if built.reports else {}))
    return 0


def _tell(console: Console, before: Bundle, bundle: Bundle, name: str, **more: Any) -> None:
    target, old = bundle.manifest.targets[name], before.manifest.targets.get(name)
    console.say(
        f"{name}: {target.summary}; a token reads {target.fixed_bytes / 1e6:.1f} MB of weights and "
        f"{target.step_bytes / 1e6:.1f} MB at each loop step"
    )
    if old is not None:
        lost = ", ".join(sorted(set(before.manifest.presets) - set(bundle.manifest.presets)))
        console.say(f"replaces the one before ({old.summary})" + (f" and its presets: {lost}" if lost else ""))
    log = log_of(bundle, name)
    if log is not None:
        console.say(f"the words of the native builder are in {log}")
    if target.note:
        console.say(target.note)
    console.say(f"use it with --target {name}")
    console.result({"target": name, **asdict(target), "replaced": old is not None, **more})
