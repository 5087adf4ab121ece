"""The readers that ``fuzz`` gives hostile inputs to, as a table: who reads, valid inputs, and how these are changed.

A reader runs in a folder of its own, where links, a pipe and a device lie for inputs to name. It needs the repository:
its valid inputs are those of the tests.
"""

import argparse
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from mythos_edge.exporter.graph_difference import graph_difference, read_graph
from mythos_edge.exporter.stored_graphs import check_stored_graphs
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.manifest import MANIFEST_FILE
from mythos_edge.model.tensor_files import read_tensor_file
from mythos_edge.runtime.backends.ort_session import ort_session
from mythos_edge.runtime.chat_template import ChatTemplate
from mythos_edge.scripts.lab import fuzz_inputs
from mythos_edge.scripts.lab import fuzz_mutations as change
from mythos_edge.scripts.lab.fuzz_inputs import FIXTURES, Read
from mythos_edge.scripts.lab.fuzz_mutations import Mutate

OUTSIDE = "outside.txt"
_FAMILIES = ("mla-small", "gqa-small", "ouro-small", "nanbeige-small", "dory-small")


@dataclass(frozen=True)
class Reader:
    """``open(folder, bundle)`` gives what reads one input in ``folder``, and its valid inputs.

    ``share`` is its part of all inputs. ``ends`` says that an input may take as long as the limit, and is ended then;
    ``follows`` that links out of the folder are read, as caches of downloads consist of them.
    """

    name: str
    mutate: Mutate
    open: Callable[[Path, Path], tuple[Read, list[bytes]]]
    share: float
    ends: bool = False
    follows: bool = False


def furnish(folder: Path) -> None:
    """Puts into a folder what hostile inputs name: links out of it and to itself, a pipe, a device, a folder."""
    outside = folder.parent / OUTSIDE
    outside.write_text("not to be read")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "outside").symlink_to(outside)
    (folder / "device").symlink_to("/dev/zero")


def _manifest(folder: Path, bundle: Path) -> tuple[Read, list[bytes]]:
    for file in bundle.iterdir():
        shutil.copy(file, folder)
    seed = (folder / MANIFEST_FILE).read_bytes()

    def read(data: bytes) -> None:
        (folder / MANIFEST_FILE).write_bytes(data)
        opened = open_bundle(folder)
        for target in opened.manifest.targets:
            opened.target(target)
            opened.weights_identity(target)
        opened.require_own_files()
        ChatTemplate.of(opened)

    return read, [seed]


def _safetensors(folder: Path, bundle: Path) -> tuple[Read, list[bytes]]:
    """An input is the size of the file in a line, and its first bytes; the rest is a hole."""
    del bundle
    seeds = []
    for name in ("mla-small", "dory-small"):
        whole = (FIXTURES / name / "model.safetensors").read_bytes()
        seeds.append(b"%d\n" % len(whole) + whole[: 8 + int.from_bytes(whole[:8], "little")])
    shutil.copy(FIXTURES / "mla-small" / "config.json", folder)
    path = folder / "model.safetensors"

    def read(data: bytes) -> None:
        size, _, head = data.partition(b"\n")
        path.write_bytes(head)
        os.truncate(path, max(len(head), min(int(size), 1 << 40)))
        open_checkpoint(path).close()

    return read, seeds


def _header_changed(random: Random, data: bytes, other: bytes) -> bytes:
    """The header of a safetensors file changed as JSON with its length told rightly, mostly."""
    size, _, head = data.partition(b"\n")
    header = change.json_changed(random, head[8:], other.partition(b"\n")[2][8:])
    told = len(header) if random.random() < 0.9 else random.choice((0, 7, 2**63, 2**64 - 1, len(header) + 1, 16 << 20))
    if random.random() < 0.05:
        size = b"%d" % random.choice((0, 8, len(header) + 8, 1 << 40))
    return size + b"\n" + told.to_bytes(8, "little") + header


