"""Reading rows of the tensors whose places are known: seek and read, never map, so that memory stays bounded."""

from io import FileIO
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from mythos_edge.model.errors import CheckpointError, OSErrorAs
from mythos_edge.model.tensor_files import TensorEntry


class EntryReader:
    """Reads rows of tensors by their entries, from files that it opens at need and keeps open until ``close``."""

    def __init__(self) -> None:
        self._files: dict[Path, FileIO] = {}
        self._lock = Lock()
        self._closed = False

    def read(self, entry: TensorEntry, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start:stop`` along the first axis, fresh memory in the file's dtype.

        Raises CheckpointError when the file has become shorter or unreadable since its header was read.
        """
        rows, *columns = entry.shape
        stop = rows if stop is None else stop
        assert 0 <= start <= stop <= rows, (entry.name, start, stop)
        row_bytes = entry.n_bytes // rows
        raw = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        self._fill(raw.numpy().data, entry, entry.offset + start * row_bytes)
        return raw.view(entry.dtype).view(stop - start, *columns)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _fill(self, buffer: memoryview, entry: TensorEntry, offset: int) -> None:
        # Seek and readinto instead of os.pread: no second copy of the bytes, and Windows has no pread.
        with self._lock:
            assert not self._closed, "read after close"
            with OSErrorAs(CheckpointError, f"{entry.path}: cannot read {entry.name}"):
                if entry.path not in self._files:
                    self._files[entry.path] = FileIO(entry.path, "r")
                file, filled = self._files[entry.path], 0
                file.seek(offset)
                while filled < len(buffer):
                    got = file.readinto(buffer[filled:])
                    if not got:
                        raise CheckpointError(
                            f"{entry.path}: ends inside {entry.name}: changed while open, or truncated"
                        )
                    filled += got
