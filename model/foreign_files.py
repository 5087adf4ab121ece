"""Files that people give for a checkpoint and that are none: each is named as what it is, with what mends it.

One table a kind of evidence: the first bytes of a file, its name, the records of a zip archive, and what a folder
holds. Reads a few hundred bytes and, of an archive, its list of records; never a weight. Standard library only.
"""

import re
from pathlib import Path
from shlex import quote

from mythos_edge.model.bounded_files import open_regular
from mythos_edge.model.errors import CheckpointError
from mythos_edge.model.zip_records import zip_directory

_START_BYTES = 512
_DOWNLOAD = "download the file itself with `hf download REPO FILE`"
_UNPACK = "unpack it and give the checkpoint in it"
_DCP = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
_WHOLE_STATE = "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))"

# What a file begins with (after white space, in lower case for text), what it is, and what to do.
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a git-LFS pointer, not the file it stands for: run `git lfs pull` in its folder, or `hf download REPO`",
    ),
    (b"<!doctype html", f"a web page, not the file: {_DOWNLOAD}, or from the link with /resolve/ for /blob/"),
    (b"<html", f"a web page, not the file: {_DOWNLOAD}, or from the link with /resolve/ for /blob/"),
    (b"<?xml", f"an XML text, as servers answer in place of a file: {_DOWNLOAD}"),
    (b"gguf", "a GGUF file of llama.cpp, which cannot be read back: give the checkpoint that it was made from"),
    (b"\x93numpy", "a NumPy array, not a checkpoint: save model.state_dict() with torch.save"),
    (b"\x89hdf\r\n\x1a\n", "an HDF5 file, not a checkpoint of torch: save model.state_dict() with torch.save"),
    (b"\x1f\x8b", f"compressed with gzip: {_UNPACK} (`tar -xzf`, or `gunzip`)"),
    (b"\xfd7zxz\x00", f"compressed with xz: {_UNPACK} (`tar -xJf`, or `unxz`)"),
    (b"\x28\xb5\x2f\xfd", f"compressed with zstd: {_UNPACK} (`tar --zstd -xf`, or `unzstd`)"),
    (b"bzh", f"compressed with bzip2: {_UNPACK} (`tar -xjf`, or `bunzip2`)"),
    (b"7z\xbc\xaf\x27\x1c", f"a 7-Zip archive: {_UNPACK} (`7z x`)"),
)
_JSON = "a JSON file, not a checkpoint: give the checkpoint, and a config with --config"
_TAR = (257, b"ustar", f"a tar archive: {_UNPACK} (`tar -xf`)")

# What is told by the name of a file.
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.(bin|safetensors)$")
_NAMES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"\.distcp$|^\.metadata$"),
        f"a part of a torch.distributed checkpoint: `{_DCP} {{folder}} whole.pt` makes one file of its folder",
    ),
    (re.compile(r"\.onnx$"), "an ONNX model, not a checkpoint: give the checkpoint that it was exported from"),
    (re.compile(r"\.ckpt\.index$|\.data-\d{5}-of-\d{5}$"), "a part of a TensorFlow checkpoint: only torch's are read"),
    (re.compile(r"-\d{5}-of-\d{5}\.safetensors$"), "one shard of several: give the folder {folder}, with its index"),
)

# What a zip archive without torch.save's data.pkl holds.
_RECORDS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.npy$"), "an archive of NumPy arrays (.npz): save model.state_dict() with torch.save"),
    (re.compile(r"(^|/)(archive_format|models/.*\.json)$"), "a torch.export program: save model.state_dict() instead"),
    (re.compile(r""), f"a zip archive of files: {_UNPACK} (`unzip`)"),
)