def _index(folder: Path, bundle: Path) -> tuple[Read, list[bytes]]:
    del bundle
    from safetensors.torch import load_file, save_file

    tensors = list(load_file(FIXTURES / "mla-small" / "model.safetensors").items())
    files = {"a.safetensors": dict(tensors[::2]), "b.safetensors": dict(tensors[1::2])}
    for file, part in files.items():
        save_file(part, folder / file)
    shutil.copy(FIXTURES / "mla-small" / "config.json", folder)
    path = folder / "model.safetensors.index.json"
    seed = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, part in files.items() for name in part}}

    def read(data: bytes) -> None:
        path.write_bytes(data)
        open_checkpoint(folder).close()

    return read, [json.dumps(seed).encode()]


def _torch_seeds(folder: Path) -> list[bytes]:
    import torch

    values: list[Any] = [
        {"model": {"embed.weight": torch.ones(3, 2), "recurrent.a": torch.ones(2)}, "step": 3, "cfg": {"dim": 2}},
        {"a": torch.ones(2, 3), "b": torch.ones(4).half(), "args": argparse.Namespace(lr=np.float32(1))},
    ]
    seeds = []
    for value in values:
        torch.save(value, folder / "seed.pt")
        seeds.append((folder / "seed.pt").read_bytes())
    (folder / "seed.pt").unlink()
    return seeds


def _zip(folder: Path, bundle: Path) -> tuple[Read, list[bytes]]:
    del bundle
    path = folder / "model.pt"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_tensor_file(path)

    return read, _torch_seeds(folder)


def _archive_changed(random: Random, data: bytes, other: bytes) -> bytes:
    """A zip archive with its bytes changed, or made again with other records."""
    if random.random() < 0.6:
        return change.bytes_changed(random, data, other)
    made = BytesIO()
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, OSError, RuntimeError, OverflowError):
        return change.bytes_changed(random, data, other)
    with zipfile.ZipFile(made, "w", random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in records:
            match random.randrange(12):
                case 0:
                    name = random.choice(("../x", "/x", "archive/data.pkl", "a/data.pkl", "a\\b", "x" * 3000, "é"))
                case 1:
                    content = random.choice(
                        (b"", b"\0" * (8 << 20), content * 2, change.bytes_changed(random, content, b""))
                    )
                case 2:
                    continue
            info = zipfile.ZipInfo(name)
            info.compress_type = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
            archive.writestr(info, content)
    return made.getvalue()


def _pickle(folder: Path, bundle: Path) -> tuple[Read, list[bytes]]:
    """An input is the pickle; around it is the archive that torch writes."""
    del bundle
    import torch

    path, seeds = folder / "model.pt", []
    for data in _torch_seeds(folder):
        with zipfile.ZipFile(BytesIO(data)) as archive:
            seeds.append(next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")))

    def read(data: bytes) -> None:
        writer = torch._C.PyTorchFileWriter(str(path))
        for name, content in (
            ("data.pkl", data),
            ("byteorder", b"little"),
            *((f"data/{n}", bytes(24)) for n in range(3)),
        ):
            writer.write_record(name, content, len(content))
        writer.write_end_of_file()
        read_tensor_file(path)

    return read, seeds


def _config(folder: Path, bundle: Path) -> tuple[Read, list[bytes]]:
    """An input is the name of a checkpoint in a line, and its config.json."""
    del bundle
    seeds = []
    for name in _FAMILIES:
        shutil.copytree(FIXTURES / name, folder / name)
        seeds.append(name.encode() + b"\n" + (FIXTURES / name / "config.json").read_bytes())

    def read(data: bytes) -> None:
        name, _, config = data.partition(b"\n")
        (folder / name.decode() / "config.json").write_bytes(config)
        open_checkpoint(folder / name.decode()).close()

    return read, seeds


def _onnx(folder: Path, bundle: Path) -> tuple[Read, list[bytes]]:
    """A graph whose weights are in a file beside it, opened as a session does."""
    del bundle
    import onnx
    from onnx import TensorProto, helper

    (folder / "weights.safetensors").write_bytes(bytes(4096))
    (folder / "other.bin").write_bytes(bytes(64))
    weight = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights.safetensors"), ("offset", "64"), ("length", "64")):
        weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])], [weight],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "step.onnx"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        ort_session(path, 1)

    return read, [model.SerializeToString()]


