"""Text through a session: a random network behind tokenizers of several kinds, which puts out any token there is."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from text_oracle import byte_level, following
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.bundle_writer import record_of, update_manifest
from mythos_edge.model.errors import UsageError
from mythos_edge.model.manifest import EndToken
from mythos_edge.runtime.session import Session

VOCAB = 331  # the golden model's


def _byte_fallback() -> Library:
    """As Llama 2 has it: a space before every text, bytes for what has no token, <s> before a prompt."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"etaoinshrdlucmfw", "▁t", "▁th"]
    library = Library(
        models.BPE(
            {name: number for number, name in enumerate(names)},
            [("▁", "t"), ("▁t", "h")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library


def _word_piece() -> Library:
    names = ["[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz.,'", *(f"##{letter}" for letter in "abcdeinorst")]
    library = Library(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    library.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    library.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return library


def _byte_level() -> Library:
    library = byte_level([f"<|{number}|>" for number in range(70)])
    library.add_tokens(["<|shown|>"])
    return library


def _metaspace() -> Library:
    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "▁a",
        "▁the",
        "ing",
        "。",
        "界",
        "ส",
        "न",
        "\u0301",
    ]
    library = Library(models.Unigram([(piece, -float(number)) for number, piece in enumerate(pieces)], unk_id=2))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    library.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return library


LIBRARIES: dict[str, Callable[[], Library]] = {
    "byte fallback": _byte_fallback,
    "WordPiece": _word_piece,
    "byte level": _byte_level,
    "Unigram": _metaspace,
}


def _with_text(bundle: Path, folder: Path, library: Library, *ends: EndToken) -> Path:
    """A copy of a bundle with a tokenizer."""
    path = Path(shutil.copytree(bundle, folder / "text.bundle"))
    library.save(str(path / "tokenizer.json"))
    opened = open_bundle(path)
    files = {**opened.manifest.files, "tokenizer.json": record_of(path / "tokenizer.json")}
    update_manifest(opened, files=files, tokenizer="tokenizer.json", end_tokens=ends)
    return path


@pytest.fixture(scope="module", params=LIBRARIES)
def text(
    request: pytest.FixtureRequest, mla_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Session, Library]]:
    library = LIBRARIES[request.param]()
    with Session.open(_with_text(mla_bundle, tmp_path_factory.mktemp("text"), library)) as session:
        yield session, library


@pytest.fixture
def spoken(mla_bundle: Path, tmp_path: Path) -> Iterator[Callable[..., Session]]:
    """``spoken(library, *ends)``: a session of one."""
    opened: list[Session] = []

    def open_one(library: Library, *ends: EndToken) -> Session:
        folder = tmp_path / str(len(opened))
        folder.mkdir()
        opened.append(Session.open(_with_text(mla_bundle, folder, library, *ends)))
        return opened[-1]

    yield open_one
    for session in opened:
        session.close()


PROMPTS = ("the 世界", "ส", "नम", "👩‍👩‍👧", "e\u0301 the", " a ", "x", "don't")
HOT: dict[str, Any] = {"max_new_tokens": 24, "temperature": 3.0}


@pytest.mark.parametrize("special_tokens", [False, True])
def test_text_is_the_decode_of_all_ids(text: tuple[Session, Library], special_tokens: bool) -> None:
    """Whole, streamed, in a batch, and resumed with text and without."""
    session, library = text
    options = {**HOT, "special_tokens": special_tokens}
    for seed, prompt in enumerate(PROMPTS):
        made = session.generate(prompt, seed=seed, **options)
        before = library.encode(prompt).ids
        wanted = following(library, before, made.ids, special_tokens)
        assert made.text == wanted
        pieces = [token.text for token in session.stream(prompt, seed=seed, **options)]
        assert "".join(pieces) == wanted
        for more in ("", "the 世", ""):
            before = session.ids + (library.encode(more, add_special_tokens=False).ids if more else [])
            made = session.generate(more, resume=True, seed=seed, **options)
            assert session.ids == before + made.ids
            assert made.text == following(library, before, made.ids, special_tokens)
    batch = session.generate(list(PROMPTS[:3]), seed=1, **options)
    for prompt, made in zip(PROMPTS, batch, strict=False):
        before = library.encode(prompt).ids
        assert made.text == following(library, before, made.ids, special_tokens)


def test_ids_after_which_a_character_is_whole(spoken: Callable[..., Session]) -> None:
    """A prompt of ids that ends inside a character: its end is told with the text that follows."""
    session = spoken(_byte_fallback())
    library, prompt = _byte_fallback(), [1, *(byte + 3 for byte in "世".encode()[:2])]
    for seed in range(6):
        made = session.generate(prompt, seed=seed, **HOT)
        assert made.text == following(library, prompt, made.ids)


def test_a_resumed_prompt_gets_no_special_tokens(text: tuple[Session, Library]) -> None:
    session, library = text
    plain, around = (library.encode("the", add_special_tokens=first).ids for first in (False, True))
    session.generate("the", max_new_tokens=2)
    assert session.ids[: len(around)] == around
    session.generate("the", resume=True, max_new_tokens=1)
    assert session.ids[len(around) + 2 : -1] == plain
    session.rollback(0)
    session.generate("the", resume=True, max_new_tokens=1)
    assert session.ids[:-1] == around


def test_a_token_that_the_model_does_not_know_is_named(spoken: Callable[..., Session]) -> None:
    library = _byte_level()
    library.add_special_tokens(["<|later|>", "<|330|>", "<|331|>", "<|more|>"])
    assert library.token_to_id("<|more|>") == VOCAB - 1
    library.add_tokens(["<|beyond|>"])
    session = spoken(library)
    assert session.generate("a<|more|>", max_new_tokens=1).ids
    before = session.ids
    words = r"token '<\|beyond\|>' \(id 331\), which this model does not know: its ids are 0 .. 330"
    for prompt in ("a <|beyond|> b", ["fine", "<|beyond|>"]):
        with pytest.raises(UsageError, match=words) as caught:
            session.generate(prompt, max_new_tokens=1)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=words):
        session.generate("<|beyond|>", resume=True, max_new_tokens=1)
    assert session.ids == before


def _greedy(session: Session, **options: Any) -> Any:
    return session.generate("the", max_new_tokens=12, **options)


def test_the_manifests_end_tokens_end_a_text(spoken: Callable[..., Session]) -> None:
    """Those and no others; whatever the tokenizer calls its tokens."""
    free = _greedy(spoken(_byte_fallback()))
    assert free.finish_reason == "length"
    place = next(at for at in range(3, 12) if free.ids[at] not in free.ids[:at])
    end = free.ids[place]
    assert _greedy(spoken(_byte_fallback(), EndToken(2, "</s>"), EndToken(end, "x"))).ids == free.ids[: place + 1]
    session = spoken(_byte_fallback(), EndToken(end, ""), EndToken(999, "<beyond>"))
    ended = _greedy(session)
    assert (ended.ids, ended.finish_reason) == (free.ids[: place + 1], "stop_id")
    assert ended.text == following(_byte_fallback(), session.ids[: -place - 1], ended.ids[:-1])
    assert _greedy(session, stop_ids=()).ids == free.ids
    # A word of the vocabulary that looks like one is none.
    plain = json.loads(_byte_fallback().to_str())
    plain["added_tokens"] = []
    assert _greedy(spoken(Library.from_str(json.dumps(plain)))).finish_reason == "length"


def test_a_stop_string_that_is_a_special_token_is_a_stop_id(spoken: Callable[..., Session]) -> None:
    library = _byte_level()
    session = spoken(library, EndToken(0, "!"))
    whole = session.generate("the", max_new_tokens=40, temperature=3.0, seed=1, stop_ids=())
    at = next(place for place, number in enumerate(whole.ids) if number >= 256)
    stop = str(library.id_to_token(whole.ids[at]))
    before = library.encode("the").ids
    for special_tokens in (False, True):
        options = {"temperature": 3.0, "seed": 1, "max_new_tokens": 40, "special_tokens": special_tokens}
        for stop_ids in ((), None):
            cut = session.generate("the", stop_strings=(stop, "no such text"), stop_ids=stop_ids, **options)
            if stop_ids is None and 0 in whole.ids[:at]:
                continue
            assert (cut.ids, cut.finish_reason) == (whole.ids[: at + 1], "stop_id")
            assert cut.text == following(library, before, cut.ids[:-1], special_tokens)


def test_the_token_that_ends_a_text_is_shown_with_special_tokens(spoken: Callable[..., Session]) -> None:
    library = _byte_level()
    whole = spoken(library).generate("the", max_new_tokens=40, temperature=3.0, seed=1)
    special = next(number for number in whole.ids if number >= 256)
    plain = next(number for number in whole.ids if number < 256)
    before = library.encode("the").ids
    for end, shown in ((special, True), (plain, False)):
        session = spoken(library, EndToken(end, "end"))
        made = session.generate("the", max_new_tokens=40, temperature=3.0, seed=1, special_tokens=True)
        assert made.ids[-1] == end
        ids = made.ids if shown else made.ids[:-1]
        assert made.text == following(library, before, ids, special_tokens=True)


def test_special_tokens_need_a_tokenizer(mla_bundle: Path) -> None:
    with Session.open(mla_bundle) as session, pytest.raises(UsageError, match="special tokens need a tokenizer"):
        session.generate([1], special_tokens=True)


def test_end_tokens_without_a_tokenizer(mla_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(mla_bundle, tmp_path / "ids.bundle"))
    with Session.open(path) as session:
        free = session.generate([5, 17], max_new_tokens=6).ids
    update_manifest(open_bundle(path), end_tokens=(EndToken(free[2], ""),))
    assert open_bundle(path).manifest.end_tokens[0].name == str(free[2])
    with Session.open(path) as session:
        assert session.generate([5, 17], max_new_tokens=6).ids == free[: free.index(free[2]) + 1]
