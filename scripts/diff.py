"""``mythos-edge diff``: what differs between two bundles or checkpoints, or between one of each."""

import argparse
import json
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeAlias

from mythos_edge.model.bundle import Bundle, has_manifest, open_bundle
from mythos_edge.model.errors import UsageError, unavailable
from mythos_edge.model.json_files import few
from mythos_edge.scripts import arguments
from mythos_edge.scripts.console import Console, printable_line

if TYPE_CHECKING:
    from mythos_edge.model.stored_checkpoint import Checkpoint

HELP = "show what differs between two bundles or checkpoints; exit code 0: nothing, 1: something, 2: an error"
EXAMPLE = "mythos-edge diff old.bundle new.bundle\n  mythos-edge diff model.bundle step_0001000.pt --json"
# As of diff, whose 1 says that two files differ.
ERROR_CODE = 2
# Of what differs, the most that people are shown of each part.
_MOST_LISTED = 20
_MOST_CHARACTERS = 60
_SIDES = ("only_in_a", "only_in_b")
Part: TypeAlias = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=arguments.path, metavar="A", help="a bundle's folder, or a checkpoint")
    text = "another of either; a bundle is compared with what an export of the checkpoint would give it"
    parser.add_argument("b", type=arguments.path, metavar="B", help=text)
    arguments.add_checkpoint(parser, None)


def run(args: argparse.Namespace, console: Console) -> int:
    try:
        from mythos_edge.scripts import differences
    except ImportError as error:
        raise unavailable(error, "comparing", "pip install 'mythos-edge[export]'") from error

    with ExitStack() as opened:
        a, b = _sides(args, console, opened)
        parts = differences.compared(a, b, lambda share: console.progress("comparing the tensors", share))
    for name, part in parts.items():
        _tell(name, part, console)
    if isinstance(a, Bundle) != isinstance(b, Bundle):
        console.say("no graphs, targets and text: those are a bundle's alone")
    same = not any(map(differences.differs, parts.values()))
    console.say("the same" if same else "DIFFERENT")
    console.result({"same": same, "a": str(args.a), "b": str(args.b), **parts})
    return 0 if same else 1


def _sides(args: argparse.Namespace, console: Console, opened: ExitStack) -> "list[Bundle | Checkpoint]":
    """The two that are compared, open. A checkpoint beside a bundle gets the rotary table that the bundle has."""
    from mythos_edge.model.checkpoint import open_checkpoint

    paths = (args.a, args.b)
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
    bundles = [open_bundle(path) if has_manifest(path) else None for path in paths]
    stored = any(one is not None and one.manifest.rope_table == "stored" for one in bundles)
    sides: list[Bundle | Checkpoint] = []
    for path, bundle in zip(paths, bundles, strict=True):
        if bundle is not None:
            sides.append(bundle)
            continue
        checkpoint = opened.enter_context(
            open_checkpoint(
                path,
                args.config,
                key=args.key,
                rope_table="stored" if stored else None,
                tolerate=("real", "theta"),
            )
        )
        for note in checkpoint.notes:
            console.note(f"note: {path}: {note}")
        sides.append(checkpoint)
    return sides


def _tell(name: str, part: Part, console: Console) -> None:
    """One part for people: a line, and below it what differs."""
    if "only_in_a" not in part:
        console.say(f"{name:10}  {_count(len(part), 'difference') if part else 'the same'}")
        _list([_field_line(field, values) for field, values in part.items()], console)
        return
    changed = part["changed"]
    words = [f"{part['compared']} compared", f"{len(changed)} changed"]
    words += [f"{len(part[side])} only in {side[-1].upper()}" for side in _SIDES if part[side]]
    console.say(f"{name:10}  {', '.join(words)}")
    for side in _SIDES:
        if part[side]:
            console.say(f"  only in {side[-1].upper()}: {few(part[side])}")
    if isinstance(changed, list):
        # Those that are farthest off, and others without a measure before them, come first.
        ordered = sorted(changed, key=lambda one: -one.get("relative_l2", float("inf")))
        _list([f"{one['name']}: {_tensor_words(one)}" for one in ordered], console)
    else:
        _list([line for one, what in changed.items() for line in _nested(one, what)], console)


def _nested(name: str, what: Mapping[str, Any]) -> list[str]:
    """The lines of a graph or target that changed."""
    if what.keys() == {"a", "b"}:
        return [_field_line(name, what)]
    lines = []
    for key, value in what.items():
        if isinstance(value, dict) and "only_in_a" in value:
            lines += [f"{name} {key}, only in {side[-1].upper()}: {few(value[side])}" for side in _SIDES if value[side]]
            changed = value["changed"]
            if isinstance(changed, list):
                lines += [f"{name} {key} {one['name']}: {_tensor_words(one)}" for one in changed]
            else:
                lines += [line for one, inner in changed.items() for line in _nested(f"{name} {key} {one}", inner)]
        elif isinstance(value, dict) and value.keys() == {"a", "b"}:
            lines.append(_field_line(f"{name} {key}", value))
        elif isinstance(value, dict) and value:
            lines.append(f"{name} {key}: {', '.join(_words_of(*one) for one in value.items())}")
        elif value:
            lines.append(f"{name}: {key}")
    return lines


def _words_of(name: str, value: Any) -> str:
    return f"{value} {name}" if isinstance(value, int) else _field_line(name, value)


def _tensor_words(one: Mapping[str, Any]) -> str:
    words = [_field_line(field, one[field]) for field in ("shape", "dtype") if field in one]
    if "changed" in one:
        words.append(
            f"{one['changed']} of {one['values']} values, max abs {one['max_abs']:.3g}, "
            f"relative l2 {one['relative_l2']:.3g}"
        )
        words += [f"{one['not_finite']} not finite"] if one["not_finite"] else []
    return ", ".join(words)


def _field_line(name: str, values: Mapping[str, Any]) -> str:
    return f"{name} {_shown(values['a'])} -> {_shown(values['b'])}"


def _shown(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _list(lines: list[str], console: Console) -> None:
    for line in lines[:_MOST_LISTED]:
        console.say(f"  {printable_line(line)}")
    if len(lines) > _MOST_LISTED:
        console.say(f"  and {len(lines) - _MOST_LISTED} more: --json has all")
