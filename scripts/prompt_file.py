"""``mythos-edge generate --file``: prompts from a file of JSON lines, results to another, which can be gone on with.

Not here: one prompt (``generate``).
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from mythos_edge.model.bounded_files import open_regular, parse_json, read_bounded
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import CapacityError, UsageError
from mythos_edge.model.file_locks import try_lock, unlock
from mythos_edge.model.output_files import check_output
from mythos_edge.model.stages import MAX_TOGETHER
from mythos_edge.runtime.options import RequestOptions
from mythos_edge.runtime.request_values import shown
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import logprobs
from mythos_edge.scripts.console import Console
from mythos_edge.scripts.options import session_of

# The keys of a line that are options of its request, by the names that requests have for them.
_OPTIONS = {
    "max_new_tokens": "max_new_tokens",
    "temperature": "temperature",
    "seed": "seed",
    "stop": "stop_strings",
    "logprobs": "top_logprobs",
}
# Prompts that run together, as many as one run of the block takes.
TOGETHER = MAX_TOGETHER
OWN_KEYS = (*_OPTIONS, "id")
_KEYS = ("prompt", "ids", *OWN_KEYS)
_MOST_BYTES = 1_000_000_000
_LINE = '{"prompt": "..."} or {"ids": [1, 2, 3]}'


@dataclass(frozen=True)
class Line:
    """One line of a file of prompts: its place as ``file:number``, what it asks for, and what its result repeats."""

    place: str
    prompt: Any
    own: RequestOptions
    repeated: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """The hash of the prompt and of its own options."""
        return _sha256([self.prompt, self.own])


def read_lines(path: Path) -> list[Line]:
    """The prompts in a file of JSON lines. Raises UsageError that names the first line that is malformed."""
    try:
        data = read_bounded(path, _MOST_BYTES, "a file of prompts")
    except OSError as error:
        raise UsageError(f"{path}: cannot read the prompts: {error.strerror or error}") from error
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    if not lines:
        raise UsageError(f"{path}: is empty, expected a JSON object a line, as in {_LINE}")
    return [_line(text, f"{path}:{number}") for number, text in enumerate(lines, 1)]


def _line(text: bytes, place: str) -> Line:
    try:
        values = parse_json(text)
    except ValueError as error:  # bytes that are no UTF-8 are one, too
        raise UsageError(f"{place}: is no JSON ({_why(error)}), expected {_LINE}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{place}: is {shown(values)}, expected {_LINE}")
    unknown = next((key for key in values if key not in _KEYS), None)
    if unknown is not None:
        raise UsageError(f"{place}: has the key {unknown!r}, expected some of {', '.join(_KEYS)}")
    if ("prompt" in values) == ("ids" in values):
        raise UsageError(
            f"{place}: has {'both a prompt and ids' if 'ids' in values else 'no prompt'}, expected {_LINE}"
        )
    prompt = values.get("prompt", values.get("ids"))
    if not isinstance(prompt, str if "prompt" in values else list):
        expected = "prompt is {}, expected a text" if "prompt" in values else "ids are {}, expected a list of token ids"
        raise UsageError(f"{place}: {expected.format(shown(prompt))}")
    if isinstance(values.get("id"), dict | list):
        raise UsageError(f"{place}: id is {shown(values['id'])}, expected a text or a number")
    own = {name: values[key] for key, name in _OPTIONS.items() if values.get(key) is not None}
    return Line(place, prompt, cast(RequestOptions, own), {key: values[key] for key in ("id",) if key in values})


def run(args: argparse.Namespace, options: dict[str, Any], console: Console) -> int:
    """Writes the result of every prompt of ``args.file`` that has none yet, in their order; the exit code.

    ``options`` are those of all prompts, over which those of a line win.
    """
    _check_arguments(args)
    lines = read_lines(args.file)
    check_output(args.output, "the results")
    total, new_tokens, full = len(lines), 0, 0
    with session_of(args) as session:
        checked = [_checked(line, options, session) for line in lines]
        asked = _asked(args, options, session.bundle)
        with _opened(args.output, lines, asked, console) as (file, kept):
            together = args.batch or TOGETHER
            for start in range(kept, total, together):
                console.progress("generating", start / total)
                some = slice(start, start + together)
                made = session.generate(checked[some], each=[line.own for line in lines[some]], **options)
                values = [
                    logprobs.values_of(one, session.tokenizer, "top_logprobs" in {**options, **line.own})
                    for line, one in zip(lines[some], made, strict=True)
                ]
                file.write(b"".join(_result(line, one, asked) for line, one in zip(lines[some], values, strict=True)))
                file.flush()
                new_tokens += sum(len(one.ids) for one in made)
                full += sum(one.finish_reason == "context" for one in made)
    if full:
        console.note(f"note: {full} ended because the context is full: export with a larger --max-context")
    console.say(f"{args.output}: {total} results, {kept} of them from before; {new_tokens} new tokens")
    console.result({"output": str(args.output), "results": total, "kept": kept, "new_tokens": new_tokens})
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    if args.output is None:
        raise UsageError("--file makes a result for each prompt, and there is no place for them: add -o JSONL")
    stray = next((name for name in ("session", "save_session") if getattr(args, name) is not None), None)
    if stray is not None:
        raise UsageError(f"--{stray.replace('_', '-')} is about one prompt: leave it out, or give the prompt with -p")
    if args.show_depth:
        raise UsageError(
            "--show-depth is about the text of one prompt: leave it out, results of --file have the depths"
        )
    if args.batch is not None and args.batch < 1:
        raise UsageError(f"--batch is {args.batch}, expected at least 1")


def _asked(args: argparse.Namespace, options: Mapping[str, Any], bundle: Bundle) -> str:
    """The hash of what all results depend on: the weights of the target, the depth of a preset and the options."""
    preset = None if args.preset is None else bundle.manifest.presets[args.preset]
    target = args.target or (bundle.manifest.default_target if preset is None else preset.target)
    depth = None if preset is None else [preset.max_depth, preset.threshold]
    return _sha256([bundle.weights_identity(target), depth, options])


def _checked(line: Line, options: Mapping[str, Any], session: Session) -> list[int]:
    try:
        return session.check(line.prompt, **{**options, **line.own})
    except (UsageError, CapacityError) as error:
        raise UsageError(f"{line.place}: {error}") from error


def _result(line: Line, result: Mapping[str, Any], asked: str) -> bytes:
    values = {**line.repeated, **result, "prompt_sha256": line.sha256, "options_sha256": asked}
    # A half of a surrogate pair, which an id may hold, is written as JSON has it.
    return (json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")


@contextmanager
def _opened(path: Path, lines: Sequence[Line], asked: str, console: Console) -> Iterator[tuple[BinaryIO, int]]:
    """The file of results, open after those that it holds, and how many these are; nobody else writes it meanwhile.

    A last line that was half written is cut off. Raises UsageError for results of something else.
    """
    try:
        if not path.exists():
            path.touch()
        with open_regular(path):  # what cannot be read again
            held = try_lock(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot write the results: {error.strerror or error}") from error
    if held is None:
        raise UsageError(f"{path}: another process writes it: wait for that, or choose another output")
    try:
        with path.open("r+b") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            kept = data[:whole].split(b"\n")[:-1]
            _check_kept(path, kept, lines, asked)
            if whole < len(data):
                console.note(f"note: {path}: its last line was half written, and is made again")
                file.truncate(whole)
            file.seek(whole)
            yield file, len(kept)
    finally:
        unlock(held)


def _check_kept(path: Path, kept: Sequence[bytes], lines: Sequence[Line], asked: str) -> None:
    """Raises UsageError unless the results in a file are those of the first of ``lines``."""
    mend = "choose another output, or remove it"
    if len(kept) > len(lines):
        raise UsageError(f"{path}: has {len(kept)} results, there are {len(lines)} prompts: {mend}")
    for number, (text, line) in enumerate(zip(kept, lines, strict=False), 1):
        try:
            result = parse_json(text)
            found = (result["prompt_sha256"], result["options_sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}:{number}: is no result of mythos-edge generate: {mend}") from error
        if found[0] != line.sha256 or {key: result[key] for key in ("id",) if key in result} != line.repeated:
            raise UsageError(f"{path}:{number}: is the result of another prompt than {line.place}: {mend}")
        if found[1] != asked:
            raise UsageError(f"{path}:{number}: was made with other options or another bundle: {mend}")


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _why(error: ValueError) -> str:
    """Says why a line is no JSON, with the place of a character in it."""
    return f"{error.msg}, character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
