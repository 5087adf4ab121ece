"""Merging what several places say of a model's config: a stronger source wins, and nothing is dropped unsaid.

The order is ``--config``, then what the checkpoint itself holds, then a config.json beside it. Only what comes out is
judged, so an unusable source does no harm where another one completes it. Reads no file and no weight.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mythos_edge.model.errors import ConfigError
from mythos_edge.model.families.hugging_face import HUGGING_FACE_FIELDS
from mythos_edge.model.families.openmythos.config import (
    FIELD_NAMES,
    INERT_FIELDS,
    MythosConfig,
    check_field,
    config_from_dict,
)
from mythos_edge.model.json_files import few
from mythos_edge.model.tensor_choice import CONFIG_KEYS

_MOST_NAMED = 8


@dataclass(frozen=True)
class ConfigSource:
    """One source of config fields; ``origin`` names it, ``dedicated`` is a file that holds the model's config alone."""

    origin: str
    content: Any
    dedicated: bool


@dataclass
class MergedFields:
    """The fields of all sources by strength, where each comes from, and what was left out, in lines for a person."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tied: bool | None = None
    wishes_untied: str | None = None

    @property
    def complete(self) -> bool:
        return set(self.values).issuperset(FIELD_NAMES)

    def add(self, source: ConfigSource, decided: Mapping[str, Any]) -> None:
        """Takes what ``source`` says of fields that no stronger source has; ``decided`` is what the weights say.

        Raises ConfigError for an unknown field of a file that is the strongest to tell the config.
        """
        told = dict(_fields(source.content))
        tied = told.pop("tie_word_embeddings", None)
        if self.tied is None and tied is not None:
            self.tied = bool(tied)
            self.wishes_untied = None if tied else source.origin
        known = {name: told.pop(name) for name in FIELD_NAMES if name in told}
        unknown = sorted(set(told) - INERT_FIELDS - HUGGING_FACE_FIELDS)
        if unknown and source.dedicated and not self.values:
            raise ConfigError(
                f"{source.origin}: unknown config field {few(unknown, _MOST_NAMED)}; known: {', '.join(FIELD_NAMES)}: "
                "take it out, or give the config without it in --config"
            )
        if unknown and not source.dedicated:
            # Options of a trainer may bear the name of a field and mean another thing: what cannot be is left out.
            unknown += sorted(name for name, value in known.items() if not _fits(name, value, decided))
            known = {name: value for name, value in known.items() if name not in unknown}
        if not known and not isinstance(source.content, Mapping):
            self.notes.append(f"{source.origin} is a {type(source.content).__name__}, expected the fields of a config")
        elif unknown:
            self.notes.append(
                f"{source.origin}: left out {few(unknown, _MOST_NAMED)}, which tells nothing of the model"
            )
        self._merge(known, source.origin)

    def config(self, defaults: Mapping[str, Any], path: str) -> MythosConfig:
        """The config, with ``defaults`` for what no source says. Raises ConfigError, naming the field's origin."""
        try:
            return config_from_dict({**defaults, **self.values}, origin=self._names(path))
        except ConfigError as error:
            # What a source could not tell is often why a field is missing.
            unusable = self.notes if "missing config field" in str(error) else []
            raise ConfigError("; ".join([str(error), *unusable])) from None

    def _names(self, path: str) -> str:
        return " over ".join(dict.fromkeys(self.origins.values())) or path

    def _merge(self, known: Mapping[str, Any], origin: str) -> None:
        differing = [name for name, value in known.items() if name in self.values and self.values[name] != value]
        for name in differing[:_MOST_NAMED]:
            self.notes.append(
                f"{name} is {self.values[name]!r}, as {self.origins[name]} says; {origin} says {known[name]!r}"
            )
        self.origins |= {name: origin for name in known if name not in self.values}
        self.values = {**known, **self.values}


def _fields(content: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a source that are not null; of a file with sections, those of the section of the config."""
    if not isinstance(content, Mapping):
        return
    section = next((content[key] for key in CONFIG_KEYS if _is_config(content.get(key))), None)
    for name, value in {**content, **(section or {})}.items():
        if value is not None and value is not section:
            yield str(name), value


def _is_config(content: Any) -> bool:
    return isinstance(content, Mapping) and not content.keys().isdisjoint(FIELD_NAMES)


def _fits(name: str, value: Any, decided: Mapping[str, Any]) -> bool:
    try:
        check_field(name, value)
    except ConfigError:
        return False
    return name not in decided or bool(decided[name] == value)
