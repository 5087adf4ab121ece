"""Writes docs/reference/ and the list of modules in docs/architecture.md from parsers and docstrings.

    python -m mythos_edge.scripts.lab.write_reference            # writes
    python -m mythos_edge.scripts.lab.write_reference --check    # exit code 1 where a page is not current

The pages do not depend on the machine, on the width of the terminal or on the version of Python.
"""

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mythos_edge.scripts import cli

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_ROOMS = ("model", "plugins", "exporter", "runtime", "scripts")
# The Python API by page section: what a section is about, its module, the names in it.
PUBLIC = (
    ("Run a bundle", "mythos_edge.runtime.session", ("Session",)),
    ("Requests and results", "mythos_edge.runtime.options", ("Options",)),
    ("", "mythos_edge.runtime.decoding", ("Generation", "Token")),
    ("", "mythos_edge.runtime.scoring", ("Score",)),
    ("", "mythos_edge.runtime.caches", ("CachePlan",)),
    ("Export", "mythos_edge.model.checkpoint", ("open_checkpoint",)),
    ("", "mythos_edge.exporter.export", ("export_bundle",)),
    ("Bundles", "mythos_edge.model.bundle", ("Bundle", "open_bundle")),
    ("", "mythos_edge.model.manifest", ("Manifest",)),
    ("transformers", "mythos_edge.runtime.integrations.transformers", ("MythosForCausalLM",)),
)


def cli_page() -> str:
    """The page of the command line: every verb with its options."""
    parser = cli.parser()
    verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    common = argparse.ArgumentParser()
    cli.add_common(common)
    every = {option for action in common._actions for option in action.option_strings}
    lines = ["# Command line", "", _GENERATED, "", f"{parser.description}", "", "Every verb takes these:", "", *_HEADER]
    lines += [*(_row(action) for action in common._actions), ""]
    for name, verb in verbs.choices.items():
        lines += [f"## {name}", "", _sentence(verb.description or ""), ""]
        lines += ["```sh", *_examples(verb), "```", ""]
        own = [
            action
            for action in verb._actions
            if action.help != argparse.SUPPRESS and not every & {*action.option_strings}
        ]
        lines += [*_HEADER, *map(_row, own), ""] if own else []
    return "\n".join(lines).rstrip() + "\n"


def _examples(verb: argparse.ArgumentParser) -> list[str]:
    return [line.strip() for line in (verb.epilog or "").partition(":")[2].splitlines() if line.strip()]


def _row(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    takes = "" if action.nargs == 0 or not action.option_strings else f" `{action.metavar or _choices(action)}`"
    told = (action.help or "") % {**vars(action), "prog": "mythos-edge"}
    return f"| {names}{takes} | {_sentence(told)} |".replace("||", "\\|\\|")


def _choices(action: argparse.Action) -> str:
    return ",".join(map(str, action.choices)) if action.choices else action.dest.upper()


def _sentence(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ")", "`")) or not text else ".")


def python_page() -> str:
    """The page of the Python API: signatures and docstrings."""
    lines = ["# Python API", "", _GENERATED, ""]
    for title, module_name, names in PUBLIC:
        module = import_module(module_name)
        lines += [f"## {title}", ""] if title else []
        for name in names:
            lines += _entry(name, getattr(module, name), f"{module_name}.", "###")
    errors = import_module("mythos_edge.model.errors")
    lines += ["## Errors", "", _docstring(errors), ""]
    return "\n".join(lines).rstrip() + "\n"


def _entry(name: str, thing: Any, home: str, level: str) -> Iterator[str]:
    yield from (f"{level} {name}", "", "```python", *_signature(name, thing, home), "```", "", _docstring(thing), "")
    if inspect.isclass(thing):
        for own, member in vars(thing).items():
            member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if not own.startswith("_") and inspect.isfunction(member) and member.__doc__:
                yield from _entry(f"{name}.{own}", member, "", "####")


def _signature(name: str, thing: Any, home: str) -> list[str]:
    prefix = [f"from {home.rstrip('.')} import {name}"] if home else []
    if isinstance(thing, type):
        return prefix
    signature = re.sub(r"mythos_edge\.[\w.]+\.|pathlib\.|collections\.abc\.|numpy\.|typing\.", "", str(_plain(thing)))
    # A function as a default is known by its place in memory, which no two runs share.
    signature = re.sub(r"<function [^@]*? at 0x[0-9a-f]+>", "...", signature)
    signature = re.sub(r"\*<class '(\w+)'>", r"Unpack[\1]", signature)
    return [*prefix, f"{name}{signature}"]


def _plain(function: Any) -> inspect.Signature:
    """The signature with annotations as they are written, which every version of Python shows alike."""
    signature = inspect.signature(function)
    parameters = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    return signature.replace(parameters=parameters)


def _docstring(thing: Any) -> str:
    text = inspect.getdoc(thing) or ""
    # An indented drawing stays one; names in code marks as Markdown has them.
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def architecture_page() -> str:
    """The page of the architecture with one line for each module, the first sentence of its docstring."""
    before, begin, rest = (DOCS / "architecture.md").read_text(encoding="utf-8").partition("<!-- modules -->\n")
    _, end, after = rest.partition("<!-- end of modules -->")
    lines = []
    for room in _ROOMS:
        folders = sorted({path.parent for path in (ROOT / room).rglob("*.py")})
        for folder in folders:
            lines += [f"\n**{folder.relative_to(ROOT).as_posix()}/**\n"]
            lines += [f"- `{path.stem}`: {_first_sentence(path)}" for path in sorted(folder.glob("*.py"))]
    return before + begin + "\n".join(lines) + "\n\n" + end + after


def _first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = " ".join(text.partition("\n\n")[0].split())
    return re.sub(r"``([^`]+)``", r"`\1`", re.split(r"(?<=[.:]) ", sentence)[0].rstrip(":."))


_HEADER = ("| argument | what it does |", "|---|---|")
_GENERATED = "Generated by `python -m mythos_edge.scripts.lab.write_reference`; a test keeps it current."
PAGES = {
    "reference/cli.md": cli_page,
    "reference/python.md": python_page,
    "architecture.md": architecture_page,
}


def main() -> int:
    """Writes the pages, or with ``--check`` compares them; the exit code."""
    stale = [name for name, page in PAGES.items() if _read(DOCS / name) != page()]
    if "--check" in sys.argv[1:]:
        print("\n".join(f"docs/{name} is not current" for name in stale) or "current")
        return bool(stale)
    for name in stale:
        (DOCS / name).parent.mkdir(parents=True, exist_ok=True)
        (DOCS / name).write_text(PAGES[name](), encoding="utf-8")
        print(f"wrote docs/{name}")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
