"""Text in and out of a session: the tokenizer, text as it becomes final, stop strings."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from mythos_edge.model.errors import BundleError, UsageError
from mythos_edge.model.tokenizer_file import decoding, encoding, read_tokenizer, tokens_around_prompt
from mythos_edge.runtime.text_cuts import Cuts, Nowhere, cuts_of

# What the decoder's text is tried with at the beginning of a prompt, before the whole is.
_FEW = 32


class Tokenizer:
    """A Hugging Face ``tokenizer.json``, without what it may do to prompts on its own: cut, pad, drop merges.

    Raises BundleError when damaged, BackendUnavailable without the library.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._library, _, _ = read_tokenizer(path)
        except (ValueError, OSError) as error:
            raise BundleError(f"{path}: not a tokenizer: {error}") from error
        added = self._library.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self._texts: dict[int, str] = {}

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """The ids of ``text``; with what the tokenizer adds to a prompt when it is the ``first`` of a sequence.

        Raises UsageError for text that the tokenizer cannot encode.
        """
        try:
            return list(encoding(self._library, text, around=first).ids)
        except ValueError as error:
            raise UsageError(f"the tokenizer cannot encode the prompt {text[:40]!r}: {error}") from error

    def decode(self, ids: Sequence[int], *, special_tokens: bool = False) -> str:
        """The text of ``ids``; ids without a token have none, and special tokens only when asked for.

        Raises BundleError where the tokenizer's decoder cannot decode what its vocabulary has.
        """
        try:
            # The library's decoder Strip panics on no tokens.
            return decoding(self._library, ids, special_tokens=special_tokens) if ids else ""
        except ValueError as error:
            raise BundleError(
                f"the tokenizer cannot decode the ids {list(ids[:8])}: {error}: export with one whose decoder fits"
            ) from error

    def token(self, token_id: int) -> str | None:
        """The tokenizer's name of a token; None where it has none of that id."""
        found = self._library.id_to_token(token_id)
        return None if found is None else str(found)

    def is_special(self, token_id: int) -> bool:
        """Whether a token has no text unless special tokens are asked for."""
        return self.token(token_id) in self._special

    def special_id(self, text: str) -> int | None:
        """The id of the special token that ``text`` is, exactly; None where it is none."""
        return self._library.token_to_id(text) if text in self._special else None

    def added_to_prompt(self) -> tuple[list[str], list[str]]:
        """The tokens that stand before and after the text of every first prompt."""
        return tokens_around_prompt(self._library)

    def cuts(self) -> Cuts:
        """Where the text of a sequence may be cut, from its first token on."""
        return Nowhere() if self.anchor is None else self._cuts_of_decoder()

    @functools.cached_property
    def _cuts_of_decoder(self) -> Callable[[], Cuts]:
        decoder = self._library.decoder
        return cuts_of(None if decoder is None else json.loads(decoder.__getstate__()))

    @functools.cached_property
    def anchor(self) -> int | None:
        """A token that can stand for all that comes before a cut: it has text of its own, and a cut after it."""
        for number in range(self._library.get_vocab_size()):
            token, cuts = self.token(number), self._cuts_of_decoder()
            if token is None or token in self._special or not cuts.closes(token):
                continue
            if (text := self.decode([number])) and self.decode([number, number]).startswith(text):
                return number
        return None

    def text_inside(self, token_id: int) -> str:
        """The text of one token between two cuts, where it does not depend on the token before."""
        text = self._texts.get(token_id)
        if text is None:
            assert self.anchor is not None
            whole = self.decode([self.anchor, token_id], special_tokens=True)
            text = self._texts[token_id] = whole.removeprefix(self.decode([self.anchor]))
        return text

    def text_alone(self, token_id: int) -> str:
        """The text of one token by itself: as it would stand inside a text, where that can be told."""
        return self.decode([token_id], special_tokens=True) if self.anchor is None else self.text_inside(token_id)


