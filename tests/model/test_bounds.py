"""No file, whatever stands in it, may wait for ever or take more memory and time than its size is worth."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES
from hostile_files import CHECKPOINTS, measured, sparse
from tiny_checkpoint import (
    OPEN_FIELDS,
    TINY,
    assert_refused,
    bare,
    saved,
    stored_weights,
    trainer_content,
    write_config,
)

from mythos_edge.model.bounded_files import open_regular, parse_json, read_bounded, read_json, size_text
from mythos_edge.model.errors import ConfigError
from mythos_edge.model.families.openmythos.config import config_from_dict
from mythos_edge.model.layers import rope_table
from mythos_edge.model.layout import recipes
from mythos_edge.model.pickle_bounds import check_pickle

# --- one file -----------------------------------------------------------------------------------------------------


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "some"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5, "a thing") == b"12345"
    with pytest.raises(OSError, match="has 5 bytes, a thing has at most 4 bytes"):
        read_bounded(path, 4, "a thing")


def test_a_size_that_is_not_known_is_found_out() -> None:
    assert os.stat("/proc/self/maps").st_size == 0
    with pytest.raises(OSError, match="has more than 10 bytes, a thing has at most 10 bytes"):
        read_bounded("/proc/self/maps", 10, "a thing")


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        ("Is a directory, expected a file", lambda path: path),
        ("is a device, expected a file", lambda path: "/dev/zero"),
        ("is a pipe, expected a file", lambda path: (os.mkfifo(path / "pipe"), path / "pipe")[1]),
        ("No such file", lambda path: path / "absent"),
    ],
)
def test_what_is_no_regular_file_is_not_opened(kind: str, made: Callable[[Path], Path], tmp_path: Path) -> None:
    path = made(tmp_path)
    with pytest.raises(OSError, match=kind):
        open_regular(path)


def test_a_pipe_that_takes_a_files_place_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    looked_at, before = os.stat(tmp_path / "file"), len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path: looked_at)
        with pytest.raises(OSError, match="is a pipe"):
            open_regular(tmp_path / "pipe")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (b'{"a": [1, 2.5, null]}', {"a": [1, 2.5, None]}),
        (b'\xef\xbb\xbf{"a": "\xc3\xa4"}', {"a": "ä"}),
        ('{"a": "ä"}'.encode("utf-16"), {"a": "ä"}),
    ],
)
def test_json_is_read_with_any_mark_before_it(data: bytes, values: object, tmp_path: Path) -> None:
    assert parse_json(data) == values
    (tmp_path / "some.json").write_bytes(data)
    assert read_json(tmp_path / "some.json", 100, "a config") == values


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' stands there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "decode"),
        (b"1" * 5000, "integer string"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_no_json_is_a_value_error(data: bytes, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        parse_json(data)


def test_sizes_are_told_in_the_unit_that_fits() -> None:
    sizes = (0, 999, 1000, 16_000_000, 23 * 10**9, 8 * 10**12)
    assert [size_text(size) for size in sizes] == ["0 bytes", "999 bytes", "1 kB", "16 MB", "23 GB", "8 TB"]


# --- checkpoints --------------------------------------------------------------------------------------------------


def test_hostile_checkpoints_are_one_line_in_little_memory_and_time(tmp_path: Path) -> None:
    paths = {name: make(tmp_path / name) for name, (_, make) in CHECKPOINTS.items()}
    found = measured(
        "mythos_edge.model.checkpoint", "open_checkpoint", list(paths.values()), warm=FIXTURES / "mla-small"
    )
    for name, path in paths.items():
        message = found["messages"][str(path)]
        assert CHECKPOINTS[name][0] in message, message
        assert message.startswith(str(path))
        assert "\n" not in message
    assert found["grown"] < 500e6
    assert found["seconds"] < 60


def test_hostile_configs_are_one_line_in_little_memory_and_time(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    words = {
        str(sparse(tmp_path / "huge.json", 23 * 10**9)): "has 23 GB, the config has at most 1 MB",
        str(tmp_path / "pipe.json"): "is a pipe",
        "/dev/zero": "is a device",
        str(tmp_path): "Is a directory",
    }
    good = write_config(tmp_path)
    found = measured("mythos_edge.model.json_files", "read_config_dict", list(words), warm=good)
    for path, word in words.items():
        assert word in found["messages"][path]
    assert found["grown"] < 100e6
    assert found["seconds"] < 10


@pytest.mark.parametrize(
    "name",
    ["n_experts", "prelude_layers", "coda_layers", "max_loop_iters", "n_shared_experts", "vocab_size", "dim"],
)
def test_absurd_sizes_of_a_model_are_refused_before_anything_is_made_of_them(name: str) -> None:
    fields = {**TINY, **OPEN_FIELDS, "attn_type": "mla"}
    for value in (10**10, 10**5000):
        with pytest.raises(ConfigError, match=f"{name} is .*, expected at most") as caught:
            config_from_dict({**fields, name: value}, origin="here")
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["rope_theta", "act_threshold"])
@pytest.mark.parametrize("value", [10**400, 1e39, float("inf"), float("nan"), -(10**400)])
def test_absurd_numbers_of_a_model_are_refused(name: str, value: float) -> None:
    fields = {**TINY, **OPEN_FIELDS, "attn_type": "mla"}
    with pytest.raises(ConfigError, match=f"{name} is .*, expected a finite number above 0"):
        config_from_dict({**fields, name: value}, origin="here")


def test_a_config_with_a_field_twice_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, stored_weights())
    (tmp_path / "twice.json").write_text('{"rope_theta": 1.0, "rope_theta": 2.0}')
    assert_refused(
        ConfigError, "twice.json: not valid JSON: the key 'rope_theta' stands there", path, tmp_path / "twice.json"
    )


# --- pickles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_large_honest_pickle_is_let_through(protocol: int) -> None:
    history = {"loss": [0.5 * step for step in range(100_000)], "names": [f"step {step}" for step in range(100_000)]}
    check_pickle(pickle.dumps(history, protocol))


def test_a_trainers_file_with_its_optimizer_is_let_through(tmp_path: Path) -> None:
    model = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(300))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(layer(torch.ones(2)).sum() for layer in model).backward()
    optimizer.step()
    path = saved(tmp_path, trainer_content(stored_weights(), optimizer=optimizer.state_dict(), note=b"bytes"))
    from mythos_edge.model.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        assert checkpoint.step == 7


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x02", b"\x80\x02X\xff\xff\xff\xffab", b"\x80\x02tR0)eh\x09."])
def test_a_damaged_pickle_is_a_value_error_or_left_to_torch(data: bytes) -> None:
    if data.endswith(b"."):
        check_pickle(data)
    else:
        with pytest.raises(ValueError, match=r"pickle|expected|exhausted|not enough data"):
            check_pickle(data)


# --- tables -------------------------------------------------------------------------------------------------------


def test_the_rotary_table_is_made_in_pieces_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mythos_edge.model.recipes.PIECE_BYTES", 1 << 12)
    config = config_from_dict({**TINY, **OPEN_FIELDS, "attn_type": "mla"}, origin="here")
    made = {
        recipe.name: list(recipe.pieces(None)) for recipe in recipes(config, 5000) if recipe.name.startswith("rope")
    }
    for name, whole in zip(("rope.cos", "rope.sin"), rope_table(config.rope_dim, 5000, config.rope_theta), strict=True):
        assert len(made[name]) > 1
        assert max(piece.nbytes for piece in made[name]) <= 1 << 12
        assert torch.equal(torch.cat(made[name]), whole)


def test_an_index_with_thousands_of_names_in_a_shard_is_read_once(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = bare()
    save_file(weights, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(weights, "one.safetensors")})
    )
    write_config(tmp_path)
    from mythos_edge.model.checkpoint import open_checkpoint

    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(weights)
