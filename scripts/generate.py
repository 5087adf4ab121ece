"""``mythos-edge generate``: text or token ids from a bundle."""

import argparse
from typing import Any

from mythos_edge.model.errors import UsageError
from mythos_edge.model.output_files import check_output, is_standard_output
from mythos_edge.runtime.halting import depth_of_preset
from mythos_edge.runtime.options import Options
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import arguments, given_tokens, logprobs, options, prompt_file
from mythos_edge.scripts.console import Console

HELP = "generate text or token ids from a bundle"
EXAMPLE = 'mythos-edge generate model.bundle -p "Once upon a time" --max-new-tokens 50'
# What is given when there is no stdin to read.
_SOURCES = "-p TEXT, --ids 1,2,3, -f FILE or --file JSONL"
# What a sequence is begun with, and goes on with.
_OF_SEQUENCE = (*options.DEPTH, *options.SAMPLING)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_bundle(parser)
    prompt = parser.add_mutually_exclusive_group()
    text = "may begin with a dash; one that is an option: -p=--json; '-' is stdin, as is a pipe where nothing is given"
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help=text)
    prompt.add_argument("--ids", metavar="1,2,3", help="token ids instead of text")
    text = "a prompt in UTF-8; of a file and of stdin one line break at the end is no part of it"
    prompt.add_argument("-f", "--prompt-file", type=arguments.file_name, metavar="FILE", help=text)
    text = f'prompts: {{"prompt": TEXT}} or {{"ids": [1, 2]}} a line; may have {", ".join(prompt_file.OWN_KEYS)}'
    prompt.add_argument("--file", type=arguments.path, metavar="JSONL", help=text)
    text = "results of --file, a line for each; one that is there is gone on with"
    parser.add_argument("-o", "--output", type=arguments.path, metavar="JSONL", help=text)
    text = f"prompts of --file that run together (default: {prompt_file.TOGETHER})"
    parser.add_argument("--batch", type=int, metavar="N", help=text)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument(
        "--stop-id",
        type=int,
        action="append",
        metavar="ID",
        help="end at this token (repeatable; default: the bundle's end tokens)",
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text (repeatable)")
    parser.add_argument("--special-tokens", action="store_true", help="show special tokens in the text, too")
    text = "write the sequence with its caches and random state when it has ended, to be gone on with by --session"
    parser.add_argument("--save-session", type=arguments.path, metavar="FILE", help=text)
    text = (
        "go on with what --save-session wrote, of the same bundle and target; a prompt is appended (none: it goes on), "
        "depth and sampling are those of the session unless they are given"
    )
    parser.add_argument("--session", type=arguments.path, metavar="FILE", help=text)
    logprobs.add(parser)
    parser.add_argument("--show-depth", action="store_true", help="print the depth of every token")
    options.add_depth(parser)
    options.add_sampling(parser)
    options.add_drafts(parser)
    options.add_target(parser)
    options.add_selftest(parser)
    options.add_threads(parser)
    # None where they are not given, so that a session can say them.
    parser.set_defaults(**dict.fromkeys(_OF_SEQUENCE))


def run(args: argparse.Namespace, console: Console) -> int:
    request = _request(args)
    if args.file is not None:
        return prompt_file.run(args, request, console)
    _check_arguments(args)
    prompt = _prompt(args)
    with options.session_of(args) as session:
        if args.session is not None:
            session.restore(args.session)
            request |= _of_session(args, session)
        stream = session.stream(prompt, resume=args.session is not None, **request)
        as_text = session.tokenizer is not None
        for number, token in enumerate(stream):
            shown = token.text if as_text else f"{',' if number else ''}{token.id}"
            console.text(f"{shown}[{token.depth}]" if args.show_depth else shown)
        console.say()
        result = session.last_generation
        if args.logprobs is not None:
            logprobs.show(result, session.tokenizer, console)
        if args.save_session is not None:
            session.save(args.save_session)
    if result.finish_reason == "context":
        console.note(
            "note: ended because the context is full: export, or build the target, with a larger --max-context"
        )
    if not console.as_json:
        mean_depth = sum(result.depths) / len(result.depths)
        speed = f", {result.decode_tokens_per_s:.1f} tokens/s" if result.decode_tokens_per_s else ""
        drafts = f"{result.accepted} of {result.drafted} drafted tokens accepted, " if result.drafted else ""
        console.note(
            f"{len(result.ids)} tokens, mean depth {mean_depth:.2f}, {result.block_calls} block calls, {drafts}"
            f"first token after {result.ttft_ms:.0f} ms{speed}"
        )
    console.result(logprobs.values_of(result, session.tokenizer, args.logprobs is not None))
    return 0


def _request(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a request; depth and sampling that are not given are those of every new sequence."""
    return {
        "max_new_tokens": args.max_new_tokens,
        "stop_ids": None if args.stop_id is None else tuple(args.stop_id),
        "stop_strings": tuple(arguments.text_of(stop, "--stop") for stop in args.stop),
        "special_tokens": args.special_tokens,
        **logprobs.option_of(args),
        **{name: getattr(Options(), name) for name in _OF_SEQUENCE},
        **_given(args),
        **options.drafts_of(args),
    }


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The options of depth and sampling in the command line."""
    return {name: value for name in _OF_SEQUENCE if (value := getattr(args, name)) is not None}


def _of_session(args: argparse.Namespace, session: Session) -> dict[str, Any]:
    """The options of depth and sampling to go on with. A preset says its own, which must be those of the session."""
    begun = {**session.begun_with, **_given(args)}
    if args.preset is not None:
        begun |= {name: getattr(args, name) for name in depth_of_preset(session.bundle.manifest, args.preset)}
    return begun


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuses what has no meaning for one prompt, and a place that a session cannot be saved to. Raises UsageError."""
    stray = next((name for name in ("output", "batch") if getattr(args, name) is not None), None)
    if stray is not None:
        raise UsageError(f"--{stray} is about a file of prompts: add --file JSONL, or leave it out")
    if args.save_session is not None:
        if is_standard_output(args.save_session):
            raise UsageError(f"{args.save_session}: is where the text goes: choose another place for the session")
        check_output(args.save_session, "the session")


def _prompt(args: argparse.Namespace) -> str | list[int]:
    """The one prompt, wherever it is given. Raises UsageError."""
    if args.ids is not None:
        return given_tokens.ids_from_text(args.ids)
    if args.prompt_file is not None:
        return _without_line_break(given_tokens.text_from_file(args.prompt_file))
    if args.prompt is None and args.session is not None:
        return []
    if args.prompt == "-" or (args.prompt is None and given_tokens.stdin_is_piped()):
        return _without_line_break(given_tokens.text_from_stdin(_SOURCES))
    if args.prompt is None:
        raise UsageError(f"there is no prompt: give {_SOURCES}, or pipe a text to stdin")
    return arguments.text_of(args.prompt, "--prompt")


def _without_line_break(text: str) -> str:
    """The text without one line break at its end, which editors and ``echo`` put there."""
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
