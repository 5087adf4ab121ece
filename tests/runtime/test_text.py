"""Text in and out: a byte-level tokenizer made here, text as it becomes final, stop strings against str.find."""

import json
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_edge.model.errors import BackendUnavailable, BundleError, UsageError
from mythos_edge.runtime.text import StopStrings, TextStream, Tokenizer


def _byte_symbols() -> list[str]:
    """The printable stand-in of each byte, as GPT-2 has them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


SYMBOLS = _byte_symbols()


def _tokenizer(folder: Path, pieces: Sequence[bytes] = (), special: Iterable[str] = ()) -> Tokenizer:
    """Ids 0..255 are the bytes; then come ``pieces`` of several bytes (for decoding only) and ``special`` tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    names = [*SYMBOLS, *("".join(SYMBOLS[byte] for byte in piece) for piece in pieces)]
    library = Library(models.BPE({name: number for number, name in enumerate(names)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, special=True) for name in special])
    path = folder / "tokenizer.json"
    library.save(str(path))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join(stream.push(number) for number in ids) + stream.flush()


# --- the tokenizer ------------------------------------------------------------------------------------------------


def test_encode_and_decode(byte_level: Tokenizer) -> None:
    text = "naïve 日本 👩‍🚀\n"
    assert byte_level.encode(text) == list(text.encode())
    assert byte_level.decode(tuple(text.encode())) == text
    assert byte_level.decode([]) == ""


def test_other_threads_run_while_a_long_text_is_encoded(byte_level: Tokenizer) -> None:
    text, began, done, ticks = "ä b" * 200_000, threading.Event(), threading.Event(), 0

    def tick() -> None:
        nonlocal ticks
        began.set()
        while not done.wait(0.001):
            ticks += 1

    ticking = threading.Thread(target=tick)
    ticking.start()
    began.wait()
    before = ticks
    encoding = byte_level._library.encode_batch([text])  # as long, and the same
    after, ids = ticks, byte_level.encode(text)
    during = ticks - after
    done.set()
    ticking.join()
    assert ids == list(encoding[0].ids) == list(text.encode())
    assert during > (after - before) / 10
    with pytest.raises(UsageError, match="no UTF-8"):
        byte_level.encode(text + "\ud800")


def test_special_tokens_are_shown_when_asked_for(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, special=["<pad>", "</s>"])
    assert tokenizer.decode([104, 257, 105, 256]) == "hi"
    assert tokenizer.decode([104, 257, 105, 256], special_tokens=True) == "h</s>i<pad>"
    assert [tokenizer.special_id(text) for text in ("</s>", "a", "</s> ")] == [257, None, None]
    assert [tokenizer.is_special(number) for number in (104, 257, 999)] == [False, True, False]


def test_what_the_file_does_to_prompts_on_its_own_is_switched_off() -> None:
    """Cutting, padding, and merges that are left out at random."""
    text = "The words of a text that is longer than sixteen tokens, whatever its merges are. " * 3
    stored = json.loads((FIXTURES / "tokenizers" / "trunc_pad.json").read_text())
    assert stored["truncation"]["max_length"] == 16
    plain = Tokenizer(FIXTURES / "tokenizers" / "gptoss.json").encode(text)
    assert Tokenizer(FIXTURES / "tokenizers" / "trunc_pad.json").encode(text) == plain
    assert Tokenizer(FIXTURES / "tokenizers" / "trunc_pad.json").encode("a") == [64]


