import dataclasses
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mythos_edge.model.checkpoint import Checkpoint, expected_shapes, open_checkpoint
from mythos_edge.model.config import FIELD_NAMES
from mythos_edge.model.errors import CheckpointError, ConfigError
from mythos_edge.scripts.reference import open_mythos

TINY: dict[str, Any] = {
    "vocab_size": 19,
    "dim": 24,
    "n_heads": 3,
    "n_kv_heads": 1,
    "max_seq_len": 16,
    "max_loop_iters": 3,
    "prelude_layers": 1,
    "coda_layers": 2,
    "kv_lora_rank": 10,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "n_experts": 4,
    "n_shared_experts": 1,
    "n_experts_per_tok": 2,
    "expert_dim": 7,
    "lora_rank": 2,
}
# What no tensor shape tells.
OPEN_FIELDS = {"act_threshold": 0.99, "rope_theta": 500000.0}
WITHOUT_EXTRAS = ("head.weight", "freqs_cis", "freqs_cis_mla")

Weights = dict[str, Tensor]


@cache
def _model(attn_type: str, **changes: Any) -> Any:
    main = open_mythos()
    torch.manual_seed(0)
    return main.OpenMythos(main.MythosConfig(**(TINY | {"attn_type": attn_type} | changes)))


def _weights(attn_type: str = "mla", **changes: Any) -> Weights:
    """The upstream state dict, with head and rope tables."""
    return dict(_model(attn_type, **changes).state_dict())


def _bare(attn_type: str = "mla", **changes: Any) -> Weights:
    """The state dict as safetensors files have it."""
    weights = _weights(attn_type, **changes)
    return {name: value for name, value in weights.items() if name not in WITHOUT_EXTRAS}


def _fields(attn_type: str = "mla") -> dict[str, Any]:
    return dataclasses.asdict(_model(attn_type).cfg)


def _write_config(folder: Path, values: Mapping[str, Any] | None = None, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(_fields() if values is None else values))
    return path


def _saved(folder: Path, content: Any, name: str = "model.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def _safetensors_folder(folder: Path, weights: Weights, config: Mapping[str, Any] | None = None) -> Path:
    save_file(weights, folder / "model.safetensors")
    _write_config(folder, config)
    return folder


def _trainer(weights: Weights, **more: Any) -> dict[str, Any]:
    return {"step": 7, "model": weights, "cfg": _model("mla").cfg, "vocab_size": 19, **more}


def _assert_same(checkpoint: Checkpoint, weights: Weights) -> None:
    assert set(checkpoint.tensors) == set(weights) - set(WITHOUT_EXTRAS)
    for name in checkpoint.tensors:
        got = checkpoint.read(name)
        assert got.dtype == weights[name].dtype
        assert torch.equal(got, weights[name]), name


def _assert_refused(error: type[Exception], words: str, path: Path, config_path: Path | None = None) -> None:
    """Opening fails with one line that holds every one of ``words`` (separated by ``|``)."""
    with pytest.raises(error) as caught:
        open_checkpoint(path, config_path).close()
    message = str(caught.value)
    assert "\n" not in message
    for word in words.split("|"):
        assert word in message, message


# --- every kind of file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_trainer_file(tmp_path: Path, attn_type: str) -> None:
    model = _model(attn_type)
    optimizer = torch.optim.AdamW(model.parameters())
    content = {
        "step": 123,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "cfg": model.cfg,
        "vocab_size": 19,
    }
    with open_checkpoint(_saved(tmp_path, content, "step_0000123.pt")) as checkpoint:
        assert (checkpoint.kind, checkpoint.step) == ("trainer .pt", 123)
        fields = dataclasses.asdict(model.cfg)
        assert checkpoint.config.to_dict() == {name: fields[name] for name in FIELD_NAMES}
        _assert_same(checkpoint, _weights(attn_type))


def test_first_trainer_version_with_muon_and_adamw(tmp_path: Path) -> None:
    moments = {"state": {0: {"momentum_buffer": torch.zeros(5)}}}
    content = _trainer(_weights(), muon=moments, adamw=moments)
    # Fields that were added to the reference's config later.
    content["cfg"] = open_mythos().MythosConfig(**_fields())
    del content["cfg"].__dict__["dropout"], content["cfg"].__dict__["max_output_tokens"]
    with open_checkpoint(_saved(tmp_path, content)) as checkpoint:
        assert checkpoint.kind == "trainer .pt"
        _assert_same(checkpoint, _weights())


def test_fsdp_file_with_head_stored_apart(tmp_path: Path) -> None:
    weights = _weights()
    weights["head.weight"] = weights["embed.weight"].clone()
    with open_checkpoint(_saved(tmp_path, _trainer(weights, optimizer={}))) as checkpoint:
        _assert_same(checkpoint, weights)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"model": weights},
        lambda weights: {"state_dict": weights},
        lambda weights: {"model": weights, "cfg": _model("mla").cfg},
        lambda weights: {"model": weights, "cfg": _fields()},
    ],
)
@pytest.mark.parametrize("name", ["model.pth", "model.bin"])
def test_state_dict_shells(tmp_path: Path, wrap: Callable[[Weights], Any], name: str) -> None:
    _write_config(tmp_path, OPEN_FIELDS)
    with open_checkpoint(_saved(tmp_path, wrap(_weights()), name)) as checkpoint:
        assert checkpoint.step is None
        _assert_same(checkpoint, _weights())


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "_fsdp_wrapped_module.",
        "module._orig_mod.",
        "_orig_mod.model.module.",
    ],
)
def test_prefixes(tmp_path: Path, prefix: str) -> None:
    _write_config(tmp_path)
    path = _saved(tmp_path, {prefix + name: value for name, value in _weights().items()})
    with open_checkpoint(path) as checkpoint:
        _assert_same(checkpoint, _weights())


