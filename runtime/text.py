"""Text in and out of a session: the tokenizer, text as it becomes final, stop strings."""

from collections.abc import Sequence
from pathlib import Path

from mythos_edge.model.errors import BackendUnavailable, BundleError, UsageError

_END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|end|>", "<eos>", "<|im_end|>")
_UNFINISHED = "\ufffd"
# A character has at most four bytes: what is still incomplete after more tokens than that never will be complete.
_LONGEST_CHARACTER = 4


class Tokenizer:
    """A Hugging Face ``tokenizer.json``. Raises BundleError when damaged, BackendUnavailable without the library."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise BackendUnavailable("text needs the tokenizers library", "pip install tokenizers") from error
        try:
            self._library = Library.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{path}: not a tokenizer: {' '.join(str(error).split())}") from error
        found = (self._library.token_to_id(name) for name in _END_TOKENS)
        self.eos_ids: tuple[int, ...] = tuple(number for number in found if number is not None)

    @property
    def vocab_size(self) -> int:
        return int(self._library.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        return list(self._library.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode(list(ids)))


class TextStream:
    """Text of a token stream, given out as soon as no later token can change it.

    Decodes a short window only: the tokens since the last text given out, and those of the piece before, which
    decide about spaces.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = 0  # tokens of the piece given out last stand first in the window

    def push(self, token_id: int) -> str:
        """The text that became final with this token; empty while a character is still incomplete."""
        self._ids.append(token_id)
        return self._take(unfinished_too=False)

    def flush(self) -> str:
        """What is left, incomplete or not."""
        return self._take(unfinished_too=True)

    def _take(self, *, unfinished_too: bool) -> str:
        known = self._tokenizer.decode(self._ids[: self._before])
        text = self._tokenizer.decode(self._ids)
        may_grow = text.endswith(_UNFINISHED) and len(self._ids) - self._before < _LONGEST_CHARACTER
        if len(text) <= len(known) or (may_grow and not unfinished_too):
            return ""
        self._ids = self._ids[self._before :]
        self._before = len(self._ids)
        return text[len(known) :]


class StopStrings:
    """Ends a text at the first of ``stops``, which itself is not given out. Raises UsageError for an empty one."""

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise UsageError("a stop string is empty, expected at least one character")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string was reached."""
        self._held += text
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
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
