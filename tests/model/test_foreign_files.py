"""Files and folders that are no checkpoint: each is named as what it is, with the command that mends it."""

import gzip
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tiny_checkpoint import assert_refused, bare, config_fields, saved, sharded, stored_weights, write_config
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import CheckpointError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html class='hub'><head><title>model.pt</title></head></html>"


def _tar(compression: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{compression}") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"))
    return out.getvalue()


def _zip(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return out.getvalue()


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty (0 bytes)|copy it again"),
        (LFS, "git-LFS pointer|`git lfs pull`|`hf download REPO`"),
        (PAGE, "web page|`hf download REPO FILE`|/resolve/"),
        (b"\xef\xbb\xbf<HTML>", "web page|`hf download REPO FILE`"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML|`hf download REPO FILE`"),
        (b"GGUF\x03\x00\x00\x00" + bytes(40), "GGUF file of llama.cpp"),
        (b"\x93NUMPY\x01\x00" + bytes(40), "NumPy array|torch.save"),
        (gzip.compress(b"x" * 100, mtime=0), "compressed with gzip|`tar -xzf`"),
        (_tar("xz"), "compressed with xz|`tar -xJf`"),
        (_tar("bz2"), "compressed with bzip2|`tar -xjf`"),
        (_tar(""), "a tar archive|`tar -xf`"),
        (_zip("model/model.pt", "README.md"), "a zip archive of files|`unzip`"),
        (_zip("weights.npy", "bias.npy"), "NumPy arrays (.npz)|torch.save"),
        (b'{"vocab_size": 19}', "a JSON file|--config"),
        (b"\xef\xbb\xbf{}", "a JSON file|--config"),
    ],
)
def test_what_a_file_is(tmp_path: Path, content: bytes, words: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert_refused(CheckpointError, f"{path}: is |{words}", path)


def test_a_pointer_within_a_folder(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "model-00002-of-00002.safetensors").write_bytes(LFS)
    assert_refused(CheckpointError, "model-00002-of-00002.safetensors: is a git-LFS pointer", folder)
    (folder / "model.safetensors.index.json").write_bytes(LFS)
    assert_refused(CheckpointError, "index.json: is a git-LFS pointer", folder)
    (folder / "model.safetensors").write_bytes(LFS)
    assert_refused(CheckpointError, "model.safetensors: is a git-LFS pointer", folder)


def test_a_header_that_looks_like_a_signature_is_a_header(tmp_path: Path) -> None:
    """The first bytes of a safetensors file are a length, here gzip's magic number."""
    path = tmp_path / "model.safetensors"
    save_file(bare(), path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    wanted = 0x8B1F
    header = content[8 : 8 + size].rstrip()
    path.write_bytes(wanted.to_bytes(8, "little") + header + b" " * (wanted - len(header)) + content[8 + size :])
    assert path.read_bytes()[:2] == b"\x1f\x8b"
    write_config(tmp_path)
    open_checkpoint(path).close()


def test_programs_are_no_state_dicts(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    assert_refused(CheckpointError, "a TorchScript program|state_dict()", tmp_path / "script.pt")
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "program.pt2")
    assert_refused(CheckpointError, "a torch.export program|state_dict()", tmp_path / "program.pt2")


def test_an_onnx_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    assert_refused(CheckpointError, "an ONNX model|the checkpoint that it was exported from", tmp_path / "model.onnx")


# --- several files ------------------------------------------------------------------------------------------------


def _bin_shards(folder: Path) -> Path:
    names = list(stored_weights())
    files = {name: f"pytorch_model-0000{index % 2 + 1}-of-00002.bin" for index, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: stored_weights()[name] for name in names if files[name] == file}, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    write_config(folder)
    return index


def test_bin_files_that_an_index_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = _bin_shards(tmp_path)
    command = 'python -c "import glob, torch; torch.save({'
    for path in (tmp_path, index, tmp_path / "pytorch_model-00001-of-00002.bin"):
        assert_refused(CheckpointError, f"one of several .bin files that an index lists|`{command}", path)
    shutil.copy(index, tmp_path / "model.safetensors.index.json")
    assert_refused(CheckpointError, command, tmp_path)
    # The command does what it says.
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(index)
    program = str(refused.value).partition('python -c "')[2].removesuffix('"`')
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    open_checkpoint(tmp_path / "whole.pt").close()


def test_one_shard_given_alone(tmp_path: Path) -> None:
    shard = sharded(tmp_path) / "model-00001-of-00002.safetensors"
    assert_refused(CheckpointError, f"one shard of several: give the folder {tmp_path}", shard)
    only = tmp_path / "only" / "model-00001-of-00001.safetensors"
    only.parent.mkdir()
    save_file(bare(), only)
    write_config(only.parent)
    open_checkpoint(only).close()


def test_folders(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert_refused(CheckpointError, "no model in this folder: expected a torch.save file", tmp_path)
    saved(tmp_path, stored_weights(), "step_1.pt")
    assert_refused(CheckpointError, "no model in this folder: give one of its files: step_1.pt", tmp_path)
    saved(tmp_path, stored_weights(), "pytorch_model.bin")
    open_checkpoint(tmp_path).close()
    for name, words in {
        "manifest.json": "is a bundle, which is exported already",
        "zero_to_fp32.py": "a DeepSpeed ZeRO checkpoint|python zero_to_fp32.py . whole",
        "model.gguf": "a GGUF file of llama.cpp",
    }.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        assert_refused(CheckpointError, words, folder)


# --- distributed runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves as one process of a distributed run of one does: a state dict of shards, and a checkpoint folder."""
    folder = tmp_path_factory.mktemp("distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weights = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in bare().items()}
        torch.save({"model": weights, "cfg": config_fields()}, folder / "rank_0.pt")
        dcp.save({"model": weights}, checkpoint_id=folder / "step_7" / "inner")
    finally:
        dist.destroy_process_group()
    return folder


def test_one_ranks_shard(shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = "is a DTensor: one rank's shard of a distributed run (FSDP)|get_model_state_dict(|full_state_dict=True"
    assert_refused(CheckpointError, words, shards / "rank_0.pt")
    assert capfd.readouterr().err == ""


def test_a_distributed_checkpoint(shards: Path, tmp_path: Path) -> None:
    folder = shards / "step_7" / "inner"
    command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} whole.pt"
    for path in (folder, shards / "step_7", folder / "__0_0.distcp", folder / ".metadata"):
        assert_refused(CheckpointError, f"torch.distributed checkpoint|`{command}`", path)
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    write_config(tmp_path)
    open_checkpoint(tmp_path / "whole.pt").close()


def test_a_sharded_tensor_is_told_without_running_its_code(tmp_path: Path) -> None:
    module, name = "torch.distributed._shard.sharded_tensor.api", "ShardedTensor"
    pickled = b"\x80\x02}X\x01\x00\x00\x00wc" + f"{module}\n{name}\n".encode() + b")\x81s."
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for record, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"model/{record}", content)
    assert_refused(CheckpointError, "is a ShardedTensor: one rank's shard|full_state_dict=True", path)


def test_arrays_are_told_by_their_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", w=np.ones(3))
    assert_refused(CheckpointError, "NumPy arrays (.npz)", tmp_path / "model.npz")


def test_files_that_bear_each_others_names_are_told(tmp_path: Path) -> None:
    save_file(bare(), tmp_path / "model.pt")
    torch.save(bare(), tmp_path / "model.safetensors")
    write_config(tmp_path)
    assert_refused(
        CheckpointError, "model.pt: is a safetensors file|rename it to end in .safetensors", tmp_path / "model.pt"
    )
    wrong = tmp_path / "model.safetensors"
    assert_refused(CheckpointError, "model.safetensors: is a torch.save file|rename it to end in .pt", wrong)
