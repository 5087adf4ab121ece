"""Which tokenizer travels with a bundle, how it is held against the model, and which tokens end a text."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES
from text_oracle import byte_level
from tokenizers import Tokenizer, models

from mythos_edge.exporter.tokenizer_files import TokenizerFiles, tokenizer_beside, tokenizer_for
from mythos_edge.model.errors import ConfigError, ExportError
from mythos_edge.model.families.family import SpecialTokens
from mythos_edge.model.manifest import EndToken

TOKENIZERS = FIXTURES / "tokenizers"
BOM = b"\xef\xbb\xbf"
GPT_OSS_ENDS = (EndToken(514, "<|return|>"), EndToken(513, "<|endoftext|>"), EndToken(520, "<|call|>"))


class Taken:
    """A tokenizer as export took it, and what was told of it."""

    def __init__(self, path: Path | None, *end_tokens: str, vocab_size: int = 1000) -> None:
        self.files: TokenizerFiles = tokenizer_for(path, end_tokens, vocab_size)
        self.ends, self.notes = self.files.end_tokens, self.files.notes

    def told(self, *words: str) -> bool:
        """Whether one note holds all of ``words``."""
        return any(all(word in note for word in words) for note in self.notes)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """``folder(name, generation=..., tokenizer=...)``: a tokenizer with the configs beside it."""

    def make(name: str, generation: Any = None, tokenizer: Any = None) -> Path:
        shutil.copy(TOKENIZERS / f"{name}.json", tmp_path / "tokenizer.json")
        for file, values in (("generation_config.json", generation), ("tokenizer_config.json", tokenizer)):
            if values is not None:
                content = values if isinstance(values, bytes) else json.dumps(values).encode()
                (tmp_path / file).write_bytes(content)
        return tmp_path

    return make


# --- the tokenizer ------------------------------------------------------------------------------------------------


def test_the_file_its_folder_and_what_lies_beside_it(folder: Callable[..., Path]) -> None:
    path = folder("t5", tokenizer={"eos_token": "</s>"})
    data = (TOKENIZERS / "t5.json").read_bytes()
    for given in (path, path / "tokenizer.json", path / "tokenizer_config.json"):
        assert Taken(given).files.data == data
    shutil.move(path / "tokenizer.json", path / "another name.json")
    assert Taken(path / "another name.json").ends == (EndToken(1, "</s>"),)


def test_the_folder_of_a_link_is_the_links_own(folder: Callable[..., Path], tmp_path: Path) -> None:
    """As the cache of the Hugging Face hub has them."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "tokenizer.json").symlink_to(TOKENIZERS / "t5.json")
    (snapshot / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert [end.id for end in Taken(snapshot).ends] == [7]


def test_a_folder_without_the_file_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    for given in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(ExportError, match=r"it has tokenizer.model, expected tokenizer.json; save_pretrained"):
            Taken(given)
    os.mkfifo(tmp_path / "pipe.json")
    wrong = {"none.json": "no such tokenizer", "pipe.json": "is a pipe, expected a file", "n" * 5000: "name too long"}
    for name, words in wrong.items():
        with pytest.raises(ExportError, match=words):
            Taken(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}", "not a Hugging Face tokenizer.json: "),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a git-LFS pointer.*git lfs pull"),
        (b"\xff\xfe", "not a Hugging Face tokenizer.json: .*utf-8"),
    ],
)
def test_what_is_no_tokenizer_is_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ExportError, match=words) as caught:
        Taken(tmp_path)
    assert "\n" not in str(caught.value)


def test_byte_order_marks_are_no_error(folder: Callable[..., Path]) -> None:
    path = folder("t5", generation=BOM + b'{"eos_token_id": 9}', tokenizer=BOM + b'{"eos_token": "</s>"}')
    data = BOM + (path / "tokenizer.json").read_bytes()
    (path / "tokenizer.json").write_bytes(data)
    taken = Taken(path)
    assert taken.files.data == data
    assert [end.id for end in taken.ends] == [9]


