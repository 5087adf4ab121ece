"""Checkpoints that are refused, each in one line that names what is wrong."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import Evil, assert_refused, saved, sharded, stored_weights, trainer_content, write_config
from torch import Tensor

from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import CheckpointError

# --- tensors that are wrong ---------------------------------------------------------------------------------------


def _changed(folder: Path, **changes: Tensor | None) -> Path:
    """A state dict with tensors replaced or (None) taken away; ``__`` stands for a dot."""
    weights = stored_weights()
    for name, value in changes.items():
        weights.pop(name.replace("__", "."), None)
        if value is not None:
            weights[name.replace("__", ".")] = value
    write_config(folder)
    return saved(folder, weights)


def test_unknown_tensors(tmp_path: Path) -> None:
    path = _changed(tmp_path, **{f"extra{index}": torch.zeros(1) for index in range(7)})
    assert_refused(CheckpointError, "unknown tensors extra0, extra1, extra2, extra3, extra4 and 2 more", path)


def test_missing_tensors(tmp_path: Path) -> None:
    path = _changed(tmp_path, norm__weight=None, recurrent__injection__B=None)
    assert_refused(CheckpointError, "missing tensors recurrent.injection.B, norm.weight;", path)
    path = _changed(tmp_path, embed__weight=None)
    assert_refused(CheckpointError, "not a whole OpenMythos model: missing embed.weight", path)


def test_another_model(tmp_path: Path) -> None:
    path = saved(tmp_path, {"conv.weight": torch.zeros(3, 3)})
    assert_refused(CheckpointError, "of no family that is known (openmythos, |the file holds conv.weight", path)


def test_moda_checkpoint(tmp_path: Path) -> None:
    weights = {"embed.weight": torch.zeros(4, 4), "blocks.0.moe.gate.weight": torch.zeros(2, 4)}
    assert_refused(CheckpointError, "moda.py|blocks.0.moe|without a loop", saved(tmp_path, weights))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm__weight": torch.zeros(25)}, "norm.weight has shape (25,), expected (24,)"),
        ({"embed__weight": torch.zeros(19)}, "embed.weight has shape (19,), expected 2 axes"),
        ({"norm__weight": torch.zeros(24, dtype=torch.int64)}, "norm.weight has dtype torch.int64, expected"),
        ({"norm__weight": torch.zeros(48)[::2]}, "norm.weight is stored transposed, strided"),
        (
            {"recurrent__lora__B": torch.zeros(24, 2).t()},
            "recurrent.lora.B is stored transposed|contiguous()",
        ),
        ({"norm__weight": torch.zeros(24).to_sparse()}, "norm.weight is stored transposed, strided, sparse"),
        ({"head__weight": torch.zeros(19, 24)}, "head.weight differs from embed.weight|untied"),
        ({"head__weight": torch.zeros(18, 24)}, "head.weight has shape (18, 24), expected (19, 24)"),
        (
            {"module__norm__weight": torch.zeros(24)},
            "norm.weight and module.norm.weight are both norm.weight",
        ),
        ({"note": "a string"}, "'note' is a str, expected only named tensors"),
    ],
)
def test_wrong_tensor(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert_refused(CheckpointError, words, _changed(tmp_path, **changes))


def test_head_that_differs_in_one_late_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two rows a piece, so that the comparison has to go on past the first piece.
    monkeypatch.setattr("mythos_edge.model.families.openmythos.opening._COMPARE_BYTES", 2 * 24 * 8)
    head = stored_weights()["embed.weight"].clone()
    with open_checkpoint(_changed(tmp_path, head__weight=head)):
        pass
    head[17, 23] += 1
    assert_refused(CheckpointError, "rows 16:18", _changed(tmp_path, head__weight=head))


# --- files that are wrong -----------------------------------------------------------------------------------------


def test_absent_and_foreign_paths(tmp_path: Path) -> None:
    assert_refused(CheckpointError, "absent.pt: no such file: expected a torch.save file", tmp_path / "absent.pt")
    assert_refused(CheckpointError, "no model in this folder|model.safetensors.index.json", tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert_refused(CheckpointError, "neither a torch.save nor a safetensors file", tmp_path / "notes.txt")
    assert_refused(CheckpointError, "holds a list, expected a state dict", saved(tmp_path, [1, 2]))


def test_old_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(stored_weights(), path, _use_new_zipfile_serialization=False)
    assert_refused(CheckpointError, "without zip container|weights_only=True|torch.save it again", path)


@pytest.mark.parametrize("where", ["model", "optimizer", "cfg", "alone"])
def test_code_in_a_pickle_is_named_and_does_not_run(tmp_path: Path, where: str) -> None:
    trace = tmp_path / "executed"
    content = Evil(trace) if where == "alone" else trainer_content(stored_weights()) | {where: {"a": Evil(trace)}}
    path = saved(tmp_path, content)
    assert_refused(CheckpointError, ".mkdir, which was not run", path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the test's own file is harmless, so it proves nothing"


@pytest.mark.parametrize("kept", [3, 100, 0.5, 0.99])
def test_truncated_torch_file(tmp_path: Path, kept: float) -> None:
    path = saved(tmp_path, stored_weights())
    os.truncate(path, int(kept * path.stat().st_size) if kept < 1 else int(kept))
    assert_refused(CheckpointError, "model.pt: truncated" if kept > 3 or kept < 1 else "neither", path)


@pytest.mark.parametrize("offset", [1 << 40, (1 << 63) - 20, 1 << 63, (1 << 64) - 1])
def test_records_that_are_said_to_lie_beyond_the_file(tmp_path: Path, offset: int) -> None:
    path = saved(tmp_path, stored_weights())
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"so that the directory is written anew"
        archive.infolist()[-1].header_offset = offset
    assert_refused(CheckpointError, "model.pt: truncated or damaged", path)


def _repacked(path: Path, compression: int, **replaced: bytes) -> Path:
    """The same zip written by another tool, with records replaced by the end of their name."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compression) as new:
        for info in old.infolist():
            record = info.filename.partition("/")[2]
            new.writestr(info.filename, replaced.get(record.partition(".")[0], old.read(info)))
    path.write_bytes(out.getvalue())
    return path


