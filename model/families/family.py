"""A family of looped models as data: how a checkpoint of it is told, read, laid out and computed. Import-light.

What needs torch is imported when it is asked for, so that ``inspect`` can tell of a bundle without it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mythos_edge.model.errors import ConfigError
from mythos_edge.model.json_files import read_config_dict
from mythos_edge.model.looped import LoopedModel


class Config(Protocol):
    """The config of a model with the checkpoint's own field names, a frozen dataclass."""

    @property
    def max_seq_len(self) -> int:
        """Positions that the model was made for."""
        ...

    @property
    def family(self) -> str:
        """The name of its family."""
        ...

    @property
    def looped(self) -> LoopedModel:
        """The sizes that the runtime knows."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        ...

    def described(self) -> dict[str, str]:
        """The model in words, line by line."""
        ...


@dataclass(frozen=True)
class SpecialTokens:
    """The texts of the tokens that ``begin`` and ``end`` a turn, where a model's files name ``wrong`` for both."""

    wrong: str
    begin: str
    end: str


@dataclass(frozen=True)
class Opening:
    """A checkpoint's tensors as they are stored, and what the caller said about it; see ``open_checkpoint``.

    ``config_values`` are those of the config that the caller gave over those of the config.json beside the tensors;
    none where there is neither.
    """

    path: Path
    stored: Any  # tensor_files.TensorFile
    config_values: Mapping[str, Any]
    config_path: Path | None
    rope_table: str | None
    tolerate: Collection[str]

    def config_origin(self) -> str:
        """The files that the config comes from, the strongest first.

        Raises ConfigError where there is none, and where one cannot be read.
        """
        beside = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        files = [file for file in (self.config_path, beside) if file is not None and (file != beside or file.exists())]
        if not files:
            raise ConfigError(
                f"{beside}: no such file, expected the model's config: copy it there, or give it in --config"
            )
        for file in files:
            read_config_dict(file)
        return " over ".join(dict.fromkeys(map(str, files)))


class Family(Protocol):
    """A family; see ``table`` for those that are known."""

    name: str

    def recognises(self, names: Collection[str], config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with tensors of these names and a config with these fields is one of the family."""
        ...

    def config_from(self, values: Mapping[str, Any], origin: str) -> Config:
        """The config with these fields. Raises ConfigError, which names the ``origin``."""
        ...

    def open(self, opening: Opening) -> Any:
        """The ``stored_checkpoint.Checkpoint``, checked tensor by tensor. Raises CheckpointError and ConfigError."""
        ...

    def recipes(self, config: Any, max_context: int) -> list[Any]:
        """A ``recipes.Recipe`` for every stored tensor."""
        ...

    def network(self, config: Any, max_context: int, ops: Any = None) -> Any:
        """The ``network.LoopedNetwork``; ``ops`` traces the custom ops, without it they are computed."""
        ...