def test_what_it_does_to_prompts_on_its_own_is_told() -> None:
    assert Taken(TOKENIZERS / "trunc_pad.json").told("cuts prompts to 16 tokens and pads them to 16", "switched off")
    assert not Taken(TOKENIZERS / "gptoss.json").told("switched off")


def test_what_it_puts_around_a_prompt_is_told_where_it_also_ends_a_text() -> None:
    assert Taken(TOKENIZERS / "t5.json").told("every prompt ends with </s>", "also ends a text")
    for other in ("llama2", "bert", "trunc_pad"):
        assert not Taken(TOKENIZERS / f"{other}.json").told("every prompt ends")


# --- its vocabulary and the model's -------------------------------------------------------------------------------


def test_added_tokens_beyond_the_models_vocabulary_are_told() -> None:
    """As the reference's own trainer leaves them out."""
    taken = Taken(TOKENIZERS / "gptoss.json", vocab_size=512)
    assert taken.told("9 added tokens", "'<|startoftext|>' (id 512) is the first", "knows ids 0 .. 511")
    assert taken.ends == GPT_OSS_ENDS
    assert taken.told("<|return|> (514)", "this model cannot produce it")
    assert Taken(TOKENIZERS / "gptoss.json", vocab_size=520).told("an added token is unknown", "'<|call|>' (id 520)")
    assert Taken(TOKENIZERS / "gptoss.json", vocab_size=521).notes == ()


def test_a_vocabulary_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"own vocabulary reaches id 511 \(.*\), but the model knows ids 0 .. 510"):
        Taken(TOKENIZERS / "gptoss.json", vocab_size=511)


def test_ids_count_and_not_how_many(tmp_path: Path) -> None:
    """Few tokens with large ids, and a model with more ids than the tokenizer has tokens."""
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "b": 900}, unk_token="a")).save(str(path))
    with pytest.raises(ConfigError, match=r"reaches id 900 \('b'\), but the model knows ids 0 .. 899"):
        Taken(path, vocab_size=900)
    assert Taken(path, vocab_size=901).told("has no token for 899 of the model's 901 ids")


# --- end tokens ---------------------------------------------------------------------------------------------------


def test_special_tokens_of_known_names_when_nothing_else_says_it() -> None:
    assert Taken(TOKENIZERS / "gptoss.json").ends == GPT_OSS_ENDS
    assert Taken(TOKENIZERS / "llama2.json").ends == (EndToken(2, "</s>"),)
    assert Taken(TOKENIZERS / "t5.json").ends == (EndToken(1, "</s>"),)
    assert Taken(TOKENIZERS / "bert.json").ends == ()


def test_a_message_ends_a_turn_where_no_other_token_does(tmp_path: Path) -> None:
    byte_level(["<|endoftext|>", "<|end|>", "<|user|>"]).save(str(tmp_path / "tokenizer.json"))
    assert [end.text for end in Taken(tmp_path).ends] == ["<|endoftext|>", "<|end|>"]


