"""Files of public trainers: where the tensors are, where the config is, and what else lies in them."""

import argparse
import pathlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoint import (
    OPEN_FIELDS,
    Weights,
    assert_refused,
    assert_same,
    bare,
    config_fields,
    safetensors_folder,
    saved,
    sharded,
    stored_weights,
    tiny_model,
    trainer_content,
    write_config,
)

from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import CheckpointError, ConfigError
from mythos_edge.model.tensor_choice import TENSOR_KEYS

TRAINING = {"batch_size": 8, "lr": 3e-4, "grad_accum": 2}


def _opens(path: Path, weights: Weights | None = None, config: Path | None = None, **options: Any) -> tuple[str, ...]:
    """The notes of a checkpoint that opens with the weights and the tiny config."""
    with open_checkpoint(path, config, **options) as checkpoint:
        assert_same(checkpoint, stored_weights() if weights is None else weights)
        assert {name: getattr(checkpoint.config, name) for name in OPEN_FIELDS} == OPEN_FIELDS
        return checkpoint.notes


def _moved(weights: Weights) -> Weights:
    return {name: value + 1 if value.is_floating_point() else value for name, value in weights.items()}


# --- where the tensors are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", TENSOR_KEYS)
def test_keys_that_trainers_use(tmp_path: Path, key: str) -> None:
    content = {"epoch": 3, key: stored_weights(), "optimizer_state_dict": {"state": {0: torch.ones(3)}}, "loss": 1.0}
    assert _opens(saved(tmp_path, content | {"cfg": config_fields()})) == ()
    write_config(tmp_path)
    assert _opens(saved(tmp_path, {f"{key}.{name}": value for name, value in stored_weights().items()})) == ()


def test_nested_keys(tmp_path: Path) -> None:
    content = {"ema": {"decay": 0.99, "module": stored_weights()}, "cfg": config_fields()}
    assert _opens(saved(tmp_path, content)) == ()


