"""Log-probabilities that ``generate`` gives: as an option of a request, as a table for people, and as JSON."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mythos_edge.runtime.decoding import Generation
from mythos_edge.runtime.text import Tokenizer
from mythos_edge.scripts.console import Console, printable_line

_LONGEST_TEXT = 16


def add(parser: argparse.ArgumentParser) -> None:
    """Adds --logprobs."""
    text = (
        "show the natural-log probability of every token and the N likeliest in its place (0: none), as the model "
        "alone gives them: before penalty, temperature and filters"
    )
    parser.add_argument("--logprobs", type=int, metavar="N", help=text)


def option_of(args: argparse.Namespace) -> dict[str, Any]:
    """The option of a request; none unless it was asked for, as results of --file tell how they were made."""
    return {} if args.logprobs is None else {"top_logprobs": args.logprobs}


def values_of(result: Generation, tokenizer: Tokenizer | None, wanted: bool) -> dict[str, Any]:
    """The result for JSON; with ``token_texts``, the text of each of its tokens alone, where they are ``wanted``."""
    values = asdict(result)
    if not wanted:
        del values["top_logprobs"]
    elif tokenizer is not None:
        values["token_texts"] = [tokenizer.text_alone(number) for number in result.ids]
    return values


def show(result: Generation, tokenizer: Tokenizer | None, console: Console) -> None:
    """A table of the tokens of a result, for people."""
    texts = [None if tokenizer is None else tokenizer.text_alone(number) for number in result.ids]
    quoted = [_quoted(text) for text in texts]
    digits, width = (max(map(len, cells), default=0) for cells in (map(str, result.ids), quoted))
    console.say()
    console.say(f"{'id':>{max(digits, 2)}}  {'text':{max(width, 4)}}  logprob  depth  likeliest".rstrip())
    tops: Sequence[Any] = result.top_logprobs or [()] * len(result.ids)
    rows = zip(result.ids, quoted, result.logprobs, result.depths, tops, strict=True)
    for number, text, logprob, depth, top in rows:
        likeliest = "  ".join(f"{_quoted(one.text) or one.id} {one.logprob:.3f}" for one in top)
        line = f"{number:>{max(digits, 2)}}  {text:{max(width, 4)}}  {logprob:7.3f}  {depth:5}  {likeliest}"
        console.say(line.rstrip())


def _quoted(text: str | None) -> str:
    """A token's text in quotes, with what steers a terminal as escapes, and not too much of it."""
    if text is None:
        return ""
    short = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
    return printable_line(json.dumps(short, ensure_ascii=False))