def _graphs(folder: Path, bundle: Path) -> tuple[Read, list[bytes]]:
    """The coda of a bundle as `build` and `diff` read it."""
    for file in bundle.iterdir():
        shutil.copy(file, folder)
    opened = open_bundle(folder)
    path = folder / opened.manifest.graphs["coda"].file
    first = read_graph(path)
    seed = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        graph_difference(first, read_graph(path))
        check_stored_graphs(opened)

    return read, [seed]


_LOCATIONS = ("../outside.txt", "outside", "fifo", "loop", "device", "folder", "/etc/passwd", "/dev/zero", "",
              "weights.safetensors", "./weights.safetensors", "folder/../weights.safetensors", "*/_ORT_MEM_ADDR_/*",
              "other.bin", "a\0b", "x" * 5000, "..", "\\\\host\\share", "file:///etc/passwd", "step.onnx")  # fmt: skip


def _graph_changed(random: Random, data: bytes, other: bytes) -> bytes:
    """A graph with other places of its weights, other dims and types; now and then changed as bytes."""
    import onnx
    from google.protobuf import message  # type: ignore[import-untyped]

    if random.random() < 0.3:
        return change.bytes_changed(random, data, other)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except message.DecodeError:
        return change.bytes_changed(random, data, other)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and random.random() < 0.5:
                entry.value = random.choice(_LOCATIONS)
            elif random.random() < 0.4:
                number = random.choice(
                    (-1, 0, 1, 63, 64, 4032, 4033, 4096, 2**31, 2**32, 2**62, 2**63 - 1, 2**64, 10**30)
                )
                entry.value = random.choice((str(number), "", "x", "0x40", "1e3", " 64"))
        if random.random() < 0.2:
            tensor.external_data.add(key=random.choice(("location", "offset", "length", "checksum", "")), value="64")
        if random.random() < 0.3:
            tensor.dims[:] = random.choices((-1, 0, 1, 4, 2**31, 2**62, 2**63 - 1), k=random.randrange(4))
        if random.random() < 0.1:
            tensor.data_type = random.randrange(30)
        if random.random() < 0.1:
            tensor.raw_data = bytes(random.choice((0, 4, 64)))
    made: bytes = model.SerializeToString()
    return made


READERS = {
    reader.name: reader
    for reader in (
        Reader("manifest", change.json_changed, _manifest, 0.06),
        Reader("safetensors", _header_changed, _safetensors, 0.14),
        Reader("index", change.json_changed, _index, 0.14, follows=True),
        Reader("zip", _archive_changed, _zip, 0.06),
        Reader("pickle", change.pickle_changed, _pickle, 0.06),
        Reader("config", change.lines_changed(change.json_changed), _config, 0.04),
        Reader("tokenizer", change.json_changed, fuzz_inputs.tokenizer, 0.03),
        Reader("tokenizer-config", change.lines_changed(change.json_changed), fuzz_inputs.tokenizer_config, 0.04),
        Reader("template", change.template_changed, fuzz_inputs.template, 0.06, ends=True),
        Reader("onnx", _graph_changed, _onnx, 0.03),
        Reader("graphs", _graph_changed, _graphs, 0.01),
        Reader("ids", fuzz_inputs.array_changed, fuzz_inputs.ids, 0.09),
        Reader("text", change.bytes_changed, fuzz_inputs.text, 0.05),
        Reader("prompts", change.json_changed, fuzz_inputs.prompts, 0.08),
        Reader("session", fuzz_inputs.saved_changed, fuzz_inputs.session, 0.04),
        Reader("server", change.lines_changed(change.json_changed), fuzz_inputs.server, 0.07),
    )
}
