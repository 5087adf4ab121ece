"""Where the text of a token sequence may be cut, so that no later token changes what was given out before.

A tokenizer's decoder turns all tokens into text at once. At a *cut* its text is that of the tokens before, followed by
one that depends on the tokens after it alone, and on there being some before. What a decoder makes of the tokens is
never computed here: the stream asks the library for it, and this module only says where that may be done in parts.
"""

import codecs
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class Cuts(Protocol):
    """Reads tokens in their order and says where cuts are.

    ``looks_back``: the text after a cut depends on the last token before it, too.
    """

    looks_back: bool

    def begins(self, token: str) -> bool:
        """Whether there is always a cut before ``token``, whatever comes before it."""
        ...

    def closes(self, token: str) -> bool:
        """Takes the next token; whether there is a cut after it."""
        ...


class EveryToken:
    """For decoders that see tokens one by one."""

    looks_back = False

    def begins(self, token: str) -> bool:
        return True

    def closes(self, token: str) -> bool:
        return True


class ByteRuns:
    """For ByteFallback: a run of byte tokens is text when all of it is UTF-8, and else one U+FFFD a byte."""

    looks_back = False

    def begins(self, token: str) -> bool:
        return not _is_byte(token)

    def closes(self, token: str) -> bool:
        return not _is_byte(token)


class Characters:
    """For ByteLevel: the tokens' bytes are one UTF-8 text, with one U+FFFD for each part that is none."""

    looks_back = False

    def __init__(self) -> None:
        self._reader = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def begins(self, token: str) -> bool:
        # A byte that begins a character ends whatever was before it, complete or not.
        data = _bytes_of(token)
        return bool(data) and not 0x80 <= data[0] < 0xC0

    def closes(self, token: str) -> bool:
        self._reader.decode(_bytes_of(token))
        return not self._reader.getstate()[0]


class Words:
    """For BPEDecoder: the suffix of a token is a space where a token follows, and nothing where none does."""

    looks_back = True

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix

    def begins(self, token: str) -> bool:
        return False

    def closes(self, token: str) -> bool:
        # Text after the suffix would come out without the space, and then with it.
        return self._suffix not in token.removesuffix(self._suffix)


class Repeats(EveryToken):
    """For CTC: a token that repeats the one before it has no text."""

    looks_back = True


class Nowhere:
    """For decoders that nothing is known of: all text waits for the last token."""

    looks_back = False

    def begins(self, token: str) -> bool:
        return False

    def closes(self, token: str) -> bool:
        return False


def cuts_of(decoder: Mapping[str, Any] | None) -> Callable[[], Cuts]:
    """Returns the maker of Cuts for a decoder as tokenizer.json describes it."""
    stages = _stages(decoder)
    kinds = [stage.get("type") for stage in stages]
    if kinds == ["ByteLevel"]:
        return Characters
    if kinds == ["CTC"]:
        return Repeats
    if kinds == ["BPEDecoder"] and stages[0]["suffix"]:
        return functools.partial(Words, stages[0]["suffix"])
    fused = False
    for place, stage in enumerate(stages):
        if not _keeps_cuts(stage, fused):
            return Nowhere
        if stage["type"] == "ByteFallback" and not all(map(_keeps_bytes, stages[:place])):
            return Nowhere
        fused = fused or stage["type"] == "Fuse"
    return ByteRuns if "ByteFallback" in kinds else EveryToken


def _stages(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [stage for part in decoder["decoders"] for stage in _stages(part)]


def _keeps_cuts(stage: Mapping[str, Any], fused: bool) -> bool:
    """Whether cuts remain cuts under a stage, which sees the tokens one by one, or ``fused`` to one text."""
    kind = stage["type"]
    if not fused:
        return kind in ("Replace", "Strip", "Metaspace", "WordPiece", "ByteFallback", "Fuse")
    if kind == "Strip":  # from the beginning alone
        return not stage["stop"]
    return kind == "Fuse" or (kind == "Replace" and len(stage["pattern"].get("String", "")) == 1)


def _keeps_bytes(stage: Mapping[str, Any]) -> bool:
    """Whether a stage makes no byte token of another, nor another of one."""
    pattern = stage.get("pattern", {}).get("String", "")
    return stage["type"] == "Replace" and len(pattern) == 1 and pattern not in "<0x>" and not pattern.isalnum()


def _is_byte(token: str) -> bool:
    # Some that the library takes for text are held back, too, which delays them and does no harm.
    return len(token.encode()) == 6 and token.startswith("<0x") and token.endswith(">")


@functools.cache
def _byte_of_symbol() -> dict[str, int]:
    """The byte that each printable symbol stands for. Source: ``bytes_to_unicode`` of GPT-2's encoder.py."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return {chr(byte if byte in printable else next(spare)): byte for byte in range(256)}


@functools.lru_cache(1 << 16)
def _bytes_of(token: str) -> bytes:
    """A token's bytes; one that holds another symbol stands for itself."""
    symbols = _byte_of_symbol()
    try:
        return bytes(symbols[symbol] for symbol in token)
    except KeyError:
        return token.encode()
