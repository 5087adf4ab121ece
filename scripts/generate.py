"""``mythos-edge generate``: text or token ids from a bundle."""

import argparse
from dataclasses import asdict

from mythos_edge.scripts import arguments, given_tokens, options
from mythos_edge.scripts.console import Console

HELP = "generate text or token ids from a bundle"
EXAMPLE = 'mythos-edge generate model.bundle -p "Once upon a time" --max-new-tokens 50'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_bundle(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "-p", "--prompt", metavar="TEXT", help="may begin with a dash; one that is an option: -p=--json"
    )
    prompt.add_argument("--ids", metavar="1,2,3", help="token ids instead of text")
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
    parser.add_argument("--show-depth", action="store_true", help="print the depth of every token")
    options.add_depth(parser)
    options.add_sampling(parser)
    options.add_drafts(parser)
    options.add_target(parser)
    options.add_threads(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    if args.prompt is None:
        prompt: str | list[int] = given_tokens.ids_from_text(args.ids)
    else:
        prompt = arguments.text_of(args.prompt, "--prompt")
    request = {
        "max_new_tokens": args.max_new_tokens,
        "stop_ids": None if args.stop_id is None else tuple(args.stop_id),
        "stop_strings": tuple(arguments.text_of(stop, "--stop") for stop in args.stop),
        "special_tokens": args.special_tokens,
        **options.depth_of(args),
        **options.sampling_of(args),
        **options.drafts_of(args),
    }
    with options.session_of(args) as session:
        stream = session.stream(prompt, **request)
        as_text = session.tokenizer is not None
        for number, token in enumerate(stream):
            shown = token.text if as_text else f"{',' if number else ''}{token.id}"
            console.text(f"{shown}[{token.depth}]" if args.show_depth else shown)
        console.say()
        result = session.last_generation
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
    console.result(asdict(result))
    return 0