# What a folder without a model of its own holds: a file name pattern, and what it means.
_FOLDERS: tuple[tuple[str, str], ...] = (
    ("manifest.json", "a bundle, which is exported already: give the checkpoint that it was made from"),
    (".metadata", f"a torch.distributed checkpoint: `{_DCP} {{path}} whole.pt` makes one file of it"),
    ("*/.metadata", f"around a torch.distributed checkpoint: `{_DCP} {{found_in}} whole.pt` makes one file of it"),
    ("zero_to_fp32.py", "a DeepSpeed ZeRO checkpoint: `cd {path} && python zero_to_fp32.py . whole` makes it whole"),
    ("*.gguf", "one with a GGUF file of llama.cpp: give the checkpoint that it was made from"),
)


def foreign_kind(start: bytes) -> str | None:
    """The kind of file that begins with ``start`` and what to do about it; None for one that is not known here."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, told in _BEGINNINGS:
        if text.startswith(beginning) or start.lower().startswith(beginning):
            return told
    offset, mark, told = _TAR
    return told if start[offset:].startswith(mark) else None


def refuse_foreign_file(path: Path, alone: bool = True) -> None:
    """Raises CheckpointError for a file that is empty, or known as something else than a whole checkpoint.

    A shard that is read with its index is not ``alone``.
    """
    with open_regular(path) as file:
        start = file.read(_START_BYTES)
    size = path.stat().st_size
    if not start:
        raise CheckpointError(f"{path}: is empty (0 bytes): the save or the copy did not end; save or copy it again")
    # A safetensors file begins with a number, which may look like any signature.
    named = path.name.endswith(".index.json")
    safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size
    told = None if named or safetensors else foreign_kind(start)
    if alone and safetensors and path.suffix != ".safetensors":
        told = "a safetensors file of another name: rename it to end in .safetensors"
    if told is None and not named and not safetensors and start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        told = _JSON
    shard = _SHARD.search(path.name) if alone else None
    if told is None and shard is not None and shard[3] == "bin" and int(shard[2]) > 1:
        told = bin_shards(path.parent)
    for pattern, meaning in _NAMES:
        if told is None and alone and pattern.search(path.name) and (shard is None or int(shard[2]) > 1):
            told = meaning.format(folder=quote(str(path.parent)))
    if told is None and start.startswith(b"PK\x03\x04"):
        told = _foreign_archive(path)
        if told is None and path.suffix == ".safetensors":
            told = "a torch.save file of another name: rename it to end in .pt"
    if told is not None:
        raise CheckpointError(f"{path}: is {told}")


def refuse_foreign_folder(path: Path) -> None:
    """Raises CheckpointError for a folder that is known as something else than one with a model."""
    for pattern, meaning in _FOLDERS:
        found = next(iter(sorted(path.glob(pattern))), None)
        if found is not None:
            raise CheckpointError(
                f"{path}: is {meaning.format(path=quote(str(path)), found_in=quote(str(found.parent)))}"
            )


def bin_shards(folder: Path) -> str:
    """The line on a model in several .bin files, with the command that makes one file of them."""
    merge = (
        "import glob, torch; torch.save({name: tensor "
        f"for file in glob.glob({str(folder / 'pytorch_model-*.bin')!r}) "
        "for name, tensor in torch.load(file, weights_only=True).items()}, 'whole.pt')"
    )
    return f'one of several .bin files that an index lists: make one file of them with `python -c "{merge}"`'


def distributed_tensor(what: str) -> str:
    """The line on a tensor of type ``what`` that holds one rank's part only."""
    return (
        f"is a {what}: one rank's shard of a distributed run (FSDP), not the whole tensor: save on all ranks what "
        f"{_WHOLE_STATE} gives (torch.distributed.checkpoint.state_dict)"
    )


def _foreign_archive(path: Path) -> str | None:
    """Tells a zip archive that torch.save did not write; None for one of torch.save, or a damaged one."""
    try:
        with open_regular(path) as file:
            names = [record.filename for record in zip_directory(file)]
    except (ValueError, OSError):
        return None
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program, not a state dict: save torch.jit.load(FILE).state_dict() with torch.save"
    if not names or any(name.endswith("data.pkl") for name in names):
        return None
    return next(told for pattern, told in _RECORDS if any(map(pattern.search, names)))