def test_wrapper_inside_a_name(tmp_path: Path) -> None:
    _write_config(tmp_path)
    renamed = {name.replace("block.", "block._fsdp_wrapped_module."): t for name, t in _weights().items()}
    with open_checkpoint(_saved(tmp_path, renamed)) as checkpoint:
        _assert_same(checkpoint, _weights())


def test_parameters_and_cuda_locations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
    weights = {n: torch.nn.Parameter(t, requires_grad=False) for n, t in _bare().items()}
    path = _saved(tmp_path, _trainer(weights))
    with open_checkpoint(path) as checkpoint:
        _assert_same(checkpoint, _bare())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_in_both_formats(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: value.to(dtype) for name, value in _bare().items()}
    for path in (_safetensors_folder(tmp_path, weights), _saved(tmp_path, weights)):
        with open_checkpoint(path) as checkpoint:
            _assert_same(checkpoint, weights)


def test_safetensors_file_and_folder(tmp_path: Path) -> None:
    folder = _safetensors_folder(tmp_path, _bare())
    for path in (folder, folder / "model.safetensors"):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.kind == "safetensors"
            assert checkpoint.n_parameters == sum(value.numel() for value in _bare().values())
            assert checkpoint.total_bytes == 4 * checkpoint.n_parameters
            _assert_same(checkpoint, _bare())


def test_safetensors_with_head_and_rope_tables(tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in _weights().items()}
    with open_checkpoint(_safetensors_folder(tmp_path, weights)) as checkpoint:
        _assert_same(checkpoint, weights)


