"""Text in and out of a session: the tokenizer, text as it becomes final, stop strings."""

from collections.abc import Sequence
from pathlib import Path

from mythos_edge.model.bounded_files import require_file
from mythos_edge.model.bundle import MOST_TOKENIZER_BYTES
from mythos_edge.model.errors import BackendUnavailable, BundleError, UsageError

_END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|end|>", "<eos>", "<|im_end|>")
_UNFINISHED = "\ufffd"
# A character has at most four bytes, and a bad byte or two may stand before it: what is still incomplete after this
# many tokens never will be complete.
_LONGEST_WAIT = 8
# Tokens of text that never comes to a clean end, before older ones are forgotten.
_LONGEST_WINDOW = 48


class Tokenizer:
    """A Hugging Face ``tokenizer.json``. Raises BundleError when damaged, BackendUnavailable without the library."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise BackendUnavailable("text needs the tokenizers library", "pip install tokenizers") from error
        try:
            require_file(path, MOST_TOKENIZER_BYTES, "a tokenizer")
            self._library = Library.from_file(str(path))
        except OSError as error:
            raise BundleError(f"{path}: not a tokenizer: {error.strerror or error}") from error
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{path}: not a tokenizer: {' '.join(str(error).split())}") from error
        found = (self._library.token_to_id(name) for name in _END_TOKENS)
        self.eos_ids: tuple[int, ...] = tuple(number for number in found if number is not None)

    def encode(self, text: str) -> list[int]:
        return list(self._library.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode(list(ids)))


class TextStream:
    """Text of a token stream, given out as soon as no later token can change it.

    Decodes a short window only: the tokens since the last clean end of text, and those of the piece before it, which
    decide about spaces.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = 0  # tokens of the piece before stand first in the window
        self._shown = 0  # characters of the window's text that were given out
        self._waiting = 0  # tokens since anything was

    def follow(self, ids: Sequence[int]) -> None:
        """Begins after ``ids``, whose own text is not given out."""
        self._ids = list(ids[-_LONGEST_WAIT:])
        self._before, self._shown = len(self._ids), len(self._tokenizer.decode(self._ids))

    def push(self, token_id: int) -> str:
        """The text that became final with this token; empty while a character is still incomplete."""
        self._ids.append(token_id)
        return self._take(unfinished_too=False)

    def flush(self) -> str:
        """What is left, incomplete or not."""
        return self._take(unfinished_too=True)

    def _take(self, *, unfinished_too: bool) -> str:
        text = self._tokenizer.decode(self._ids)
        clean = not text.endswith(_UNFINISHED)
        self._waiting += 1
        everything = clean or unfinished_too or self._waiting >= _LONGEST_WAIT
        end = len(text) if everything else len(text.rstrip(_UNFINISHED))
        piece, held = text[self._shown : end], len(text) - end
        if piece:
            self._waiting = 0
        if piece and everything:
            self._forget(self._before, held)
            self._before = len(self._ids)
        elif len(self._ids) > _LONGEST_WINDOW:
            self._forget(len(self._ids) // 2, held)
            self._before = 0
        else:
            self._shown = max(self._shown, end)
        return piece

    def _forget(self, count: int, held: int) -> None:
        """Drops the first ``count`` tokens of the window; ``held`` characters at its end were not given out."""
        self._ids = self._ids[count:]
        self._shown = max(0, len(self._tokenizer.decode(self._ids)) - held)


class StopStrings:
    """Ends a text at the first of ``stops`` to be complete, which itself is not given out.

    Raises UsageError for an empty one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise UsageError("a stop string is empty, expected at least one character")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string was reached."""
        self._held += text
        # The stop that is complete first ends the text, however it was cut into pieces; of several the longest.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)[1]], ""
            return shown, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back because it might have become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