def test_records_that_are_said_to_lie_before_the_file(tmp_path: Path) -> None:
    path = _repacked(_changed(tmp_path), zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    # Where the directory is said to begin: zipfile moves all records by what that is off.
    at = data.rindex(b"PK\x05\x06") + 16
    data[at : at + 4] = (int.from_bytes(data[at : at + 4], "little") + 100).to_bytes(4, "little")
    path.write_bytes(data)
    assert_refused(CheckpointError, "model.pt: truncated or damaged", path)


def test_repacked_torch_file(tmp_path: Path) -> None:
    path = _repacked(_changed(tmp_path), zipfile.ZIP_STORED)
    assert_refused(CheckpointError, "not where torch.save puts them|torch.save it again", path)
    path = _repacked(_changed(tmp_path), zipfile.ZIP_DEFLATED)
    assert_refused(CheckpointError, "is compressed or encrypted|torch.save it again", path)


def test_damaged_torch_records(tmp_path: Path) -> None:
    assert_refused(CheckpointError, "big-endian", _repacked(_changed(tmp_path), 0, byteorder=b"big"))
    path = _repacked(_changed(tmp_path), 0, data=b"\x80\x02garbage")
    assert_refused(CheckpointError, "cannot be unpickled safely", path)


def _safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x01\x02", "truncated or not safetensors: 2 bytes"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "truncated or not safetensors"),
        (_safetensors_bytes(b"{nope"), "bad JSON header"),
        (_safetensors_bytes(b"[" * 100_000), "bad JSON header"),
        (_safetensors_bytes([1]), "expected an object, got list"),
        (_safetensors_bytes({"w": 3}), "entry of w is malformed"),
        (_safetensors_bytes(_entry(shape=[-2])), "entry of w is malformed"),
        (_safetensors_bytes(_entry(dtype=["F32"])), "entry of w is malformed"),
        (_safetensors_bytes(_entry(dtype="F31")), "w has unknown dtype 'F31'"),
        (_safetensors_bytes(_entry(), b"1234567"), "truncated or damaged: w should be 8 bytes"),
        (_safetensors_bytes(_entry(data_offsets=[8, 0]), bytes(8)), "truncated or damaged: w"),
        (_safetensors_bytes(_entry(shape=[3]), bytes(8)), "w should be 12 bytes"),
    ],
)
def test_damaged_safetensors(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert_refused(CheckpointError, f"model.safetensors: |{words}", tmp_path)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda index: index.pop("weight_map"), "no weight_map"),
        (lambda index: index["weight_map"].update(x="../other.safetensors"), "not a plain file name"),
        (lambda index: index["weight_map"].update(x="gone.safetensors"), "shard gone.safetensors is missing"),
        (
            lambda index: index["weight_map"].update(x=index["weight_map"]["embed.weight"]),
            "x should be in model-00001-of-00002.safetensors",
        ),
    ],
)
def test_damaged_index(tmp_path: Path, edit: Callable[[Any], object], words: str) -> None:
    path = sharded(tmp_path) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))
    assert_refused(CheckpointError, words, tmp_path)