def test_a_word_of_the_vocabulary_is_no_end_token(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    library = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<eos>": 2}, unk_token="a"))
    library.add_tokens(["<|im_end|>"])
    library.save(str(path))
    assert Taken(path).ends == ()


@pytest.mark.parametrize(
    ("generation", "tokenizer", "ids"),
    [
        ({"eos_token_id": [514, 512, 514]}, {"eos_token": "<|end|>"}, [514, 512]),
        ({"eos_token_id": 518}, None, [518]),
        ({"eos_token_id": 0}, {"eos_token": None}, [0]),
        ({"eos_token_id": None}, {"eos_token": "<|end|>"}, [518]),
        ({}, {"eos_token": {"content": "<|end|>", "special": True}}, [518]),
        ({"eos_token_id": []}, {"eos_token": ""}, [514, 513, 520]),
        (None, {"eos_token": None}, [514, 513, 520]),
        (None, {"eos_token": "<gone>"}, [514, 513, 520]),
    ],
)
def test_what_the_folder_says(generation: Any, tokenizer: Any, ids: list[int], folder: Callable[..., Path]) -> None:
    taken = Taken(folder("gptoss", generation, tokenizer))
    assert [end.id for end in taken.ends] == ids
    library = Tokenizer.from_file(str(TOKENIZERS / "gptoss.json"))
    assert [end.text for end in taken.ends] == [library.id_to_token(number) for number in ids]
    if tokenizer == {"eos_token": "<gone>"}:
        assert taken.told("eos_token is '<gone>'", "which tokenizer.json has not")


def test_sources_that_differ_are_told(folder: Callable[..., Path]) -> None:
    path = folder("gptoss", {"eos_token_id": 513}, {"eos_token": "<|return|>"})
    assert Taken(path).told(
        "eos_token is <|return|> (514)", "generation_config.json ends a text at <|endoftext|> (513)"
    )
    (path / "generation_config.json").write_text('{"eos_token_id": [513, 514]}')
    assert not Taken(path).told("eos_token is")


def test_ids_that_the_tokenizer_or_the_model_has_not_are_told(folder: Callable[..., Path]) -> None:
    taken = Taken(folder("gptoss", {"eos_token_id": [514, 600, 2000]}), vocab_size=700)
    assert taken.ends == (EndToken(514, "<|return|>"), EndToken(600, ""), EndToken(2000, ""))
    assert taken.told("has no token of id 600", "generation_config.json")
    assert taken.told(
        "2000 ends a text by generation_config.json", "this model cannot produce it: its ids are 0 .. 699"
    )


@pytest.mark.parametrize("file", ["generation", "tokenizer"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000, b'"x"'])
def test_damaged_configs_are_one_line(file: str, content: bytes, folder: Callable[..., Path]) -> None:
    path = folder("gptoss", **{file: content})
    with pytest.raises(ConfigError, match=f"{file}_(tokenizer_)?config.json") as caught:
        Taken(path)
    assert "\n" not in str(caught.value)
    # What overrules them does not need them.
    assert Taken(path, "<|end|>").ends == (EndToken(518, "<|end|>"),)


@pytest.mark.parametrize("value", ["</s>", True, 1.5, -1, 2**32, 10**30, [1, "x"], [[1]], {"a": 1}])
def test_ids_that_are_none_are_one_line(value: Any, folder: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id is .*, expected a token id"):
        Taken(folder("gptoss", {"eos_token_id": value}))


@pytest.mark.parametrize("value", [3, ["</s>"], {"special": True}, {"content": 3}])
def test_names_that_are_none_are_one_line(value: Any, folder: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: eos_token is .*, expected a token's text"):
        Taken(folder("gptoss", None, {"eos_token": value}))


def test_end_tokens_that_are_asked_for_overrule_the_rest(folder: Callable[..., Path]) -> None:
    path = folder("gptoss", {"eos_token_id": 513}, {"eos_token": "<|return|>"})
    taken = Taken(path, "<|end|>", "<|call|>", "<|end|>", vocab_size=521)
    assert taken.ends == (EndToken(518, "<|end|>"), EndToken(520, "<|call|>"))
    assert taken.notes == ()
    # One that is no special token, by what it is called or by its text.
    newline = Tokenizer.from_file(str(TOKENIZERS / "gptoss.json")).token_to_id("Ċ")
    for name in ("Ċ", "\n"):
        assert Taken(path, name).ends == (EndToken(newline, "Ċ"),)
    for name in ("<|gone|>", "", "513", "two words"):
        with pytest.raises(ExportError, match=r"--end-token is .*, which is no token of .*tokenizer.json"):
            Taken(path, name)


def test_half_of_a_pair_of_characters_is_no_token_and_no_template(folder: Callable[..., Path]) -> None:
    """JSON can hold one as an escape, and nothing else can."""
    path = folder("gptoss", tokenizer=b'{"eos_token": "\\ud800"}')
    assert Taken(path).told("eos_token is '\\ud800', which tokenizer.json has not: not used")
    for template in (b'"a\\ud800"', b'[{"name": "default", "template": "a\\ud800"}]'):
        path = folder("gptoss", tokenizer=b'{"chat_template": ' + template + b"}")
        with pytest.raises(ConfigError, match="the chat template is no text: surrogates not allowed, character 1"):
            Taken(path)


def test_without_a_tokenizer_end_tokens_are_ids() -> None:
    taken = Taken(None, "2", "0", "2", vocab_size=3)
    assert taken.ends == (EndToken(2, ""), EndToken(0, ""))
    assert [str(end) for end in taken.ends] == ["2", "0"]
    assert Taken(None).ends == ()
    with pytest.raises(ExportError, match="--end-token is '</s>', but there is no tokenizer: give --tokenizer"):
        Taken(None, "</s>")
    for beyond in ("3", "9" * 5000):
        with pytest.raises(ExportError, match=r"--end-token is \d+( \[\.\.\.\] \d+)?, but the model knows ids 0 .. 2"):
            Taken(None, beyond, vocab_size=3)


def test_a_tokenizer_that_lies_by_the_checkpoint_is_found(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.pt"
    assert tokenizer_beside(checkpoint) is None
    shutil.copy(TOKENIZERS / "t5.json", tmp_path / "tokenizer.json")
    assert tokenizer_beside(checkpoint) == tokenizer_beside(tmp_path) == tmp_path / "tokenizer.json"


# --- what a family knows better than its files ----------------------------------------------------------------------

CHATML = SpecialTokens("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NAMES = (CHATML.wrong, CHATML.begin, CHATML.end)
WRONG = {"eos_token_id": 0, "bos_token_id": 0}


def of_family(folder: Path, generation: Any, tokenizer: Any, *end_tokens: str) -> TokenizerFiles:
    byte_level(list(NAMES), NAMES).save(str(folder / "tokenizer.json"))
    for file, values in (("generation_config.json", generation), ("tokenizer_config.json", tokenizer)):
        if values is not None:
            (folder / file).write_text(json.dumps(values))
    return tokenizer_for(folder, end_tokens, 300, CHATML)


@pytest.mark.parametrize(
    ("generation", "tokenizer", "said"),
    [
        (WRONG, None, "generation_config.json ends a text at"),
        (WRONG, {"eos_token": "<|im_end|>"}, "generation_config.json ends a text at"),
        (WRONG, {"eos_token": "<|endoftext|>"}, "generation_config.json ends a text at"),
        (None, {"eos_token": {"content": "<|endoftext|>"}}, "tokenizer_config.json ends a text at"),
    ],
)
def test_a_wrong_end_is_corrected_with_a_note(generation: Any, tokenizer: Any, said: str, tmp_path: Path) -> None:
    files = of_family(tmp_path, generation, tokenizer)
    assert files.end_tokens == (EndToken(2, "<|im_end|>"),)
    words = "<|endoftext|> (id 0), which is wrong for this model: <|im_end|> (id 2) is taken"
    assert [note for note in files.notes if "ends a text" in note] == [f"{said} {words}; --end-token overrules it"]


def test_a_right_end_stays(tmp_path: Path) -> None:
    for generation, ends in (({"eos_token_id": 2}, [2]), ({"eos_token_id": [0, 2]}, [0, 2]), (None, [0, 2])):
        for file in tmp_path.iterdir():
            file.unlink()
        files = of_family(tmp_path, generation, None)
        assert sorted(end.id for end in files.end_tokens) == ends
        assert "wrong" not in " ".join(files.notes)
    asked = of_family(tmp_path, WRONG, None, "<|endoftext|>")
    assert asked.end_tokens == (EndToken(0, "<|endoftext|>"),)


def test_a_tokenizer_without_the_right_end_is_taken_as_it_is(folder: Callable[..., Path]) -> None:
    path = folder("gptoss", generation={"eos_token_id": 513})
    assert [end.id for end in tokenizer_for(path, (), 1000, CHATML).end_tokens] == [513]


def test_a_chat_template_names_the_right_tokens(tmp_path: Path) -> None:
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "chat_template": "{{ bos_token }}"}
    chat = of_family(tmp_path, WRONG, tokens).chat
    assert chat is not None
    assert (chat.bos_token, chat.eos_token) == ("<|im_start|>", "<|im_end|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**tokens, "bos_token": "<s>", "eos_token": None}))
    chat = tokenizer_for(tmp_path, (), 300, CHATML).chat
    assert chat is not None
    assert (chat.bos_token, chat.eos_token) == ("<s>", "")
