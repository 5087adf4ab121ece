"""The tokens that a verb works on: ids in a .npy file, or rows of them that the bundle's tokenizer makes of a text."""

import argparse
import io
import itertools
import math
import os
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bounded_files import open_regular, read_bounded, size_text
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import UsageError
from mythos_edge.model.foreign_files import foreign_kind
from mythos_edge.runtime.prompts import checked_ids
from mythos_edge.runtime.text import Tokenizer
from mythos_edge.scripts import arguments

# A text is encoded at once, which takes many times its size.
_MOST_TEXT_BYTES = 1_000_000_000
_ROW_TOKENS = 512
_LEAST_ROW_TOKENS = 2
# Of a .npy file: what numpy itself reads at most, and how, by version of the format.
_MOST_HEADER_BYTES = 1 << 14
_HEADER_READERS: Mapping[tuple[int, int], Callable[..., tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# numpy reads a header as Python text, which can fail in each of these ways.
_NO_ARRAY = (ValueError, EOFError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError)


@dataclass(frozen=True)
class Tokens:
    """Tokens ``ids (B, S)``, the name of their file, and of a text its UTF-8 bytes.

    ``seen`` are the first tokens of every row that belong to the row before, too: none for ids. A row of a text begins
    with the last token of the one before, and the last row with as many as make it a whole one.
    """

    ids: NDArray[np.int64]
    file: str
    seen: NDArray[np.int64]
    text_bytes: int | None = None


def add_text(container: argparse._ActionsContainer) -> None:
    """Adds --text beside the option that takes ids; ``add_row_tokens`` must follow."""
    text = "a UTF-8 text instead of ids: the bundle's tokenizer makes rows of tokens of it"
    container.add_argument("--text", type=arguments.file_name, metavar="FILE", help=text)


def add_row_tokens(parser: argparse._ActionsContainer) -> None:
    """Adds how long the rows of --text are."""
    text = f"tokens in each row of --text, one of them shared with the row before (default: {_ROW_TOKENS} at most)"
    parser.add_argument("--row-tokens", type=int, metavar="N", help=text)


def are_given(args: argparse.Namespace, ids_option: str, ids_file: str | None) -> bool:
    """Whether ``ids_option`` or --text names tokens. Raises UsageError where both do."""
    if args.text is not None and ids_file is not None:
        raise UsageError(f"--text and {ids_option} both say which tokens to work on: give one of them")
    if args.text is None and args.row_tokens is not None:
        raise UsageError("--row-tokens is about a text: add --text FILE, or leave it out")
    return args.text is not None or ids_file is not None


def tokens_of(args: argparse.Namespace, ids_file: str | None, bundle: Bundle) -> Tokens:
    """The tokens of --text, or of ``ids_file`` where there is no text. Raises UsageError."""
    if args.text is not None:
        return _of_text(args.text, args.row_tokens, bundle)
    assert ids_file is not None
    ids = checked_ids(ids_from_file(arguments.file_name(ids_file)), bundle.manifest.model)
    return Tokens(ids, ids_file, np.zeros(len(ids), np.int64))


def _of_text(file: str, row_tokens: int | None, bundle: Bundle) -> Tokens:
    longest = bundle.manifest.max_context
    if row_tokens is not None and not _LEAST_ROW_TOKENS <= row_tokens <= longest:
        raise UsageError(f"--row-tokens is {row_tokens}, expected {_LEAST_ROW_TOKENS} .. {longest}")
    tokenizer = tokenizer_of(bundle)
    text = text_from_file(file)
    ids = np.array(tokenizer.encode(text), np.int64)
    if len(ids) < _LEAST_ROW_TOKENS:
        raise UsageError(f"{file}: has {len(ids)} tokens, expected at least {_LEAST_ROW_TOKENS}: give a longer text")
    rows, seen = rows_of(checked_ids(ids[None], bundle.manifest.model)[0], row_tokens or min(_ROW_TOKENS, longest))
    return Tokens(rows, file, seen, len(text.encode()))


def rows_of(ids: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows (B, S) of at most ``length`` tokens with all of ``ids (N,)``, and ``seen (B,)`` as in ``Tokens``.

    Each row begins with the last token of the one before, so that every token but the first follows another.
    """
    length = min(length, len(ids))
    last = len(ids) - length
    starts = [*range(0, last, length - 1), last]
    seen = [0, *(before + length - start for before, start in itertools.pairwise(starts))]
    return np.stack([ids[start : start + length] for start in starts]), np.array(seen, np.int64)


def tokenizer_of(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a bundle. Raises UsageError where it has none."""
    name = bundle.manifest.tokenizer
    if name is None:
        raise UsageError(f"{bundle.path}: has no tokenizer: give token ids, or export with --tokenizer")
    with bundle.unchanged():
        return Tokenizer(bundle.file(name))


def text_from_file(path: str) -> str:
    """The text in a UTF-8 file, with every character of it. Raises UsageError."""
    try:
        text = read_bounded(path, _MOST_TEXT_BYTES, "a text").decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8, from byte {error.start} on: give a text in UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot read the text: {error.strerror or error}") from error
    if not text:
        raise UsageError(f"{path}: is empty, expected a text")
    return text


def stdin_is_piped() -> bool:
    """Whether stdin is a pipe or a file, so that somebody has sent a text."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def text_from_stdin(instead: str) -> str:
    """The UTF-8 text that is piped to this process; ``instead`` is what may be given. Raises UsageError."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(f"stdin is no pipe that a text could come from: give {instead}")
    try:
        data = sys.stdin.buffer.read(_MOST_TEXT_BYTES + 1)
        if len(data) > _MOST_TEXT_BYTES:
            raise UsageError(f"stdin: has more than {size_text(_MOST_TEXT_BYTES)}, which is more than a text has")
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin: is not UTF-8, from byte {error.start} on: give a text in UTF-8") from None
    except OSError as error:
        raise UsageError(f"stdin: cannot be read: {error.strerror or error}") from error


def ids_from_text(text: str, option: str = "--ids") -> list[int]:
    """Token ids from ``1,2,3``, the value of ``option``; UsageError for anything else."""
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise UsageError(f"{option} is {text!r}, expected numbers like 1,2,3") from None


def ids_from_file(path: str) -> NDArray[Any]:
    """The array in a .npy file; UsageError when it is missing, is not one, or is not as long as its header says."""
    try:
        with open_regular(path) as file:
            _check_array_header(file, path)
            array: NDArray[Any] = np.load(file, allow_pickle=False)
            return array
    except OSError as error:
        raise UsageError(f"{path}: cannot read the ids: {error.strerror or error}") from error
    except _NO_ARRAY as error:
        with open_regular(path) as file:
            known = foreign_kind(file.read(512))
        # A .npy file that is damaged begins as one.
        if known and not known.startswith("a NumPy"):
            raise UsageError(f"{path}: is {known}") from error
        raise UsageError(f"{path}: not a .npy file of numbers: save the ids with numpy.save") from error


def _check_array_header(file: BinaryIO, path: str) -> None:
    """Raises UsageError or ValueError unless an open .npy file holds the numbers that its header tells of."""
    # A header may claim any length and any shape, and numpy would believe both.
    head = io.BytesIO(file.read(_MOST_HEADER_BYTES))
    if head.getvalue().startswith(b"PK"):
        raise UsageError(f"{path}: expected a .npy file with one array, got an archive: save the ids with numpy.save")
    version = np.lib.format.read_magic(head)
    if version not in _HEADER_READERS:
        raise ValueError(f"version {version}")
    shape, _, dtype = _HEADER_READERS[version](head)
    if dtype.kind not in "biufc":
        raise ValueError(f"dtype {dtype}")
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {shape}")
    needed, found = math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size - head.tell()
    if needed != found:
        raise UsageError(
            f"{path}: {dtype} of shape {shape} takes {size_text(needed)}, the file holds {size_text(found)} of it: "
            "save the ids with numpy.save again"
        )
    file.seek(0)