class TextStream:
    """The text of the tokens that follow a prompt, given out as soon as no later token can change it.

    All of it together is the decode of all ids without what that has in common, from its beginning on, with the decode
    of the prompt's ids alone. At a cut (see ``text_cuts``) the text since the last one is final; it is decoded after
    a token that stands for all before, so that the work does not grow with the sequence.
    """

    def __init__(self, tokenizer: Tokenizer, special_tokens: bool = False) -> None:
        self._tokenizer, self._special_tokens = tokenizer, special_tokens
        self._cuts = tokenizer.cuts()
        self._open: list[int] = []  # the tokens since the last cut
        # What stands for those before it; nothing while these have no text, for a decoder may treat the first apart.
        self._context: list[int] = []
        self._told = ""  # text of the prompt that may come out once more

    def follow(self, ids: Sequence[int]) -> None:
        """Begins after ``ids``, whose own text is not given out."""
        self._cuts = self._tokenizer.cuts()
        start = cut = self._last_beginning(ids)
        for place in range(start, len(ids)):
            token = self._shown_token(ids[place])
            if token is not None and self._cuts.closes(token):
                cut = place + 1
        self._context = []
        if self._decode(ids[: min(cut, _FEW)]) or self._decode(ids[:cut]):
            self._cut_after(next(number for number in reversed(ids[:cut]) if self._shown_token(number) is not None))
        rest = ids[cut:] if self._context else ids
        self._open = [number for number in rest if self._shown_token(number) is not None]
        self._told = self._text_since_cut()

    def push(self, token_id: int) -> str:
        """The text that became final with this token; empty while a later one may change it."""
        token = self._shown_token(token_id)
        if token is None:
            return ""
        ended = self._take() if self._open and self._cuts.begins(token) else ""
        self._open.append(token_id)
        return ended + (self._take() if self._cuts.closes(token) else "")

    def flush(self) -> str:
        """Returns the text that is left; no token may follow."""
        text, self._open = self._text_since_cut(), []
        return self._news(text)

    def _take(self) -> str:
        """The text since the last cut, for there is another now."""
        text = self._text_since_cut()
        if text or self._context:
            self._cut_after(self._open[-1])
            self._open = []
        return self._news(text)

    def is_special(self, token_id: int) -> bool:
        """Whether a token has text only when special tokens are shown."""
        return self._tokenizer.is_special(token_id)

    def _shown_token(self, token_id: int) -> str | None:
        """The token as the decoder gets it; None for those that it does not get."""
        token = self._tokenizer.token(token_id)
        return None if not self._special_tokens and self._tokenizer.is_special(token_id) else token

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, special_tokens=self._special_tokens)

    def _text_since_cut(self) -> str:
        if not self._context or not self._open:
            return self._decode(self._open)
        if len(self._open) == 1 and not self._cuts.looks_back:
            return self._tokenizer.text_inside(self._open[0])
        return self._decode([*self._context, *self._open])[len(self._decode(self._context)) :]

    def _cut_after(self, token_id: int) -> None:
        anchor = self._tokenizer.anchor
        assert anchor is not None
        self._context = [anchor, token_id] if self._cuts.looks_back else [anchor]

    def _last_beginning(self, ids: Sequence[int]) -> int:
        """The last place before which there is a cut whatever comes before, 0 where there is none."""
        for place in range(len(ids) - 1, 0, -1):
            token = self._shown_token(ids[place])
            if token is not None and self._cuts.begins(token):
                return place
        return 0

    def _news(self, text: str) -> str:
        """``text`` without what the prompt's own had told of it."""
        told = self._told
        if not told or not text:
            return text
        same = next((at for at, (a, b) in enumerate(zip(told, text, strict=False)) if a != b), None)
        if same is None:
            self._told, text = told[len(text) :], text[len(told) :]
            return text
        self._told = ""
        return text[same:]


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
        """The text that was held back because it might have become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
