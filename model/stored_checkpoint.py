"""An open checkpoint of any family: its config, and rows of its tensors on demand."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from mythos_edge.model.entry_reader import EntryReader
from mythos_edge.model.families.family import Config, SpecialTokens
from mythos_edge.model.tensor_files import TensorEntry


class Checkpoint:
    """An open checkpoint: ``tensors`` by upstream name (without head and rope tables) and its ``config``.

    ``table`` is the rotary table that the file holds, ``rope_table`` says whether that ("stored") or the config's
    ("config") is computed with, ``unlike_config`` whether they differ ("real" or "theta"). ``notes`` are for people,
    ``special_tokens`` are what a family knows better than the files of its models.
    Tensors are read, not mapped, so resident memory holds no more than what ``read`` returned.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        config: Config,
        tensors: Mapping[str, TensorEntry],
        step: int | None = None,
        *,
        table: Any = None,
        rope_table: str = "config",
        unlike_config: str | None = None,
        notes: tuple[str, ...] = (),
        special_tokens: SpecialTokens | None = None,
        reader: EntryReader | None = None,
    ) -> None:
        self.path = path
        self.kind = kind
        self.config = config
        self.tensors = tensors
        self.step = step
        self.table = table
        self.rope_table = rope_table
        self.unlike_config = unlike_config
        self.notes = notes
        self.special_tokens = special_tokens
        self._reader = EntryReader() if reader is None else reader

    @property
    def stored_table(self) -> Any:
        """The rotary table to compute with, where it is the file's own; None where it is the config's."""
        return self.table if self.rope_table == "stored" else None

    @property
    def n_parameters(self) -> int:
        """Elements of all tensors; the tied head counts once."""
        return sum(entry.n_elements for entry in self.tensors.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors in the file's dtypes; the tied head counts once."""
        return sum(entry.n_bytes for entry in self.tensors.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start:stop`` of a tensor along its first axis, fresh memory in the file's dtype.

        Raises CheckpointError when the file has become shorter or unreadable since it was opened.
        """
        stored = self.stored_table
        entry = stored.entry if stored is not None and name == stored.entry.name else self.tensors[name]
        return self._reader.read(entry, start, stop)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