def test_random_merges_are_switched_off(tmp_path: Path) -> None:
    stored = json.loads((FIXTURES / "tokenizers" / "gptoss.json").read_text())
    stored["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    text = "the words of this text " * 5
    assert Tokenizer(tmp_path / "tokenizer.json").encode(text) == Tokenizer(
        FIXTURES / "tokenizers" / "gptoss.json"
    ).encode(text)


@pytest.mark.parametrize(
    ("name", "around"),
    [("bert", (["[CLS]"], ["[SEP]"])), ("gptoss", ([], [])), ("llama2", (["<s>"], [])), ("t5", ([], ["</s>"]))],
)
def test_what_is_put_around_a_first_prompt(name: str, around: tuple[list[str], list[str]]) -> None:
    tokenizer = Tokenizer(FIXTURES / "tokenizers" / f"{name}.json")
    assert tokenizer.added_to_prompt() == around
    first, later = tokenizer.encode("a text"), tokenizer.encode("a text", first=False)
    assert [tokenizer.token(number) for number in first] == [
        *around[0],
        *(tokenizer.token(number) for number in later),
        *around[1],
    ]


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for before in (b"\xef\xbb\xbf", b"\n", b"\xef\xbb\xbf \r\n"):
        path.write_bytes(before + (FIXTURES / "tokenizers" / "t5.json").read_bytes())
        assert Tokenizer(path).encode("a") == Tokenizer(FIXTURES / "tokenizers" / "t5.json").encode("a")


def test_text_that_cannot_be_encoded_is_one_line(tmp_path: Path, byte_level: Tokenizer) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    with pytest.raises(UsageError, match="holds bytes that are no UTF-8"):
        byte_level.encode("a\udcff")
    path = tmp_path / "tokenizer.json"
    Library(models.WordLevel({"a": 0}, unk_token="?")).save(str(path))
    with pytest.raises(UsageError, match=r"cannot encode the prompt 'b': .*Missing \[UNK\]"):
        Tokenizer(path).encode("b")


@pytest.mark.parametrize(
    ("part", "does", "refusal", "words"),
    [
        # The library's Rust code panics: Python sees an exception that is no Exception.
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "MAAAAAAA"}},
            lambda path: Tokenizer(path),
            BundleError,
            "not a tokenizer: .*charsmap",
        ),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AQAAAA=="}},
            lambda path: Tokenizer(path).encode("a"),
            UsageError,
            "cannot encode the prompt 'a': index out of bounds",
        ),
        (
            {"decoder": {"type": "Strip", "content": "a", "start": 5, "stop": 5}},
            lambda path: Tokenizer(path).decode([0, 1]),
            BundleError,
            r"cannot decode the ids \[0, 1\]: index out of bounds.*decoder fits",
        ),
    ],
    ids=["load", "encode", "decode"],
)
def test_a_panic_of_the_library_is_one_line(
    part: dict[str, object], does: Callable[[Path], object], refusal: type[Exception], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(
        json.dumps(
            {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}} | part
        )
    )
    with pytest.raises(refusal, match=words) as caught:
        does(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "{", "[]", json.dumps({"model": {"type": "no such"}})])
def test_what_is_no_tokenizer_is_one_line(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BundleError, match="not a tokenizer") as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_library_the_install_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(BackendUnavailable, match="pip install tokenizers"):
        Tokenizer(tmp_path / "tokenizer.json")


# --- the stream ---------------------------------------------------------------------------------------------------

