"""The chat template that travels with a bundle: what a tokenizer's folder says of talks. Needs no Jinja."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_edge.model.bounded_files import read_bounded
from mythos_edge.model.errors import ConfigError

TEMPLATE_FILE = "chat_template.jinja"
# Of several templates the one for talks without tools or documents.
_DEFAULT = "default"
_MOST_BYTES = 1_000_000


@dataclass(frozen=True)
class ChatText:
    """The text of a template, and the tokens that it may name: ``bos_token`` and ``eos_token``, empty without one."""

    text: str
    bos_token: str
    eos_token: str


def chat_text_of(tokenizer: Path, config: Mapping[str, Any], note: Callable[[str], None]) -> ChatText | None:
    """The template beside ``tokenizer``: chat_template.jinja, or else what ``config`` (tokenizer_config.json) holds.

    Raises ConfigError for one that cannot be read.
    """
    path = tokenizer.with_name(TEMPLATE_FILE)
    where = tokenizer.with_name("tokenizer_config.json")
    text = _text_of(path) if path.is_file() else _chosen(config.get("chat_template"), where, note)
    return None if text is None else ChatText(text, *(_token(config.get(name)) for name in ("bos_token", "eos_token")))


def _text_of(path: Path) -> str:
    try:
        return read_bounded(path, _MOST_BYTES, "a chat template").decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the chat template: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the chat template is not UTF-8 text: {error}") from error


def _chosen(value: Any, where: Path, note: Callable[[str], None]) -> str | None:
    """The template in a field that holds one, or several as a list of ``name`` and ``template``."""
    if value is None or isinstance(value, str):
        return value if value is None else _whole(value, where)
    try:
        named = {str(one["name"]): one["template"] for one in value}
        text = named.pop(_DEFAULT)
    except (TypeError, KeyError) as error:
        raise ConfigError(
            f"{where}: chat_template is of type {type(value).__name__}, expected a text, or a list of name and "
            f"template with one named {_DEFAULT!r}"
        ) from error
    if not isinstance(text, str):
        raise ConfigError(f"{where}: the chat template {_DEFAULT!r} is of type {type(text).__name__}, expected a text")
    if named:
        note(f"{where}: of its chat templates {_DEFAULT!r} is taken along, not {', '.join(named)}")
    return _whole(text, where)


def _whole(text: str, where: Path) -> str:
    """The text, if it can be written. Raises ConfigError for half of a pair of characters, which JSON can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: the chat template is no text: {error.reason}, character {error.start}") from error
    return text


def _token(value: Any) -> str:
    """The text of a token that is given as such, or as an object with its ``content``."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""
