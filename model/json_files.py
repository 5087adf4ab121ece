"""Reading JSON files that others made, and naming a few of many things in a message. Standard library only."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mythos_edge.model.bounded_files import parse_json, read_bounded
from mythos_edge.model.errors import ConfigError, MythosEdgeError, OSErrorAs
from mythos_edge.model.foreign_files import foreign_kind

_MOST_CONFIG_BYTES = 1_000_000


def read_config_dict(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; ConfigError when it is missing or not one."""
    return read_json_object(path, "the config", ConfigError)


def read_json_object(
    path: Path, what: str, error: type[MythosEdgeError], most: int = _MOST_CONFIG_BYTES
) -> dict[str, Any]:
    """The JSON object in a file of at most ``most`` bytes, with or without a byte order mark.

    Raises ``error``, which calls the file's content ``what``, when it is missing or holds anything else.
    """
    with OSErrorAs(error, f"{path}: cannot read {what}"):
        content = read_bounded(path, most, what)
    try:
        values = parse_json(content)
    except ValueError as fault:
        if (known := foreign_kind(content[:512])) is not None:
            raise error(f"{path}: is {known}") from fault
        raise error(f"{path}: not valid JSON: {fault}") from fault
    if not isinstance(values, dict):
        raise error(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def few(found: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are; one that would not stay on its line is quoted."""
    names = [name if name.isprintable() else repr(name) for name in found]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "no tensors"