TEXTS = [
    "",
    "plain words",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦🏳️‍🌈 family",
    "a😀b\n\n😀😀",
    "é" * 50,
    "\u0301x",
    "𝔘𝔫𝔦",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_together_are_the_text(byte_level: Tokenizer, text: str) -> None:
    assert _streamed(byte_level, text.encode()) == text


@settings(deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_the_pieces_of_any_text_together_are_the_text(byte_level: Tokenizer, text: str) -> None:
    # Bytes of a real replacement character look incomplete until what follows, but are not lost either.
    assert _streamed(byte_level, text.encode()) == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_comes_out_whole_with_its_last_byte(byte_level: Tokenizer, text: str) -> None:
    stream = TextStream(byte_level)
    for character in text:
        *first, last = character.encode()
        assert [stream.push(byte) for byte in first] == [""] * len(first)
        assert stream.push(last) == character
    assert stream.flush() == ""


def test_flush_gives_what_is_incomplete(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level)
    assert "".join(stream.push(byte) for byte in "a😀".encode()[:-1]) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_garbage_is_given_out_and_does_not_pile_up(byte_level: Tokenizer) -> None:
    for garbage in (b"\x80", b"\xff", b"\xe3", b"\xf0\x9f\x98", b"\xe3\x81\xf0"):
        stream, ids = TextStream(byte_level), list(garbage * 100)
        shown, waiting, longest = "", 0, 0
        for number in ids:
            piece = stream.push(number)
            shown += piece
            waiting = 0 if piece else waiting + 1
            longest = max(longest, waiting)
        assert longest <= 3, garbage
        assert len(stream._open) <= 4, garbage
        assert set(shown) == {"\ufffd"}
        for byte in b" ok":
            shown += stream.push(byte)
        assert shown + stream.flush() == byte_level.decode([*ids, *b" ok"])


def test_a_character_after_a_bad_byte_is_not_lost(byte_level: Tokenizer) -> None:
    ids = b"a\x80" + "😀b".encode()
    assert _streamed(byte_level, ids) == byte_level.decode(list(ids)) == "a\ufffd😀b"


def test_tokens_across_characters_are_not_cut(tmp_path: Path) -> None:
    """Every token ends one character and begins the next: the text is final only at the end, but then right."""
    data = "あ" * 7
    cuts = [0, *range(2, 3 * 7, 3), 3 * 7]
    parts = [data.encode()[start:end] for start, end in pairwise(cuts)]
    pieces = sorted(set(parts))
    tokenizer = _tokenizer(tmp_path, [piece for piece in pieces if len(piece) > 1])
    numbers = {piece: 256 + i for i, piece in enumerate(piece for piece in pieces if len(piece) > 1)}
    ids = [numbers[part] if len(part) > 1 else part[0] for part in parts]
    assert tokenizer.decode(ids) == data
    assert _streamed(tokenizer, ids) == data


def test_tokens_without_text_are_silent(tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, special=["<s>"])
    stream = TextStream(tokenizer)
    assert [stream.push(number) for number in (256, 104, 256, 105, 256)] == ["", "h", "", "i", ""]
    assert stream.flush() == ""


def test_spaces_between_words_are_kept(tmp_path: Path) -> None:
    """A decoder that strips the first space of what it is given: the window starts with the piece before."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models

    words = ["▁once", "▁upon", "▁a", "▁time", "s"]
    library = Library(models.BPE({word: number for number, word in enumerate(words)}, []))
    library.decoder = decoders.Metaspace()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    ids = [0, 1, 2, 3, 4, 0]
    assert _streamed(tokenizer, ids) == tokenizer.decode(ids) == "once upon a times once"
    after_prompt = TextStream(tokenizer)
    after_prompt.follow(ids[:2])
    assert "".join(map(after_prompt.push, ids[2:])) + after_prompt.flush() == " a times once"


# --- stop strings -------------------------------------------------------------------------------------------------


def _oracle(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, the longest of those; whether there is one."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(found)[1]], True) if found else (text, False)


def _run(pieces: Iterable[str], stops: Sequence[str]) -> tuple[str, bool, list[str]]:
    """What is shown in all, whether it stopped, and what had been shown after each piece."""
    strings, shown, so_far = StopStrings(stops), "", []
    for piece in pieces:
        now, stopped = strings.push(piece)
        shown += now
        so_far.append(shown)
        if stopped:
            assert strings.flush() == ""
            return shown, True, so_far
    return shown + strings.flush(), False, so_far


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.text("ab", max_size=3), max_size=10), STOPS)
def test_stop_strings_are_what_find_finds(pieces: list[str], stops: list[str]) -> None:
    """However the text is cut into pieces."""
    assert _run(pieces, stops)[:2] == _oracle("".join(pieces), stops)


@settings(deadline=None, derandomize=True)
@given(st.text("ab", max_size=20), STOPS)
def test_one_character_at_a_time(text: str, stops: list[str]) -> None:
    shown, stopped, so_far = _run(text, stops)
    assert (shown, stopped) == _oracle(text, stops)
    for count, visible in enumerate(so_far[: -1 if stopped else None], start=1):
        # No more is held back than may still become a stop string.
        held = text[len(visible) : count]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_the_stop_that_completes_first_wins_in_one_piece_too() -> None:
    assert _run(["xabcdy"], ["abcd", "bc"]) == ("xa", True, ["xa"])
    assert _run("xabcdy", ["abcd", "bc"])[:2] == ("xa", True)
    assert _run(["xabc"], ["bc", "abc"])[:2] == ("x", True)


def test_without_stops_nothing_is_held_back() -> None:
    assert _run(["abc", "", "d"], []) == ("abcd", False, ["abc", "abc", "abcd"])


def test_flush_gives_what_was_held_once() -> None:
    strings = StopStrings(["abc"])
    assert strings.push("xab") == ("x", False)
    assert (strings.flush(), strings.flush()) == ("ab", "")
    assert strings.push("c") == ("c", False)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="stop string is empty"):
        StopStrings(["a", ""])
