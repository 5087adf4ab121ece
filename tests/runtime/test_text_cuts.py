"""The text that follows a prompt, against the library's own decode of all ids, for every kind of decoder."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from text_oracle import following
from tokenizers import Tokenizer as Library

from mythos_edge.runtime.text import TextStream, Tokenizer
from mythos_edge.runtime.text_cuts import ByteRuns, Characters, EveryToken, Nowhere, Repeats, Words, cuts_of

SPACES: dict[str, Any] = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
METASPACE: dict[str, Any] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
BYTES, FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
REGEX = {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}


def _sequence(*stages: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "decoders": list(stages)}


# Each: the tokenizer, a decoder in place of its own, and the cuts that are expected of it.
KINDS: dict[str, tuple[str, Any, Callable[..., Any]]] = {
    "byte-level BPE": ("gptoss", ..., Characters),
    "byte-fallback BPE": ("llama2", ..., ByteRuns),
    "Unigram": ("t5", ..., EveryToken),
    "WordPiece": ("bert", ..., EveryToken),
    "WordPiece without cleanup": ("bert", {"type": "WordPiece", "prefix": "##", "cleanup": False}, EveryToken),
    "no decoder": ("llama2", None, EveryToken),
    "byte fallback, no strip": ("llama2", _sequence(SPACES, BYTES, FUSE), ByteRuns),
    "byte fallback, two stripped": ("llama2", _sequence(SPACES, BYTES, FUSE, {**STRIP, "start": 2}), ByteRuns),
    "fused before spaces": ("llama2", _sequence(_sequence(BYTES, FUSE), SPACES, STRIP), ByteRuns),
    "byte fallback, Metaspace": ("llama2", _sequence(BYTES, METASPACE), ByteRuns),
    "Metaspace, no first": ("t5", {**METASPACE, "prepend_scheme": "never"}, EveryToken),
    "suffixes": ("llama2", {"type": "BPEDecoder", "suffix": "▁"}, Words),
    "suffixes inside": ("llama2", {"type": "BPEDecoder", "suffix": "e"}, Words),
    "CTC": ("llama2", {"type": "CTC", "pad_token": "<unk>", "word_delimiter_token": "▁", "cleanup": True}, Repeats),
    "regex on all": ("llama2", _sequence(SPACES, BYTES, FUSE, REGEX), Nowhere),
    "bytes that are made": ("llama2", _sequence({**SPACES, "pattern": {"String": "a"}}, BYTES, FUSE), Nowhere),
}
SCRIPTS = (
    *(
        "你好世界，再见。",
        "สวัสดีชาวโลก",
        "नमस्ते दुनिया",
        "👩‍👩‍👧‍👦🇨🇭😀 👍🏽",
        "e\u0301 a\u0308\u0304 Z\u0351\u036b",
        "שלום עולם",
    ),
    *("Do n't stop . I 'm , he 's ; do not !", "  two  spaces ", "\n\tx\r\n", "\ufffd\ufffd", "plain words", ""),
)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Library]:
    name, decoder, _ = KINDS[request.param]
    stored = json.loads((FIXTURES / "tokenizers" / f"{name}.json").read_text())
    if decoder is not ...:
        stored["decoder"] = decoder
    path: Path = tmp_path_factory.mktemp("kind") / "tokenizer.json"
    path.write_text(json.dumps(stored))
    return Tokenizer(path), Library.from_file(str(path))


def _followed(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], special_tokens: bool) -> str:
    stream = TextStream(tokenizer, special_tokens)
    stream.follow(prompt)
    return "".join(map(stream.push, ids)) + stream.flush()


# Ids from all, or from a few, so that runs and repeats come about.
DRAWN = st.lists(st.one_of(st.integers(0, 720), st.integers(0, 12), st.integers(94, 262)), max_size=12)
TEXTS = st.one_of(st.sampled_from(SCRIPTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=8))


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.tuples(TEXTS, DRAWN), st.tuples(TEXTS, DRAWN, TEXTS), st.integers(0, 40), st.booleans())
def test_the_text_after_a_prompt_is_that_of_all_ids(
    kind: tuple[Tokenizer, Library],
    prompt: tuple[str, list[int]],
    generated: tuple[str, list[int], str],
    cut: int,
    special_tokens: bool,
) -> None:
    """Prompts that end anywhere, and generated ids of text as of garbage."""
    tokenizer, library = kind
    plain = [library.encode(text, add_special_tokens=False).ids for text in generated[::2]]
    everything = [*library.encode(prompt[0]).ids, *prompt[1], *plain[0], *generated[1], *plain[1]]
    before, after = everything[:cut], everything[cut:]
    assert _followed(tokenizer, before, after, special_tokens) == following(library, before, after, special_tokens)


@pytest.mark.parametrize("text", SCRIPTS)
def test_every_cut_of_every_script(kind: tuple[Tokenizer, Library], text: str) -> None:
    tokenizer, library = kind
    ids = library.encode(f"{text} {text[::-1]}").ids
    for cut in range(len(ids) + 1):
        assert _followed(tokenizer, ids[:cut], ids[cut:], False) == following(library, ids[:cut], ids[cut:], False), cut


def test_the_kinds_are_told_apart() -> None:
    for name, (file, decoder, expected) in KINDS.items():
        if decoder is ...:
            decoder = json.loads((FIXTURES / "tokenizers" / f"{file}.json").read_text())["decoder"]
        made = cuts_of(decoder)()
        assert type(made) is expected, name


def test_text_is_not_held_back_longer_than_it_can_change(kind: tuple[Tokenizer, Library]) -> None:
    """Plain words come out with their last token; where nothing is known of the decoder, with the last of all."""
    tokenizer, library = kind
    unknown, spaced = (isinstance(tokenizer.cuts(), cuts) for cuts in (Nowhere, Words))
    ids = library.encode("the words of it", add_special_tokens=False).ids
    stream = TextStream(tokenizer)
    shown = ""
    for count, number in enumerate(ids, start=1):
        shown += stream.push(number)
        held = library.decode(ids[:count]).removeprefix(shown)
        assert bool(held) == unknown or (spaced and len(held) < 8)
    assert shown + stream.flush() == library.decode(ids)


def test_the_work_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand tokens, of which a run of a thousand bytes: what is decoded in all stays in proportion."""
    for name in ("gptoss", "llama2", "t5", "bert"):
        tokenizer = Tokenizer(FIXTURES / "tokenizers" / f"{name}.json")
        ids = tokenizer.encode("你好" * 170 + " and plain words, naïve or not 👩‍👩‍👧. " * 400)[:10_000]
        decoded, decode = [], tokenizer.decode
        monkeypatch.setattr(
            tokenizer, "decode", lambda ids, d=decoded, f=decode, **o: (d.append(len(ids)), f(ids, **o))[1]
        )
        stream = TextStream(tokenizer)
        stream.follow(ids[:100])
        for number in ids[100:]:
            stream.push(number)
        assert sum(decoded) < 3 * len(ids), name


def test_a_whole_prompt_without_text_is_a_beginning() -> None:
    """After special tokens alone the first word comes without the space that the decoder strips there."""
    tokenizer = Tokenizer(FIXTURES / "tokenizers" / "llama2.json")
    start, word = tokenizer.encode("")[:1], tokenizer.encode("the", first=False)
    assert _followed(tokenizer, start, word, False) == "the"
    assert _followed(tokenizer, start + word, word, False) == " the"
    assert _followed(tokenizer, start, word, True) == " the"
    assert _followed(tokenizer, [], start + word, True) == "<s> the"