def _sharded(folder: Path) -> Path:
    names = list(_bare())
    files = {name: f"model-0000{index % 2 + 1}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: _bare()[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    _write_config(folder)
    return folder


def test_sharded_safetensors(tmp_path: Path) -> None:
    folder = _sharded(tmp_path)
    for path in (folder, folder / "model.safetensors.index.json"):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.kind == "sharded safetensors"
            _assert_same(checkpoint, _bare())


# --- reading ------------------------------------------------------------------------------------------------


def test_read_returns_row_ranges_in_fresh_memory(tmp_path: Path) -> None:
    embed = _bare()["embed.weight"]
    for path in (_safetensors_folder(tmp_path, _bare()), _saved(tmp_path, _weights())):
        with open_checkpoint(path) as checkpoint:
            assert torch.equal(checkpoint.read("embed.weight", 3, 11), embed[3:11])
            assert torch.equal(checkpoint.read("embed.weight", 17), embed[17:])
            assert checkpoint.read("embed.weight", 5, 5).shape == (0, 24)
            checkpoint.read("embed.weight").zero_()
            assert torch.equal(checkpoint.read("embed.weight"), embed)


def test_tensors_that_share_a_storage(tmp_path: Path) -> None:
    weights = _bare()
    together = torch.arange(48.0)
    weights["norm.weight"], weights["recurrent.norm.weight"] = together[:24], together[24:]
    _write_config(tmp_path)
    with open_checkpoint(_saved(tmp_path, weights)) as checkpoint:
        _assert_same(checkpoint, weights)


def test_file_cut_while_open(tmp_path: Path) -> None:
    folder = _safetensors_folder(tmp_path, _bare())
    with open_checkpoint(folder) as checkpoint:
        os.truncate(folder / "model.safetensors", 20_000)
        with pytest.raises(CheckpointError, match="ends inside"):
            [checkpoint.read(name) for name in checkpoint.tensors]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts read bytes the Linux way")
def test_optimizer_state_is_never_read(tmp_path: Path) -> None:
    """Opening and reading everything reads and maps far fewer bytes than the optimizer state has."""
    optimizer = {"state": {0: {"exp_avg": torch.ones(2_000_000), "exp_avg_sq": torch.ones(2_000_000)}}}
    path = _saved(tmp_path, _trainer(_bare(), optimizer=optimizer))
    open_checkpoint(path).close()  # whatever Python still has to import is read here
    before = _read_bytes()
    with open_checkpoint(path) as checkpoint:
        _assert_same(checkpoint, _bare())
        assert str(path) not in Path("/proc/self/maps").read_text()
        assert _read_bytes() - before < checkpoint.total_bytes + 500_000
    assert path.stat().st_size > 16_000_000


def _read_bytes() -> int:
    counted = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert counted
    return int(counted[1])


# --- config -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_config_from_shapes_but_for_two_fields(tmp_path: Path, attn_type: str) -> None:
    path = _saved(tmp_path, _weights(attn_type))
    _assert_refused(ConfigError, "model.pt: missing config field act_threshold, rope_theta;|--config", path)
    extra = _write_config(tmp_path, OPEN_FIELDS, "extra.json")
    with open_checkpoint(path, extra) as checkpoint:
        unused = {"n_kv_heads"} if attn_type == "mla" else {n for n in FIELD_NAMES if "lora_r" in n or "_h" in n}
        for name in set(FIELD_NAMES) - unused - set(OPEN_FIELDS):
            assert getattr(checkpoint.config, name) == _fields(attn_type)[name], name


def test_open_fields_without_rope_table_and_shared_experts(tmp_path: Path) -> None:
    path = _saved(tmp_path, _bare("gqa", n_shared_experts=0))
    missing = "n_heads, n_kv_heads, max_seq_len, n_experts_per_tok, act_threshold, rope_theta;"
    _assert_refused(ConfigError, f"missing config field {missing}", path)
    # The key heads follow from n_heads.
    given = OPEN_FIELDS | {"n_heads": 3, "max_seq_len": 16, "n_experts_per_tok": 2}
    with open_checkpoint(path, _write_config(tmp_path, given, "extra.json")) as checkpoint:
        assert (checkpoint.config.n_kv_heads, checkpoint.config.n_shared_experts) == (1, 0)


def test_config_sources_in_order(tmp_path: Path) -> None:
    path = _saved(tmp_path, {"model": _weights(), "cfg": {"act_threshold": 0.5}})
    _write_config(tmp_path, OPEN_FIELDS | {"rope_theta": 7.0, "max_seq_len": 12})
    extra = _write_config(tmp_path, {"rope_theta": 8.0}, "extra.json")
    with open_checkpoint(path, extra) as checkpoint:
        config = checkpoint.config
        assert (config.act_threshold, config.rope_theta, config.max_seq_len) == (0.5, 8.0, 12)


def test_complete_config_ignores_what_lies_beside(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("not ours")
    with open_checkpoint(_saved(tmp_path, _trainer(_weights()))) as checkpoint:
        assert checkpoint.config.rope_theta == 500000.0


@pytest.mark.parametrize(
    ("name", "value", "in_weights"),
    [
        ("dim", 32, 24),
        ("n_heads", 4, 3),
        ("prelude_layers", 3, 1),
        ("max_loop_iters", 9, 3),
        ("attn_type", "gqa", "'mla'"),
        ("n_experts_per_tok", 1, 2),
        ("qk_rope_head_dim", 8, 4),
    ],
)
def test_config_contradicts_weights(tmp_path: Path, name: str, value: Any, in_weights: Any) -> None:
    folder = _safetensors_folder(tmp_path, _bare(), _fields() | {name: value, "n_kv_heads": 1})
    words = f"config.json: {name} is {value!r}, but the weights have {in_weights}"
    _assert_refused(ConfigError, words, folder)


def test_rope_table_betrays_a_wrong_head_count(tmp_path: Path) -> None:
    extra = _write_config(tmp_path, _fields("gqa") | {"n_heads": 4}, "extra.json")
    words = "extra.json: n_heads is 4, but the weights have 3"
    _assert_refused(ConfigError, words, _saved(tmp_path, _weights("gqa")), extra)


def test_bad_config_files(tmp_path: Path) -> None:
    path = _saved(tmp_path, _weights())
    _assert_refused(ConfigError, "absent.json: can not read", path, tmp_path / "absent.json")
    wrong = _write_config(tmp_path, OPEN_FIELDS | {"colour": 1}, "wrong.json")
    _assert_refused(ConfigError, "wrong.json: unknown config field colour", path, wrong)
    wrong = _write_config(tmp_path, OPEN_FIELDS | {"dim": "24"}, "wrong.json")
    _assert_refused(ConfigError, "wrong.json: dim is '24', expected an integer", path, wrong)
    path = _saved(tmp_path, {"model": _weights(), "cfg": [1]})
    _assert_refused(CheckpointError, "cfg is a list", path)


# --- tensors that are wrong ---------------------------------------------------------------------------------


def _changed(folder: Path, **changes: Tensor | None) -> Path:
    """A state dict with tensors replaced or (None) taken away; ``__`` stands for a dot."""
    weights = _weights()
    for name, value in changes.items():
        weights.pop(name.replace("__", "."), None)
        if value is not None:
            weights[name.replace("__", ".")] = value
    _write_config(folder)
    return _saved(folder, weights)


def test_unknown_tensors(tmp_path: Path) -> None:
    path = _changed(tmp_path, **{f"extra{index}": torch.zeros(1) for index in range(7)})
    _assert_refused(CheckpointError, "unknown tensors extra0, extra1, extra2, extra3, extra4 and 2 more", path)


def test_missing_tensors(tmp_path: Path) -> None:
    path = _changed(tmp_path, norm__weight=None, recurrent__injection__B=None)
    _assert_refused(CheckpointError, "missing tensors recurrent.injection.B, norm.weight;", path)
    path = _changed(tmp_path, embed__weight=None)
    _assert_refused(CheckpointError, "not a whole OpenMythos model: missing embed.weight", path)


def test_another_model(tmp_path: Path) -> None:
    path = _saved(tmp_path, {"conv.weight": torch.zeros(3, 3)})
    _assert_refused(CheckpointError, "not a whole OpenMythos model|the file holds conv.weight", path)


def test_moda_checkpoint(tmp_path: Path) -> None:
    weights = {"embed.weight": torch.zeros(4, 4), "blocks.0.moe.gate.weight": torch.zeros(2, 4)}
    _assert_refused(CheckpointError, "moda.py|blocks.0.moe|without a loop", _saved(tmp_path, weights))


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
    _assert_refused(CheckpointError, words, _changed(tmp_path, **changes))


def test_head_that_differs_in_one_late_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two rows a piece, so that the comparison has to go on past the first piece.
    monkeypatch.setattr("mythos_edge.model.checkpoint._COMPARE_BYTES", 2 * 24 * 8)
    head = _weights()["embed.weight"].clone()
    with open_checkpoint(_changed(tmp_path, head__weight=head)):
        pass
    head[17, 23] += 1
    _assert_refused(CheckpointError, "rows 16:18", _changed(tmp_path, head__weight=head))


# --- files that are wrong -----------------------------------------------------------------------------------


def test_absent_and_foreign_paths(tmp_path: Path) -> None:
    _assert_refused(CheckpointError, "absent.pt: no such file: expected a torch.save file", tmp_path / "absent.pt")
    _assert_refused(CheckpointError, "no model in this folder|model.safetensors.index.json", tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    _assert_refused(CheckpointError, "neither a torch.save nor a safetensors file", tmp_path / "notes.txt")
    _assert_refused(CheckpointError, "holds a list, expected a state dict", _saved(tmp_path, [1, 2]))


def test_old_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(_weights(), path, _use_new_zipfile_serialization=False)
    _assert_refused(CheckpointError, "without zip container|weights_only=True|torch.save it again", path)


class _Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("where", ["model", "optimizer", "cfg", "alone"])
def test_code_in_a_pickle_is_named_and_does_not_run(tmp_path: Path, where: str) -> None:
    trace = tmp_path / "executed"
    content = _Evil(trace) if where == "alone" else _trainer(_weights()) | {where: {"a": _Evil(trace)}}
    path = _saved(tmp_path, content)
    _assert_refused(CheckpointError, ".mkdir, which was not run", path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the test's own file is harmless, so it proves nothing"


@pytest.mark.parametrize("kept", [3, 100, 0.5, 0.99])
def test_truncated_torch_file(tmp_path: Path, kept: float) -> None:
    path = _saved(tmp_path, _weights())
    os.truncate(path, int(kept * path.stat().st_size) if kept < 1 else int(kept))
    _assert_refused(CheckpointError, "model.pt: truncated" if kept > 3 or kept < 1 else "neither", path)


def _repacked(path: Path, compression: int, **replaced: bytes) -> Path:
    """The same zip written by another tool, with records replaced by the end of their name."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compression) as new:
        for info in old.infolist():
            record = info.filename.partition("/")[2]
            new.writestr(info.filename, replaced.get(record.partition(".")[0], old.read(info)))
    path.write_bytes(out.getvalue())
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_repacked_torch_file(tmp_path: Path, compression: int) -> None:
    path = _repacked(_changed(tmp_path), compression)
    _assert_refused(CheckpointError, "not where torch.save puts them|torch.save it again", path)


def test_damaged_torch_records(tmp_path: Path) -> None:
    _assert_refused(CheckpointError, "big-endian", _repacked(_changed(tmp_path), 0, byteorder=b"big"))
    path = _repacked(_changed(tmp_path), 0, data=b"\x80\x02garbage")
    _assert_refused(CheckpointError, "can not be unpickled safely", path)


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
    _assert_refused(CheckpointError, f"model.safetensors: |{words}", tmp_path)


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
    path = _sharded(tmp_path) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))
    _assert_refused(CheckpointError, words, tmp_path)


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_expected_shapes_are_the_references(attn_type: str, tmp_path: Path) -> None:
    with open_checkpoint(_saved(tmp_path, _trainer(_bare(attn_type)) | {"cfg": _fields(attn_type)})) as checkpoint:
        shapes = {name: tuple(value.shape) for name, value in _bare(attn_type).items()}
        assert expected_shapes(checkpoint.config) == shapes
