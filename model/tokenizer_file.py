"""Reading a Hugging Face ``tokenizer.json``, which export and runtime both do. The library loads at first use."""

from pathlib import Path
from typing import Any

from mythos_edge.model.errors import BackendUnavailable

_LFS_POINTER = b"version https://git-lfs.github.com/"
# The largest ones in use have about 40 MB.
_MOST_BYTES = 1 << 29


def read_tokenizer(path: Path) -> tuple[Any, bytes]:
    """The library's tokenizer as the file has it, and the file's bytes.

    Raises ValueError that says why the file is no tokenizer, OSError, and BackendUnavailable without the library.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise BackendUnavailable("text needs the tokenizers library", "pip install tokenizers") from error
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES >> 20} MiB")
    if data.startswith(_LFS_POINTER):
        raise ValueError("it is a git-LFS pointer, not the file itself: run `git lfs pull` where it came from")
    text = data.decode("utf-8-sig")  # a byte order mark is no error
    try:
        return Tokenizer.from_str(text), data
    except Exception as error:  # the library raises plain Exception
        raise ValueError(" ".join(str(error).split())) from error