@pytest.mark.parametrize("wrap", [dict, lambda weights: {"ema": weights}, lambda weights: {"model": weights}])
def test_the_counter_of_an_average_is_no_tensor_of_the_model(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(tiny_model("mla"))
    averaged.update_parameters(tiny_model("mla"))
    assert "n_averaged" in averaged.state_dict()
    write_config(tmp_path)
    assert _opens(saved(tmp_path, wrap(averaged.state_dict()))) == ()


def test_what_was_trained_goes_before_its_average_and_that_is_told(tmp_path: Path) -> None:
    ema = _moved(stored_weights())
    path = saved(tmp_path, trainer_content(stored_weights(), ema=ema, shadow={"a": _moved(ema)}))
    note = f"{path}: took the tensors of model; ema, shadow.a hold a model, too: --key ema takes that"
    assert _opens(path) == (note,)
    write_config(tmp_path)
    for key, weights in {"ema": ema, "shadow.a": _moved(ema), "model": stored_weights()}.items():
        assert _opens(path, weights, key=key) == ()


def test_the_same_tensors_twice_are_one_model(tmp_path: Path) -> None:
    weights = stored_weights()
    assert _opens(saved(tmp_path, trainer_content(weights, state_dict=dict(weights)))) == ()


def test_a_key_that_no_trainer_uses_is_named_and_taken_with_key(tmp_path: Path) -> None:
    content = {"generator": stored_weights(), "critic": {"w": torch.ones(2)}, "cfg": config_fields()}
    path = saved(tmp_path, content)
    assert_refused(
        CheckpointError, "no model under a known key (model, state_dict|generator: take it with --key g", path
    )
    assert _opens(path, key="generator") == ()
    path = saved(tmp_path, {"critic": {"w": torch.ones(2)}, "outer": {"inner": {"v": torch.ones(2)}}})
    assert_refused(CheckpointError, "tensors under critic, outer.inner: name the model's with --key NAME", path)
    with pytest.raises(CheckpointError, match=r"no tensors under the key 'nope': there are critic, outer\.inner$"):
        open_checkpoint(path, key="nope")


def test_a_model_key_of_another_network(tmp_path: Path) -> None:
    content = trainer_content({"w": torch.ones(2)}) | {"weights": stored_weights()}
    assert _opens(saved(tmp_path, content)) == ()


def test_a_key_may_be_the_beginning_of_names(tmp_path: Path) -> None:
    ema = _moved(bare())
    both = {f"online.{name}": value for name, value in bare().items()}
    both |= {f"shadow.model.{name}": value for name, value in ema.items()}
    write_config(tmp_path)
    path = saved(tmp_path, {"state_dict": both})
    assert_refused(CheckpointError, "not a whole OpenMythos model|online.embed.weight", path)
    flat = tmp_path / "model.safetensors"
    save_file(both, flat)
    for file, start in ((path, "state_dict."), (path, ""), (flat, "")):
        if file == path and not start:
            continue
        assert _opens(file, ema, key=f"{start}shadow") == ()
        assert _opens(file, bare(), key=f"{start}online") == ()
    with pytest.raises(CheckpointError, match="no tensors under the key 'nope': there are online, shadow"):
        open_checkpoint(flat, key="nope")


def test_two_models_in_one_state_dict(tmp_path: Path) -> None:
    both = {f"{start}.{name}": value for start in ("model", "ema") for name, value in bare().items()}
    assert_refused(CheckpointError, "are both|keep one model, or name one with --key", saved(tmp_path, both))


def test_a_raw_state_dict_wins_over_what_lies_in_it(tmp_path: Path) -> None:
    path = saved(tmp_path, stored_weights() | {"note": "x"})
    assert_refused(CheckpointError, "'note' is a str, expected only named tensors", path)


# --- what else lies in the file -----------------------------------------------------------------------------------


def test_options_and_numbers_of_trainers_are_no_code(tmp_path: Path) -> None:
    options = argparse.Namespace(lr=0.1, out=pathlib.Path("runs"), inner=types.SimpleNamespace(seed=1))
    content = trainer_content(stored_weights(), args=options, best=np.float64(0.5), seen=np.int64(3))
    path = saved(tmp_path, content)
    assert _opens(path) == (f"args of {path}: left out inner, lr, out, which tells nothing of the model",)


@pytest.mark.parametrize(("whole", "real"), [(np.int64, np.float64), (np.uint16, np.float32)])
def test_a_config_of_numpy_scalars_is_one_of_numbers(whole: type, real: type, tmp_path: Path) -> None:
    kinds = {int: whole, float: real}
    numbers = {name: kinds.get(type(value), str)(value) for name, value in config_fields().items()}
    with open_checkpoint(saved(tmp_path, {"model": stored_weights(), "config": numbers})) as opened:
        found = opened.config.to_dict()
    assert found == {name: numbers[name] for name in found}
    assert {type(value) for value in found.values()} == {int, float, str}


@pytest.mark.parametrize("value", [np.arange(3), np.dtype("int64"), np.array([7], ">i8")[0], np.str_("8")])
def test_a_config_of_other_objects_of_numpy_is_refused_in_words(value: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": stored_weights(), "config": config_fields() | {"dim": value}})
    assert_refused(ConfigError, "dim", path)


# --- where the config is ------------------------------------------------------------------------------------------


def _lightning(fields: dict[str, Any]) -> dict[str, Any]:
    weights = {f"model.{name}": value for name, value in stored_weights().items()}
    return {"state_dict": weights, "hyper_parameters": {"cfg": fields, "lr": 0.1}, "global_step": 5}


@pytest.mark.parametrize(
    "content",
    [
        {"model": stored_weights(), "config": config_fields()},
        {"model": stored_weights(), "model_args": config_fields()},
        {"model": stored_weights(), "cfg": {"model": "tiny"} | TRAINING, "config": config_fields()},
        {"model": stored_weights(), "args": argparse.Namespace(**config_fields())},
        _lightning(config_fields()),
        _lightning(config_fields()) | {"hyper_parameters": {"cfg": tiny_model("mla").cfg}},
    ],
)
def test_configs_of_trainers(tmp_path: Path, content: dict[str, Any]) -> None:
    _opens(saved(tmp_path, content))


def test_training_options_do_no_harm_where_another_source_is_complete(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": stored_weights(), "cfg": TRAINING})
    left_out = f"cfg of {path}: left out batch_size, grad_accum, lr, which tells nothing of the model"
    assert_refused(ConfigError, f"missing config field act_threshold|{left_out}", path)
    assert _opens(path, config=write_config(tmp_path, name="complete.json")) == (left_out,)
    write_config(tmp_path)
    assert _opens(path) == (left_out,)


def test_options_among_fields_are_named_and_cannot_contradict_the_weights(tmp_path: Path) -> None:
    mixed = OPEN_FIELDS | TRAINING | {"lora_rank": 64, "n_heads": "8", "max_seq_len": 12}
    path = saved(tmp_path, {"model": stored_weights(), "cfg": mixed})
    note = f"cfg of {path}: left out batch_size, grad_accum, lr, lora_rank, n_heads, which tells nothing of the model"
    assert _opens(path) == (note,)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.max_seq_len == 12
    # Without foreign options it is the model's own config, and is held to the weights.
    path = saved(tmp_path, {"model": stored_weights(), "cfg": OPEN_FIELDS | {"lora_rank": 64}})
    assert_refused(ConfigError, "cfg of|lora_rank is 64, but the weights have 2", path)


def test_unknown_fields_of_the_strongest_file_are_refused_those_of_weaker_named(tmp_path: Path) -> None:
    path = saved(tmp_path, stored_weights())
    beside = write_config(tmp_path, OPEN_FIELDS | {"n_layers": 3})
    assert_refused(ConfigError, f"{beside}: unknown config field n_layers", path)
    strong = write_config(tmp_path, {"act_threshold": 0.99}, "strong.json")
    assert _opens(path, config=strong)[0] == f"{beside}: left out n_layers, which tells nothing of the model"
    strong = write_config(tmp_path, OPEN_FIELDS | {"n_layers": 3}, "strong.json")
    assert_refused(ConfigError, f"{strong}: unknown config field n_layers", path, strong)


def test_a_complete_source_ends_the_matter(tmp_path: Path) -> None:
    path = saved(tmp_path, trainer_content(stored_weights()))
    beside = tmp_path / "config.json"
    beside.write_text("not ours")
    (note,) = _opens(path)
    assert note.startswith(f"{beside}: not valid JSON")
    assert note.endswith("the config is complete without it")
    write_config(tmp_path, config_fields() | {"n_layers": 3, "act_threshold": 0.5})
    assert _opens(path) == (
        f"{beside}: left out n_layers, which tells nothing of the model",
        f"act_threshold is 0.99, as cfg of {path} says; {beside} says 0.5",
    )
    beside.write_text("not ours")
    path = saved(tmp_path, {"model": stored_weights(), "cfg": TRAINING})
    assert_refused(ConfigError, "config.json: not valid JSON", path)
    assert len(_opens(path, config=write_config(tmp_path, name="complete.json"))) == 2


def test_null_is_absent(tmp_path: Path) -> None:
    path = saved(
        tmp_path, {"model": stored_weights(), "cfg": {"act_threshold": None, "rope_theta": None, "zeta": None}}
    )
    write_config(tmp_path, OPEN_FIELDS | {"n_kv_heads": None, "rope_scaling": None})
    assert _opens(path) == ()


def test_what_save_pretrained_adds_is_known(tmp_path: Path) -> None:
    added = {
        "_name_or_path": "someone/mythos", "architectures": ["OpenMythos"], "auto_map": {"AutoModel": "m.M"},
        "bos_token_id": 1, "eos_token_id": [2, 3], "id2label": {"0": "LABEL_0"}, "model_type": "open_mythos",
        "library_name": "open_mythos", "pad_token_id": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "dtype": "float32", "transformers_version": "4.57.1", "use_cache": True, "temperature": 1.0,
    }  # fmt: skip
    assert _opens(safetensors_folder(tmp_path, bare(), config_fields() | added)) == ()
    folder = sharded(tmp_path)
    write_config(folder, config_fields() | added)
    assert _opens(folder) == ()
    # Names of other models for our fields are not guessed at.
    write_config(folder, config_fields() | {"hidden_size": 24})
    assert_refused(ConfigError, "unknown config field hidden_size", folder)


def test_an_untied_head_that_is_promised_is_missed(tmp_path: Path) -> None:
    config = config_fields() | {"tie_word_embeddings": False}
    folder = safetensors_folder(tmp_path, bare(), config)
    assert_refused(CheckpointError, "tie_word_embeddings is false, but there is no head.weight", folder)
    head = bare()["embed.weight"].clone()
    assert _opens(safetensors_folder(tmp_path, bare() | {"head.weight": head}, config)) == ()


def test_the_stronger_source_says_whether_embeddings_are_tied(tmp_path: Path) -> None:
    folder = safetensors_folder(tmp_path, bare(), config_fields() | {"tie_word_embeddings": False})
    open_checkpoint(folder, write_config(tmp_path, {"tie_word_embeddings": True}, "given.json")).close()


def test_a_config_in_a_section(tmp_path: Path) -> None:
    folder = safetensors_folder(tmp_path, bare(), {"cfg": config_fields()})
    assert _opens(folder) == ()


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    for file in folder.glob("*.json"):
        file.write_text(file.read_text(), encoding="utf-8-sig")
    assert _opens(folder, config=None) == ()
    for file in folder.glob("*.json"):
        file.write_text(file.read_text(encoding="utf-8-sig"), encoding="utf-16")
    assert _opens(folder, config=None) == ()


def test_names_that_would_break_the_line_are_quoted(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": stored_weights(), "cfg": OPEN_FIELDS | {"a\nb\x1b[31m": 1}})
    assert _opens(path) == (f"cfg of {path}: left out 'a\\nb\\x1b[31m', which tells nothing of the model",)


def test_the_state_of_random_numbers_beside_a_model_is_no_code(tmp_path: Path) -> None:
    state = {"numpy": np.random.RandomState(3).get_state(), "best": np.float64(0.5), "steps": np.arange(3)}
    _opens(saved(tmp_path, trainer_content(stored_weights(), random=state)))
