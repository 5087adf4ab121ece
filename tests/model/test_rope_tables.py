"""The rotary table in a checkpoint: a part of the model, held against the config, and computed with where asked for.

The oracle is the reference itself, with the same state dict loaded into it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoint import Weights, assert_refused, config_fields, saved, stored_weights, write_config
from torch import Tensor

from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.entry_reader import EntryReader
from mythos_edge.model.errors import CheckpointError, ConfigError
from mythos_edge.model.layout import load_network
from mythos_edge.scripts.lab.reference import open_mythos

NAMES = {"mla": "freqs_cis_mla", "gqa": "freqs_cis"}
WAYS = "--rope-table config|--rope-table stored"
NARROW = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def _without_theta(attn_type: str) -> dict[str, Any]:
    return {name: value for name, value in config_fields(attn_type).items() if name != "rope_theta"}


def _with_table(attn_type: str, change: Callable[[Tensor], Tensor]) -> Weights:
    weights = stored_weights(attn_type)
    return weights | {NAMES[attn_type]: change(weights[NAMES[attn_type]])}


def _file(folder: Path, weights: Weights, config: dict[str, Any], form: str = "config.json beside") -> Path:
    """The weights in a file of the form, with the config where that form has it."""
    if form == "safetensors":
        path = folder / "model.safetensors"
        save_file({name: value.contiguous().clone() for name, value in weights.items()}, path)
    elif form == "cfg inside":
        return saved(folder, {"model": weights, "cfg": config})
    else:
        prefix = "module._orig_mod." if form == "prefixed" else ""
        path = saved(folder, {prefix + name: value for name, value in weights.items()})
    write_config(folder, config)
    return path


FORMS = ("config.json beside", "cfg inside", "safetensors", "prefixed")


# --- rope_theta from the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_an_absent_theta_comes_from_the_table(tmp_path: Path, attn_type: str, form: str) -> None:
    weights = stored_weights(attn_type, rope_theta=10000.0)
    with open_checkpoint(_file(tmp_path, weights, _without_theta(attn_type), form)) as checkpoint:
        assert (checkpoint.config.rope_theta, checkpoint.rope_table) == (10000.0, "config")
        assert checkpoint.notes == (f"rope_theta is 10000.0, which the rotary table {NAMES[attn_type]} was made with",)


@pytest.mark.parametrize("theta", [2.0, 100.0, 12345.6, 31415.9, 500000.0, 1e6, 2e6, 1e9])
@pytest.mark.parametrize(("dim", "rows"), [(4, 16), (64, 300), (128, 2)])
def test_the_theta_that_was_typed_is_found(tmp_path: Path, theta: float, dim: int, rows: int) -> None:
    table = open_mythos().precompute_rope_freqs(dim, rows, theta)
    weights = stored_weights("mla", qk_rope_head_dim=dim) | {NAMES["mla"]: table}
    config = _without_theta("mla") | {"qk_rope_head_dim": dim, "max_seq_len": rows}
    with open_checkpoint(_file(tmp_path, weights, config)) as checkpoint:
        assert checkpoint.config.rope_theta == theta


@pytest.mark.parametrize("shape", [(1, 4), (16, 2)])
def test_a_table_that_every_theta_makes_tells_none(tmp_path: Path, shape: tuple[int, int]) -> None:
    rows, dim = shape
    weights = stored_weights("mla", qk_rope_head_dim=dim)
    weights |= {NAMES["mla"]: open_mythos().precompute_rope_freqs(dim, rows, 7.0)}
    config = _without_theta("mla") | {"qk_rope_head_dim": dim}
    path = _file(tmp_path, weights, config)
    assert_refused(ConfigError, "missing config field rope_theta; give it in --config", path)
    with open_checkpoint(path, write_config(tmp_path, {"rope_theta": 9.0}, "extra.json")) as checkpoint:
        assert checkpoint.unlike_config is None


# --- a table unlike the config's ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_a_table_of_another_theta_is_refused(tmp_path: Path, attn_type: str, form: str) -> None:
    path = _file(tmp_path, stored_weights(attn_type), config_fields(attn_type) | {"rope_theta": 10000.0}, form)
    where = "cfg of " if form == "cfg inside" else "config.json: "
    words = f"{where}|rope_theta is 10000.0|{NAMES[attn_type]}|500000.0|{WAYS}"
    assert_refused(ConfigError, words, path)
    extra = write_config(tmp_path, {"rope_theta": 500000}, "extra.json")
    with open_checkpoint(path, extra) as checkpoint:
        assert (checkpoint.rope_table, checkpoint.unlike_config) == ("config", None)
    for choice in ("config", "stored"):
        with open_checkpoint(path, rope_table=choice) as checkpoint:
            assert (checkpoint.rope_table, checkpoint.config.rope_theta) == (choice, 10000.0)


@pytest.mark.parametrize("theta", [10001.0, 10000.2, 9999.0])
def test_a_table_of_almost_the_same_theta_is_refused(tmp_path: Path, theta: float) -> None:
    weights = stored_weights("mla", rope_theta=10000.0)
    path = _file(tmp_path, weights, config_fields() | {"rope_theta": theta})
    assert_refused(ConfigError, f"rope_theta is {theta}|with rope_theta 10000.0", path)


@pytest.mark.parametrize("ulps", [-3, 3])
def test_a_table_of_another_machine_is_no_other_table(tmp_path: Path, ulps: int) -> None:
    frequencies = 1.0 / (500000.0 ** (torch.arange(0, 4, 2, dtype=torch.float32) / 4))
    moved = frequencies * (1 + ulps * torch.finfo(torch.float32).eps)
    angles = torch.outer(torch.arange(4096, dtype=torch.float32), moved)
    weights = _with_table("mla", lambda _: torch.polar(torch.ones_like(angles), angles))
    with open_checkpoint(_file(tmp_path, weights, config_fields())) as checkpoint:
        assert checkpoint.unlike_config is None
    with open_checkpoint(_file(tmp_path, weights, _without_theta("mla"))) as checkpoint:
        assert checkpoint.config.rope_theta == 500000.0


def _scaled(table: Tensor) -> Tensor:
    """Linear position interpolation by two."""
    angles = table.angle() / 2
    return torch.polar(torch.ones_like(angles), angles)


@pytest.mark.parametrize("change", [_scaled, lambda table: table * 1.2, lambda table: table.conj().resolve_conj()])
def test_a_table_of_no_theta_is_refused(tmp_path: Path, change: Callable[[Tensor], Tensor]) -> None:
    weights = _with_table("mla", change)
    path = _file(tmp_path, weights, config_fields())
    assert_refused(ConfigError, f"rope_theta is 500000.0|is of no rope_theta|{WAYS}", path)
    path = _file(tmp_path, weights, _without_theta("mla"))
    assert_refused(ConfigError, f"missing config field rope_theta|is of no rope_theta|{WAYS}", path)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_cosines_alone_are_refused_with_both_ways_on(
    tmp_path: Path, attn_type: str, form: str, dtype: torch.dtype
) -> None:
    path = _file(
        tmp_path,
        _with_table(attn_type, lambda table: table.real.to(dtype).contiguous()),
        config_fields(attn_type),
        form,
    )
    assert_refused(ConfigError, f"{NAMES[attn_type]} is real ({str(dtype)[6:]})|{WAYS}", path)
    for choice in ("config", "stored"):
        with open_checkpoint(path, rope_table=choice) as checkpoint:
            assert checkpoint.rope_table == choice


def test_the_reference_leaves_cosines_when_it_is_cast() -> None:
    """The refusal says the truth about ``model.to(bfloat16)``."""
    main = open_mythos()
    model = main.OpenMythos(main.MythosConfig(**config_fields()))
    with pytest.warns(UserWarning, match="discards the imaginary part"):
        model.to(torch.bfloat16)
    assert torch.equal(model.freqs_cis_mla, stored_weights()["freqs_cis_mla"].real.bfloat16())


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_the_table_of_the_other_attention_is_inert(tmp_path: Path, attn_type: str) -> None:
    other = NAMES["gqa" if attn_type == "mla" else "mla"]
    weights = stored_weights(attn_type) | {other: torch.full((3,), torch.nan)}
    with open_checkpoint(_file(tmp_path, weights, config_fields(attn_type))) as checkpoint:
        assert (checkpoint.unlike_config, checkpoint.config.rope_theta) == (None, 500000.0)


# --- the parts of complex numbers as a last axis, for formats that know none --------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
def test_pairs_are_complex_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = _with_table("gqa", lambda table: torch.view_as_real(table).to(dtype))
    path = _file(tmp_path, weights, config_fields("gqa"), "safetensors")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.unlike_config is None
    assert_refused(
        ConfigError, f"rope_theta is 9.0|{WAYS}", path, write_config(tmp_path, {"rope_theta": 9.0}, "extra.json")
    )
    path = _file(tmp_path, weights, _without_theta("gqa"), "safetensors")
    if dtype in (torch.float32, torch.float64):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.config.rope_theta == 500000.0
    else:  # its digits do not tell one theta from its neighbours
        assert_refused(ConfigError, "missing config field rope_theta", path)


# --- malformed tables ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table[0].clone(), "has shape (2,) and dtype complex64"),
        (lambda table: torch.zeros(16, 2, dtype=torch.int64), "dtype int64"),
        (lambda table: torch.zeros(16, 2, 3), "has shape (16, 2, 3)"),
        (lambda table: table[:0].clone(), "has shape (0, 2)"),
        (lambda table: torch.cat([table, table], dim=1), "has 4 frequencies, the model has 2"),
        (lambda table: table.clone().fill_(torch.nan), "holds NaN or infinity at position 0"),
        (lambda table: torch.cat([table[:15], table[15:] * torch.inf]), "holds NaN or infinity at position 15"),
    ],
)
def test_a_malformed_table_is_one_line(tmp_path: Path, change: Callable[[Tensor], Tensor], words: str) -> None:
    path = _file(tmp_path, _with_table("mla", change), config_fields())
    assert_refused(CheckpointError, f"freqs_cis_mla|{words}|--rope-table config", path)
    with pytest.raises(CheckpointError, match="freqs_cis_mla"):
        open_checkpoint(path, rope_table="stored")
    with open_checkpoint(path, rope_table="config") as checkpoint:
        assert checkpoint.stored_table is None


@pytest.mark.parametrize("change", [lambda table: table.repeat(1, 2), lambda table: table[:, :2].clone()])
def test_a_table_of_another_width_for_grouped_queries(tmp_path: Path, change: Callable[[Tensor], Tensor]) -> None:
    path = _file(tmp_path, _with_table("gqa", change), config_fields("gqa"))
    with pytest.raises((CheckpointError, ConfigError), match=r"n_heads is 3|8 frequencies") as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    with open_checkpoint(path, rope_table="config") as checkpoint:
        assert checkpoint.config.n_heads == 3


def test_what_cannot_be_chosen(tmp_path: Path) -> None:
    weights = stored_weights()
    del weights["freqs_cis_mla"]
    path = _file(tmp_path, weights, config_fields())
    with pytest.raises(CheckpointError, match="holds no rotary table freqs_cis_mla: --rope-table config"):
        open_checkpoint(path, rope_table="stored")
    with pytest.raises(ConfigError, match="--rope-table is 'file', expected one of config, stored"):
        open_checkpoint(path, rope_table="file")


def test_only_some_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = open_mythos().precompute_rope_freqs(4, 50_000, 500000.0)
    path = _file(tmp_path, stored_weights() | {"freqs_cis_mla": table}, config_fields())
    rows: list[int] = []
    original = EntryReader.read

    def counted(self: EntryReader, entry: Any, start: int = 0, stop: int | None = None) -> Tensor:
        found = original(self, entry, start, stop)
        rows.append(len(found))
        return found

    monkeypatch.setattr(EntryReader, "read", counted)
    open_checkpoint(path).close()
    assert 8 < sum(rows) < 200


# --- computing with the stored table ------------------------------------------------------------------------------


def _lively(attn_type: str) -> Any:
    """The reference's tiny model with weights large enough that the angles matter."""
    main = open_mythos()
    torch.manual_seed(5)
    model = main.OpenMythos(main.MythosConfig(**config_fields(attn_type)))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 2:
                value.normal_(std=1.0 if name.startswith("embed") else value.shape[1] ** -0.5)
        model.recurrent.act.halt.bias.fill_(-1.0)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "change", [lambda table: table.real.bfloat16(), lambda table: table.real.double().contiguous(), _scaled]
)
@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_a_stored_table_is_computed_with_as_the_reference_does(
    tmp_path: Path, attn_type: str, change: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    model = _lively(attn_type)
    weights = dict(model.state_dict())
    weights[NAMES[attn_type]] = change(weights[NAMES[attn_type]])
    path = _file(tmp_path, weights, config_fields(attn_type))
    ids = torch.tensor([[3, 14, 15, 9, 2, 6, 5, 3, 5, 8, 9, 7]])
    with torch.no_grad():
        as_config = model(ids, n_loops=3)
        # A real buffer stays real in the reference, as after model.to(bfloat16); a copy into a complex one is the same.
        setattr(model, NAMES[attn_type], weights[NAMES[attn_type]])
        expected = model(ids, n_loops=3)
        with open_checkpoint(path, rope_table="stored") as checkpoint:
            found = load_network(checkpoint, dtype=dtype)(ids, 3).logits
    assert (expected - as_config).abs().max() > 0.05
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def test_a_copy_into_the_complex_buffer_computes_the_same() -> None:
    model, ids = _lively("mla"), torch.tensor([[3, 14, 15, 9]])
    cosines = model.freqs_cis_mla.real.bfloat16()
    with torch.no_grad():
        model.load_state_dict(model.state_dict() | {"freqs_cis_mla": cosines})
        assert model.freqs_cis_mla.is_complex()
        copied = model(ids)
        model.freqs_cis_mla = cosines
        assert torch.equal(copied, model(ids))


def test_more_context_than_the_stored_table_is_refused(tmp_path: Path) -> None:
    path = _file(tmp_path, _with_table("mla", lambda table: table.real.bfloat16()), config_fields())
    with open_checkpoint(path, rope_table="stored") as checkpoint:
        load_network(checkpoint, 16)
        with pytest.raises(ConfigError, match=r"16 positions, wanted are 17: --max-context 16 at most"):
            load_network(checkpoint, 17)
    with open_checkpoint(path, rope_table="config") as checkpoint:
        load_network(checkpoint, 17)
