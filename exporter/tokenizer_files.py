"""The tokenizer that travels with a bundle, held against the model, and the tokens that end a text.

A tokenizer's folder says which tokens end a text in ``generation_config.json``, or else in ``tokenizer_config.json``.
Where it has neither, special tokens with a name that is used for nothing else do. Needs no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_edge.exporter.chat_templates import TEMPLATE_FILE, ChatText, chat_text_of
from mythos_edge.model.errors import ConfigError, ExportError
from mythos_edge.model.families.family import SpecialTokens
from mythos_edge.model.json_files import read_json_object
from mythos_edge.model.manifest import ChatTemplate, EndToken
from mythos_edge.model.tokenizer_file import decoding, encoding, read_tokenizer, tokens_around_prompt

TOKENIZER_FILE = "tokenizer.json"
GENERATION_CONFIG, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
# Files that lie beside tokenizer.json, and are given in its place.
_SIBLINGS = (
    *(GENERATION_CONFIG, TOKENIZER_CONFIG, "config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", TEMPLATE_FILE),
)
# What special tokens that end a text, or a turn of a talk, are called.
_END_NAMES = (
    *("<|return|>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>"),
    *("<|im_end|>", "<|end|>", "<|call|>", "<eos>", "<end_of_turn>", "<|end_of_turn|>", "<|EOT|>", "<EOT>", "[EOS]"),
    *("<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>"),
)
# With the second there, the first ends a message, after which the same turn goes on.
_ENDS_LESS = {"<|end|>": "<|return|>"}
# As the library counts them.
_MOST_IDS = 1 << 32
# tokenizer_config.json repeats every added token.
_MOST_BYTES = 16_000_000


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as a bundle carries it: the ``data`` of its tokenizer.json and its chat template, if any, the tokens
    that end a text, and notes of what is worth telling."""

    data: bytes | None
    end_tokens: tuple[EndToken, ...]
    chat: ChatText | None
    notes: tuple[str, ...]

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template as the manifest has it."""
        return None if self.chat is None else ChatTemplate(TEMPLATE_FILE, self.chat.bos_token, self.chat.eos_token)

    def write(self, folder: Path) -> None:
        """Writes the files. Raises OSError."""
        if self.data is not None:
            (folder / TOKENIZER_FILE).write_bytes(self.data)
        if self.chat is not None:
            (folder / TEMPLATE_FILE).write_bytes(self.chat.text.encode())


class _Vocabulary:
    """The tokens of a tokenizer by id: its ``own``, and those ``added`` to them."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.added = library.get_added_tokens_decoder()
        self.own = {number: str(token) for token, number in library.get_vocab(with_added_tokens=False).items()}

    @property
    def special(self) -> dict[str, int]:
        """The special tokens with their ids."""
        return {token.content: number for number, token in self.added.items() if token.special}

    def id_of(self, text: str) -> int | None:
        """The id of the token of that name, or that is all of that text; None where there is none."""
        number = None
        with suppress(UnicodeEncodeError):  # half of a pair of characters, which JSON can hold and no token is
            number = self._library.token_to_id(text)
        if number is None and text:
            with suppress(ValueError):
                ids = encoding(self._library, text, around=False).ids
                number = (
                    ids[0] if len(ids) == 1 and decoding(self._library, ids, special_tokens=False) == text else None
                )
        return None if number is None else int(number)

    def end_token(self, number: int) -> EndToken:
        """A token as the manifest has it, with no text where the tokenizer has none of that id."""
        return EndToken(number, str(self._library.id_to_token(number) or ""))


class _Corrections:
    """Corrects what the files of a model say of its tokens, as its family knows them and the tokenizer has them."""

    def __init__(self, known: SpecialTokens | None, vocabulary: _Vocabulary) -> None:
        ids = {} if known is None else {text: vocabulary.id_of(text) for text in (known.wrong, known.begin, known.end)}
        self._known, self._ids = None if None in ids.values() else known, ids

    def ends(self, ids: list[int], said: str, note: Callable[[str], None] = lambda text: None) -> list[int]:
        """The right ids in place of the wrong one alone; ``said`` by this file."""
        known = self._known
        if known is None or ids != [self._ids[known.wrong]]:
            return ids
        right = self._ids[known.end]
        assert right is not None
        note(
            f"{said} ends a text at {known.wrong} (id {ids[0]}), which is wrong for this model: {known.end} (id "
            f"{right}) is taken; --end-token overrules it"
        )
        return [right]

    def chat(self, chat: ChatText) -> ChatText:
        """The chat template with the right tokens to name."""
        known = self._known
        if known is None or known.wrong not in (chat.bos_token, chat.eos_token):
            return chat
        tokens = ((chat.bos_token, known.begin), (chat.eos_token, known.end))
        return ChatText(chat.text, *(right if told == known.wrong else told for told, right in tokens))


