"""``mythos-edge tokenize``: the tokens of a text, or the text of tokens."""

import argparse
import json
from pathlib import Path

import numpy as np

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.errors import UsageError
from mythos_edge.model.manifest import MANIFEST_FILE
from mythos_edge.model.output_files import check_output, writing
from mythos_edge.runtime.text import Tokenizer
from mythos_edge.scripts import arguments, given_tokens
from mythos_edge.scripts.console import Console, printable_line

HELP = "show the token ids and pieces of a text, or the text of token ids"
EXAMPLE = 'mythos-edge tokenize model.bundle -p "Once upon a time"'
_IDS = "the ids"
# Ids that the library takes at all.
_NUMBERS = range(1 << 32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "a bundle with a tokenizer, a tokenizer.json, or the folder of one"
    parser.add_argument("tokenizer", type=arguments.path, help=text)
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "-p", "--prompt", metavar="TEXT", help="the text; '-' is stdin, which is read where nothing is given, too"
    )
    given.add_argument("--text", type=arguments.file_name, metavar="FILE", help="a UTF-8 text")
    given.add_argument("--decode", metavar="1,2,3", help="token ids, whose text is shown")
    parser.add_argument("--special-tokens", action="store_true", help="show special tokens in the text of --decode")
    text = "write the ids as an array (1, positions), as other verbs take them"
    parser.add_argument("-o", "--output", type=arguments.path, metavar="NPY", help=text)


def run(args: argparse.Namespace, console: Console) -> int:
    if args.decode is not None and args.output is not None:
        raise UsageError("-o writes the ids of a text, and --decode gives the text of ids: leave one out")
    if args.decode is None and args.special_tokens:
        raise UsageError("--special-tokens is about the text of --decode: add --decode 1,2,3, or leave it out")
    tokenizer = _tokenizer(args.tokenizer)
    if args.decode is not None:
        _decode(tokenizer, args, console)
    else:
        _encode(tokenizer, args, console)
    return 0


def _tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a bundle, in a folder, or in a file."""
    if (path / MANIFEST_FILE).is_file():
        return given_tokens.tokenizer_of(open_bundle(path))
    return Tokenizer(path / "tokenizer.json" if path.is_dir() else path)


def _encode(tokenizer: Tokenizer, args: argparse.Namespace, console: Console) -> None:
    if args.output is not None:
        check_output(args.output, _IDS)
        console.leave_stdout_to(args.output)
    if args.text is not None:
        text = given_tokens.text_from_file(args.text)
    elif args.prompt in (None, "-"):
        text = given_tokens.text_from_stdin("-p TEXT or --text FILE")
    else:
        text = arguments.text_of(args.prompt, "--prompt")
    ids = tokenizer.encode(text)
    pieces = [tokenizer.token(number) for number in ids]
    if args.output is not None:
        with writing(args.output, _IDS) as file:
            np.save(file, np.array([ids], np.int64))
    width = len(str(max(ids, default=0)))
    for number, piece in zip(ids, pieces, strict=True):
        console.say(f"{number:{width}}  {printable_line(json.dumps(piece, ensure_ascii=False))}")
    if not console.as_json:
        console.note(f"{len(ids)} tokens, {len(text)} characters, {len(text.encode())} bytes")
    console.result(
        {
            "ids": ids,
            "pieces": pieces,
            "characters": len(text),
            "bytes": len(text.encode()),
            "output": None if args.output is None else str(args.output),
        }
    )


def _decode(tokenizer: Tokenizer, args: argparse.Namespace, console: Console) -> None:
    ids = given_tokens.ids_from_text(args.decode, "--decode")
    unknown = next((number for number in ids if number not in _NUMBERS or tokenizer.token(number) is None), None)
    if unknown is not None:
        raise UsageError(f"--decode has {unknown}, which is no token of the tokenizer: give ids that it knows")
    text = tokenizer.decode(ids, special_tokens=args.special_tokens)
    console.text(text)
    console.say()
    console.result({"ids": ids, "text": text})
