"""Files that stand for far more than they are, and the child process that opens them and measures what that takes."""

import json
import os
import resource
import socket
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

_GIB = 1 << 30
Maker = Callable[[Path], Path]


def torch_file(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    """A torch.save file around a pickle of our own."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {"data.pkl": data, "byteorder": b"little", "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", content)
    return path


def safetensors_file(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def sparse(path: Path, n_bytes: int) -> Path:
    """A file of that size which takes no room."""
    path.touch()
    os.truncate(path, n_bytes)
    return path


def _called(module: str, name: str, argument: bytes, times: int = 1) -> bytes:
    """A pickle of ``{"a": [f(argument), ...]}``, whose function and argument stand there once."""
    once = b"c" + f"{module}\n{name}\n".encode() + b"q\x01" + b"0" + argument + b"\x85q\x020"
    return b"\x80\x02}X\x01\x00\x00\x00a](" + once + b"h\x01h\x02R" * times + b"es."


def _tensor(stride: bytes, n_values: int = 10**15) -> bytes:
    """A pickle of a state dict with one float32 tensor over a storage of four values."""
    sizes = b"\x8a\x08" + n_values.to_bytes(8, "little") + b"\x85"
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + sizes + stride + b"\x85"
    return b"\x80\x02}X\x01\x00\x00\x00a" + rebuilt + b"\x89ccollections\nOrderedDict\n)RtRs."


def _laughing_key(depth: int) -> bytes:
    """A pickle of a dict whose key is a tuple of two tuples of two tuples ..., so that its hash takes 2**depth."""
    nested = b"".join(b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86" for level in range(1, depth))
    return b"\x80\x02})" + nested + b"K\x01s."


def _one_compressed(path: Path) -> Path:
    """A zip that torch.save wrote, but for one record of many zeros."""
    torch_file(path, _tensor(b"K\x01", 4))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * (200 << 20))
    return path


def _many_of_one(path: Path) -> Path:
    """A thousand names of one tensor."""
    tensor = torch.zeros(6400)
    torch.save({f"t{number}": tensor for number in range(1000)}, path)
    return path


def _overlapping(path: Path) -> Path:
    """A zip whose records all are the same bytes."""
    torch_file(path, b"\x80\x02}.", **{f"data/{index}": b"\0" * 64 for index in range(8)})
    data = bytearray(path.read_bytes())
    places = [at for at in range(len(data)) if data[at : at + 4] == b"PK\x01\x02"]
    for at in places[4:]:
        data[at + 42 : at + 46] = data[places[3] + 42 : places[3] + 46]
    path.write_bytes(data)
    return path


def _long_directory(path: Path) -> Path:
    torch_file(path, b"\x80\x02}.")
    data = path.read_bytes()
    sparse(path, 3 << 30)
    with path.open("r+b") as file:
        file.write(data)
        file.seek(0, os.SEEK_END)
        size = (2 << 30) + 5
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, size, (3 << 30) - size, 0))
    return path


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
    return path


def _index(path: Path) -> Path:
    path.write_text(json.dumps({"weight_map": {f"t{number}": f"{number}" for number in range(300_000)}}))
    (path.parent / "0").write_bytes((2).to_bytes(8, "little") + b"{}")
    return path


def _entry(begin: int, n_values: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [n_values], "data_offsets": [begin, begin + 4 * n_values]}


_EMPTY = b"\x80\x02}."
_FOUR = {"data/0": bytes(16)}
# By file name: what must be in the one line that refuses it, and how it is made.
CHECKPOINTS: dict[str, tuple[str, Maker]] = {
    "bomb.pt": (
        "the record 'archive/data.pkl' is compressed",
        lambda path: torch_file(path, _EMPTY, zipfile.ZIP_DEFLATED, **{"data/0": b"\0" * (200 << 20)}),
    ),
    "one.pt": ("the record 'archive/data/0' is compressed", _one_compressed),
    "overlapping.pt": ("is there twice or shares bytes", _overlapping),
    "directory.pt": ("its directory is longer than 16 MB", _long_directory),
    "bytes.pt": (
        "it calls bytearray",
        lambda path: torch_file(path, _called("builtins", "bytearray", b"J\xff\xff\xff\x7f")),
    ),
    "encoded.pt": (
        "it unpacks to far more than a checkpoint has",
        lambda path: torch_file(
            path, _called("_codecs", "encode", b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20), 9000)
        ),
    ),
    "key.pt": ("it unpacks to far more", lambda path: torch_file(path, _laughing_key(200))),
    "lists.pt": (
        "it unpacks to far more",
        lambda path: torch_file(path, b"\x80\x02](" + b"]" * (20 << 20) + b"e."),
    ),
    "pickle.pt": (
        "it has 41.9 MB beside its tensors, expected at most 32 MB",
        lambda path: torch_file(path, b"\x80\x02](" + b"]" * (40 << 20) + b"e."),
    ),
    "deep.pt": (
        "it unpacks to far more",
        lambda path: torch_file(path, b"\x80\x02" + b"](" * 300_000 + b"e" * 300_000 + b"."),
    ),
    "expanded.pt": ("a is stored transposed, strided", lambda path: torch_file(path, _tensor(b"K\x00"), **_FOUR)),
    "beyond.pt": (
        "the bytes of a are not where torch.save puts them",
        lambda path: torch_file(path, _tensor(b"K\x01"), **_FOUR),
    ),
    "many.pt": ("its tensors have 25.6 MB, the file", _many_of_one),
    "overlapping.safetensors": (
        "t0 and t1 share bytes",
        lambda path: safetensors_file(
            path, json.dumps({f"t{number}": _entry(0, 64) for number in range(1000)}).encode(), bytes(256)
        ),
    ),
    "double.safetensors": (
        "the key 'a' stands there twice",
        lambda path: safetensors_file(
            path, b'{"a": %s, "a": %s}' % ((json.dumps(_entry(0, 1)).encode(),) * 2), bytes(4)
        ),
    ),
    "long.safetensors": ("its header has 17 MB", lambda path: safetensors_file(path, b" " * 17_000_000)),
    "model.safetensors.index.json": ("t0 should be in 0", _index),
    "huge.index.json": ("has 23 GB, the index has at most 16 MB", lambda path: sparse(path, 23 * 10**9)),
    "pipe.pt": ("is a pipe, expected a file", _fifo),
    "pipe.safetensors": ("is a pipe, expected a file", _fifo),
    "pipe.index.json": ("is a pipe, expected a file", _fifo),
    "socket.pt": ("is a socket, expected a file", _socket),
}


def measured(module: str, function: str, paths: Sequence[Path | str], *, warm: Path) -> dict[str, Any]:
    """Collects what ``function(path)`` says of each path, in a child that can use 1 GB more than it does for ``warm``.

    ``messages`` by path, the longest ``seconds`` of one, and ``grown`` bytes of resident memory.
    """
    command = [sys.executable, __file__, module, function, str(warm), *map(str, paths)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    values: dict[str, Any] = json.loads(ran.stdout)
    return values


def _child(module: str, function: str, warm: str, paths: Sequence[str]) -> None:
    from importlib import import_module

    from mythos_edge.model.errors import MythosEdgeError

    call = getattr(import_module(module), function)
    call(warm)
    with open("/proc/self/statm", encoding="ascii") as file:
        virtual = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + _GIB, virtual + _GIB))
    before, messages, longest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}, 0.0
    for path in paths:
        started = time.perf_counter()
        try:
            call(path)
            messages[path] = "no error"
        except MythosEdgeError as error:
            messages[path] = str(error)
        longest = max(longest, time.perf_counter() - started)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"messages": messages, "seconds": longest, "grown": grown}))


if __name__ == "__main__":
    _child(*sys.argv[1:4], sys.argv[4:])