def tokenizer_for(
    given: Path | None, end_tokens: Sequence[str], vocab_size: int, known: SpecialTokens | None = None
) -> TokenizerFiles:
    """The tokenizer at ``given``, a tokenizer.json or its folder, for a model that knows ``vocab_size`` ids.

    ``end_tokens`` (texts, or ids where there is no tokenizer) overrule what the folder says; ``known`` corrects it. The
    notes tell what differs from what one might expect. Raises ExportError, ConfigError.
    """
    if given is None:
        ends = tuple(EndToken(_number(text, vocab_size), "") for text in end_tokens)
        return TokenizerFiles(None, tuple(dict.fromkeys(ends)), None, ())
    try:
        path = _tokenizer_path(given)
        library, data, switched_off = read_tokenizer(path)
    except OSError as error:
        raise ExportError(f"{given}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ExportError(f"{given}: not a Hugging Face tokenizer.json: {error}") from error
    notes: list[str] = []
    if switched_off:
        notes.append(f"{path}: {' and '.join(switched_off)} of its own: switched off, prompts are taken as they are")
    vocabulary = _Vocabulary(library)
    _check_vocabulary(path, vocabulary, vocab_size, notes.append)
    correct = _Corrections(known, vocabulary)
    ends, said = _end_tokens(path, vocabulary, end_tokens, correct, notes.append)
    _tell_what_ends_prompts(path, library, ends, notes.append)
    for end in ends:
        if end.id >= vocab_size:
            last = vocab_size - 1
            notes.append(f"{end} ends a text by {said}, but this model cannot produce it: its ids are 0 .. {last}")
        elif not end.text:
            notes.append(f"{path}: has no token of id {end.id}, which ends a text by {said}")
    chat = _chat_text(path, bool(end_tokens), notes.append)
    return TokenizerFiles(data, ends, chat and correct.chat(chat), tuple(notes))


def _chat_text(path: Path, overruled: bool, note: Callable[[str], None]) -> ChatText | None:
    """The chat template; where the config is damaged and all else of it is ``overruled``, a note and none."""
    try:
        config = _read_object(path.with_name(TOKENIZER_CONFIG))
    except ConfigError as error:
        if not overruled:
            raise
        note(f"{error}: if it holds a chat template, that is not taken along")
        config = {}
    return chat_text_of(path, config, note)


def tokenizer_beside(checkpoint: Path) -> Path | None:
    """The tokenizer.json in a checkpoint's folder, if there is one."""
    path = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / TOKENIZER_FILE
    return path if path.is_file() else None


def _tokenizer_path(given: Path) -> Path:
    """The tokenizer.json of what was given: the file, its folder, or a file beside it."""
    folder = given if given.is_dir() else given.parent if given.name in _SIBLINGS else None
    path = given if folder is None else folder / TOKENIZER_FILE
    if path.exists() and not path.is_dir():  # a pipe is refused by who reads it
        return path
    others = [] if folder is None or not folder.is_dir() else [name for name in _SIBLINGS if (folder / name).is_file()]
    if others and not path.exists():
        raise ExportError(
            f"{folder}: no such tokenizer: it has {', '.join(others)}, expected {TOKENIZER_FILE}; save_pretrained of "
            "transformers' AutoTokenizer writes one"
        )
    what = "is no file" if path.exists() else "no such tokenizer"
    raise ExportError(f"{path}: {what}; expected a Hugging Face {TOKENIZER_FILE}, or its folder")


def _tell_what_ends_prompts(path: Path, library: Any, ends: Sequence[EndToken], note: Callable[[str], None]) -> None:
    """A text that goes on after its end is what some tokenizers ask of a model, and few models were trained for."""
    _, after = tokens_around_prompt(library)
    if {end.text for end in ends}.intersection(after[-1:]):
        note(f"{path}: every prompt ends with {after[-1]}, which also ends a text")


def _check_vocabulary(path: Path, vocabulary: _Vocabulary, vocab_size: int, note: Callable[[str], None]) -> None:
    """Raises ConfigError for a tokenizer of another model; tells of ids that only one of them knows."""
    known = f"the model knows ids 0 .. {vocab_size - 1}"
    beyond = max(vocabulary.own.keys() - vocabulary.added.keys(), default=0)
    if beyond >= vocab_size:
        raise ConfigError(
            f"{path}: the tokenizer's own vocabulary reaches id {beyond} ({vocabulary.own[beyond]!r}), but {known}: "
            "give the tokenizer that the model was trained with"
        )
    added = sorted(number for number in vocabulary.added if number >= vocab_size)
    if added:
        first = f"{vocabulary.added[added[0]].content!r} (id {added[0]})"
        what = (
            f"an added token is unknown to the model, {first}"
            if len(added) == 1
            else (f"{len(added)} added tokens are unknown to the model, {first} is the first")
        )
        note(f"{path}: {what}; {known}, and a prompt that holds another is refused")
    silent = vocab_size - sum(number < vocab_size for number in vocabulary.own.keys() | vocabulary.added.keys())
    if silent:
        note(f"{path}: has no token for {silent} of the model's {vocab_size} ids, which will have no text")


def _end_tokens(
    path: Path,
    vocabulary: _Vocabulary,
    asked: Sequence[str],
    correct: _Corrections,
    note: Callable[[str], None],
) -> tuple[tuple[EndToken, ...], str]:
    """The tokens that end a text, and what says so: the strongest source that names any."""
    if asked:
        return tuple(map(vocabulary.end_token, dict.fromkeys(_asked(path, text, vocabulary) for text in asked))), (
            "--end-token"
        )
    by_ids = correct.ends(_from_generation_config(path.with_name(GENERATION_CONFIG)), GENERATION_CONFIG, note)
    by_name = _from_tokenizer_config(path.with_name(TOKENIZER_CONFIG))
    named = None if by_name is None else vocabulary.id_of(by_name)
    if by_name is not None and named is None:
        note(f"{path.with_name(TOKENIZER_CONFIG)}: eos_token is {by_name!r}, which {path.name} has not: not used")
    if by_ids:
        ends = tuple(map(vocabulary.end_token, by_ids))
        if named is not None and correct.ends([named], TOKENIZER_CONFIG)[0] not in by_ids:
            note(
                f"{path.with_name(TOKENIZER_CONFIG)}: eos_token is {vocabulary.end_token(named)}, but "
                f"{GENERATION_CONFIG} ends a text at {', '.join(map(str, ends))}: taken; --end-token overrules both"
            )
        return ends, GENERATION_CONFIG
    if named is not None:
        (right,) = correct.ends([named], TOKENIZER_CONFIG, note)
        return (vocabulary.end_token(right),), TOKENIZER_CONFIG
    special = vocabulary.special
    names = [name for name in _END_NAMES if name in special and _ENDS_LESS.get(name) not in special]
    return tuple(EndToken(special[name], name) for name in names), "names of special tokens" if names else ""


def _asked(path: Path, text: str, vocabulary: _Vocabulary) -> int:
    number = vocabulary.id_of(text)
    if number is None:
        raise ExportError(f"--end-token is {text!r}, which is no token of {path}: give a token's text, such as '</s>'")
    return number


def _number(text: str, vocab_size: int) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ExportError(f"--end-token is {text!r}, but there is no tokenizer: give --tokenizer, or the token's id")
    if len(text) > 18 or int(text) >= vocab_size:
        raise ExportError(f"--end-token is {text}, but the model knows ids 0 .. {vocab_size - 1}")
    return int(text)


def _from_generation_config(path: Path) -> list[int]:
    """The ids that ``eos_token_id`` gives, one or several, in their order."""
    value = _read_object(path).get("eos_token_id")
    values = [] if value is None else value if isinstance(value, list) else [value]
    for number in values:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < _MOST_IDS:
            raise ConfigError(f"{path}: eos_token_id is {value!r}, expected a token id, or a list of them")
    return list(dict.fromkeys(values))


def _from_tokenizer_config(path: Path) -> str | None:
    """The token that ``eos_token`` names, as a text or as an object with its ``content``."""
    value = _read_object(path).get("eos_token")
    name = value.get("content") if isinstance(value, dict) else value
    if name is None and value is None:
        return None
    if not isinstance(name, str):
        raise ConfigError(f"{path}: eos_token is {value!r}, expected a token's text")
    return name or None


def _read_object(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file, an empty one where there is no file. Raises ConfigError."""
    return read_json_object(path, "its end tokens", ConfigError, _MOST_BYTES) if path.is_file() else {}
