"""Dory against what its own code gives: the golden file, and the model of transformers with random configs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dory_models import CONFIG, GOLDEN, HALVED, LAYOUTS, PLAIN, checkpoint, in_layout, released_tensors, scatter
from torch import Tensor
from transformers import DoryConfig as TheirConfig
from transformers import DoryForCausalLM

from mythos_edge.model import rotary_recipes
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.eager_ops import EagerOps
from mythos_edge.model.errors import CheckpointError, ConfigError
from mythos_edge.model.families.dory import layout, network
from mythos_edge.model.families.dory.config_reading import config_from_dict
from mythos_edge.model.families.dory.layers import Attention, unit
from mythos_edge.model.layers import Rope
from mythos_edge.model.layout import load_network
from mythos_edge.model.network import Halting, LoopedNetwork, LoopState, Window

WANTED = dict(np.load(GOLDEN / "golden.npz"))
IDS = torch.from_numpy(WANTED["ids"])
ALLOWED = 3 * float(WANTED["fp32_error"])
# Their float32 is 8e-6 from their float64 at most, of logits to 13; faults move them by tenths.
AGAINST_THEIRS = 4e-5


def _loaded(path: Path) -> LoopedNetwork:
    with open_checkpoint(path) as opened, torch.no_grad():
        return load_network(opened)


class _Run:
    """The stages over whole sequences in chunks, with caches, as a runtime calls them."""

    def __init__(self, of: LoopedNetwork, ids: Tensor, depth: int, chunk: int) -> None:
        self._network, self._batch = of, ids.shape[0]
        sizes = [of.looped.prelude_slots, *[of.looped.step_slots] * depth, of.looped.coda_slots]
        self._slots = [[torch.zeros(self._batch, 0, of.looped.cache_width)] * size for size in sizes]
        parts = [self._chunk(ids[:, start : start + chunk], start, depth) for start in range(0, ids.shape[1], chunk)]
        self.e, self.h, self.logits, self.depth = (torch.cat(part, dim=-2) for part in zip(*parts, strict=True))

    def _chunk(self, ids: Tensor, start: int, depth: int) -> tuple[Tensor, ...]:
        window = Window(torch.tensor(start), torch.zeros(self._batch, dtype=torch.int64))
        e, rows = self._network.prelude(ids, window, *self._slots[0])
        self._keep(0, rows)
        state = LoopState(e, torch.zeros_like(e), torch.zeros(ids.shape), torch.zeros_like(ids))
        halting, states = Halting(torch.tensor(1.0), torch.tensor(1)), []
        for index in range(depth):
            past = self._slots[1 + index]
            state, rows = self._network.loop_step(state, e, torch.full(ids.shape, index), halting, window, *past)
            self._keep(1 + index, rows)
            states.append(state.h)
        logits, rows = self._network.coda(state.out, torch.arange(ids.shape[1]), window, *self._slots[-1])
        self._keep(-1, rows)
        return e, torch.stack(states), logits, state.depth.unsqueeze(-1)

    def _keep(self, slot: int, rows: list[Tensor]) -> None:
        self._slots[slot] = [torch.cat(pair, dim=1) for pair in zip(self._slots[slot], rows, strict=True)]


@pytest.fixture(params=LAYOUTS)
def in_each_layout(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    name: str = request.param
    return checkpoint(tmp_path / name, in_layout(name, released_tensors()), LAYOUTS[name])


def _error(found: Tensor, wanted: str) -> float:
    return float(np.abs(found.numpy() - WANTED[wanted]).max())


def test_every_layout_is_the_golden_model(in_each_layout: Path) -> None:
    found = _Run(_loaded(in_each_layout), IDS, depth=2, chunk=IDS.shape[1])
    assert _error(found.logits, "logits") <= ALLOWED
    assert _error(found.h, "hidden_per_loop") <= 3 * WANTED["fp32_error_hidden"]
    assert _error(found.e, "prelude_hidden") <= 3 * WANTED["fp32_error_hidden"]
    assert (found.depth == 2).all()


def test_a_layout_changes_no_bit(tmp_path: Path) -> None:
    logits = []
    for name, config in LAYOUTS.items():
        path = checkpoint(tmp_path / name, in_layout(name, released_tensors()), config)
        logits.append(_loaded(path)(IDS).logits)
    assert all(torch.equal(logits[0], other) for other in logits[1:])


@pytest.mark.parametrize("chunk", [1, 7, 8, 9])
def test_chunks_with_caches_are_the_golden_model(chunk: int) -> None:
    found = _Run(_loaded(GOLDEN), IDS, depth=2, chunk=chunk)
    assert _error(found.logits, "logits") <= ALLOWED
    assert _error(found.h, "hidden_per_loop") <= 3 * WANTED["fp32_error_hidden"]


RANDOM: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 4, "sliding_window": 1, "n_input_layers": 0, "n_output_layers": 3},
    {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "sliding_window": 5, "hidden_size": 36},
    {"num_key_value_heads": 2, "n_input_layers": 2, "n_output_layers": 0, "layer_types": ["full_attention"] * 6},
    {
        "num_key_value_heads": 2,
        "layer_types": ["sliding_attention"] * 6,
        "sliding_window": 3,
        "initializer_range": 0.03,
    },
]


def _theirs(changes: dict[str, Any], depth: int) -> DoryForCausalLM:
    values = {name: value for name, value in (HALVED | changes).items() if name != "n_recurrent_layers"}
    config = TheirConfig(**(values | {"n_recurrent_loops": depth}), attn_implementation="eager")
    made = DoryForCausalLM(config).eval().requires_grad_(False)
    scatter(made, seed=len(changes) + depth)
    return made


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("changes", RANDOM, ids=range(len(RANDOM)))
def test_random_models_are_those_of_transformers(changes: dict[str, Any], depth: int, tmp_path: Path) -> None:
    theirs = _theirs(changes, depth)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 256, (2, 23), generator=torch.Generator().manual_seed(3))
    wanted = theirs(input_ids=ids, use_cache=False).logits
    ours = _loaded(tmp_path)
    assert ours.looped.max_depth == depth
    assert (ours(ids).logits - wanted).abs().max() < AGAINST_THEIRS
    assert (_Run(ours, ids, depth, chunk=7).logits - wanted).abs().max() < AGAINST_THEIRS


def test_a_state_dict_in_memory_is_read(tmp_path: Path) -> None:
    theirs = _theirs({}, 3)
    path = checkpoint(tmp_path, dict(theirs.state_dict()), theirs.config.to_dict())
    assert (_loaded(path)(IDS).logits - theirs(input_ids=IDS, use_cache=False).logits).abs().max() < AGAINST_THEIRS


def _narrower(patch: pytest.MonkeyPatch) -> None:
    real = EagerOps.grouped_query_attention
    patch.setattr(
        EagerOps, "grouped_query_attention", lambda *given: real(*given[:-1], given[-1] - 1 if given[-1] else 0)
    )


def _signed_rates(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tensor, "abs", lambda self: self)


def _scale_unpaired(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layout, "in_pairs", lambda rows, head_dim: rows)


def _half_split_rows(patch: pytest.MonkeyPatch) -> None:
    for module in (layout, rotary_recipes):
        patch.setattr(module, "in_pairs", lambda rows, head_dim: rows)


class _ScaledFirst(Rope):
    def __init__(self, real: Rope, scale: Tensor) -> None:
        super().__init__(2, 1, real.ops)
        self.real, self.scale = real, scale

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        is_query = x.shape[2] == len(self.scale)
        return self.real(x * self.scale, positions) / self.scale if is_query else self.real(x, positions)


def _scaled_before_rotation(patch: pytest.MonkeyPatch) -> None:
    real = Attention.forward

    def forward(self: Attention, x: Tensor, rope: Rope, *rest: Any) -> Any:
        return real(self, x, _ScaledFirst(rope, self.query_scale.view(self.config.num_attention_heads, -1)), *rest)

    patch.setattr(Attention, "forward", forward)


def _one_theta(patch: pytest.MonkeyPatch) -> None:
    real = rotary_recipes.rope_table
    patch.setattr(rotary_recipes, "rope_table", lambda dim, stop, theta, start: real(dim, stop, 1e4, start))


def _state_not_of_length_1(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(network, "unit", lambda x: x)


FAULTS = [
    _narrower,
    _signed_rates,
    _scale_unpaired,
    _half_split_rows,
    _scaled_before_rotation,
    _one_theta,
    _state_not_of_length_1,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        logits = _loaded(GOLDEN)(IDS).logits
    assert _error(logits, "logits") > 100 * ALLOWED


def test_tiled_heads_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden model has one head of keys and values, in which tiled and repeated are the same."""
    theirs = _theirs({"num_key_value_heads": 2}, 2)
    theirs.save_pretrained(tmp_path)
    real = EagerOps.grouped_query_attention

    def tiled(self: EagerOps, q: Tensor, *rest: Any) -> Tensor:
        order = torch.tensor([0, 2, 1, 3])
        return real(self, q[:, :, order], *rest)[:, :, order]

    monkeypatch.setattr(EagerOps, "grouped_query_attention", tiled)
    found = _loaded(tmp_path)(IDS).logits
    assert (found - theirs(input_ids=IDS, use_cache=False).logits).abs().max() > 100 * AGAINST_THEIRS


def test_unit_is_their_norm() -> None:
    x = 1e-3 * torch.randn(3, 4, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(unit(x), x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6))


def _changed(**changes: Any) -> dict[str, Any]:
    return CONFIG | changes


REFUSED = [
    ({"dory_format_version": 2}, "dory_format_version is 2, expected 1"),
    ({"ngpt": False}, "ngpt is False, expected True"),
    ({"fngpt": False}, "fngpt is False, expected True"),
    ({"attention_output_gate": False}, "attention_output_gate is False, expected True"),
    ({"ngpt_enable_final_norm": True}, "ngpt_enable_final_norm is True, expected False"),
    ({"initial_state": "zeros"}, "initial_state is 'zeros', expected 'input_copy'"),
    ({"input_transform": "concat"}, "input_transform is 'concat', expected 'residual'"),
    ({"output_transform": "add"}, "output_transform is 'add', expected 'replace'"),
    ({"mixer_type": "mamba"}, "mixer_type is 'mamba', expected None"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1"),
    ({"partial_rotary_factor_2": 0.5}, "partial_rotary_factor_2 is 0.5, expected 1"),
    ({"no_rope_layers": [0] * 6 + [1] + [0] * 5}, "no_rope_layers is .*every layer is rotated"),
    ({"rope_profile_layers": [0, *CONFIG["rope_profile_layers"][1:]]}, "rope_profile_layers is 0, expected 1 or 2"),
    ({"rope_profile_layers": [1, *CONFIG["rope_profile_layers"][1:]]}, "gives sliding_attention layers both thetas"),
    ({"rope_profile_layers": [1, 2]}, "expected a list of 6 or 12 profiles"),
    ({"swa_num_attention_heads": 8}, "swa_num_attention_heads is 8, but num_attention_heads is 4"),
    ({"swa_num_key_value_heads": 2}, "swa_num_key_value_heads is 2, but num_key_value_heads is 1"),
    ({"swa_head_dim": 32}, "swa_head_dim is 32, but head_dim is 24"),
    ({"attention_bias": True}, "attention_bias is True, expected False"),
    ({"mlp_bias": True}, "mlp_bias is True, expected False"),
    ({"use_bias": True}, "use_bias is True, expected False"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True, expected False"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ({"mlp_hidden_act": "relu2"}, "mlp_hidden_act is 'relu2', expected 'silu'"),
    ({"quantization_config": {"quant_method": "modelopt"}}, "quantization_config is .*give the checkpoint in bf16"),
    ({"recurrent_kv_cache_mode": "last_loop"}, "recurrent_kv_cache_mode is 'last_loop', expected 'per_loop'.*cut"),
    ({"n_input_layers": 4}, "do not add up: n_input_layers 4, .*num_hidden_layers 12, and layer_types has 12"),
    ({"num_hidden_layers": 14}, "do not add up: .*num_hidden_layers 14, and layer_types has 12"),
    ({"n_recurrent_layers": 6}, "do not add up: .*n_recurrent_layers 6"),
    ({"n_input_layers": 8, "n_output_layers": 4, "n_recurrent_layers": None}, "do not add up: .*n_recurrent_layers 0"),
    ({"n_input_layers": 3, "n_output_layers": 1}, "n_input_layers is 3, expected an even number"),
    ({"layer_types": ["mlp", "full_attention"] * 6}, "layer_types is 'mlp', expected sliding_attention or full_atte"),
    ({"layer_types": ["full_attention", "mlp", "full_attention"]}, "must be attention and mlp in turn"),
    ({"hybrid_layer_pattern": "S-S-S-S-S-S-"}, "hybrid_layer_pattern .* has other layers than layer_types"),
    ({"hybrid_layer_pattern": "SM"}, "hybrid_layer_pattern is 'SM', expected text of"),
    ({"swa_window_size": 9}, "sliding_window is 8, but swa_window_size is 9, which is the same fact"),
    ({"attention_head_dim": 32, "swa_head_dim": None}, "head_dim is 24, but attention_head_dim is 32"),
    ({"init_method_std": 0.02}, "initializer_range is 0.0177, but init_method_std is 0.02"),
    ({"rope_theta": 5e5}, "rope_theta of full_attention is 1e[+]07, but rope_profile_layers says 500000"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e7}}}, "rope_parameters has no sliding_attention"),
    ({"rope_parameters": {"rope_theta": 1e7}}, "rope_parameters is .*expected an object with sliding_attention"),
    (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e7, "rope_type": "yarn"}}},
        "rope_parameters.full_attention.rope_type is 'yarn', expected 'default'",
    ),
    ({"rope_scaling": {"factor": 2}}, "rope_scaling is .*expected None"),
    ({"head_dim": 23, "attention_head_dim": 23, "swa_head_dim": 23}, "head_dim is 23, expected an even number"),
    ({"num_key_value_heads": 3, "swa_num_key_value_heads": 3}, "num_attention_heads 4 is not divisible by"),
    ({"n_recurrent_loops": 0}, "n_recurrent_loops is 0, expected an integer of 1 to"),
    ({"vocab_size": 1 << 40}, "vocab_size is .*expected an integer of 1 to"),
    ({"sliding_window": True, "swa_window_size": True}, "sliding_window is True, expected an integer"),
    ({"initializer_range": 10**400, "init_method_std": None}, "initializer_range is .*expected a finite number"),
    ({"ngpt_alpha_init": None}, "missing config field ngpt_alpha_init; give it in --config"),
    ({"layer_types": None, "hybrid_layer_pattern": None}, "missing config field layer_types"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_computed_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^here: .*{words}") as refused:
        config_from_dict(CONFIG | changes, "here")
    assert "\n" not in str(refused.value)


ALIKE = [
    {"layer_types": None},
    {"hybrid_layer_pattern": None},
    {"sliding_window": None},
    {"head_dim": None},
    {"initializer_range": None},
    {"rope_parameters": None},
    {"rope_profile_layers": None, "rope_theta": None, "rope_theta_2": None},
    {"n_recurrent_layers": None},
    {"num_hidden_layers": None},
    {"rope_parameters": None, "rope_profile_layers": CONFIG["rope_profile_layers"][::2]},
    {name: None for name in CONFIG if name not in PLAIN},
]


@pytest.mark.parametrize("changes", ALIKE, ids=range(len(ALIKE)))
def test_one_of_the_names_of_a_fact_is_enough(changes: dict[str, Any]) -> None:
    known = config_from_dict(CONFIG, "here")
    assert config_from_dict(CONFIG | changes, "here") == known
    assert config_from_dict(HALVED, "here") == known
    assert config_from_dict(known.to_dict(), "manifest") == known


def test_tensors_that_do_not_belong_are_named(tmp_path: Path) -> None:
    tensors = released_tensors()
    bias = tensors | {"backbone.layers.0.mixer.q_proj.bias": torch.zeros(96)}
    with pytest.raises(CheckpointError, match=r"unknown tensors backbone\.layers\.0\.mixer\.q_proj\.bias"):
        open_checkpoint(checkpoint(tmp_path, bias, CONFIG))
    both = tensors | {"backbone.layers.0.lambda_1": torch.zeros(64)}
    with pytest.raises(CheckpointError, match=r"lambda_1 and .*attn_alpha are both model.*lambda_1: keep one layout"):
        open_checkpoint(checkpoint(tmp_path, both, CONFIG))
    less = {name: tensor for name, tensor in tensors.items() if "logit_scale" not in name}
    with pytest.raises(CheckpointError, match=r"missing tensors lm_head\.logit_scale"):
        open_checkpoint(checkpoint(tmp_path, less, CONFIG))
    short = tensors | {"lm_head.logit_scale": torch.zeros(5)}
    with pytest.raises(CheckpointError, match=r"lm_head\.logit_scale has shape \(5,\), expected \(256,\)"):
        open_checkpoint(checkpoint(tmp_path, short, CONFIG))
    whole = tensors | {"lm_head.logit_scale": torch.zeros(256, dtype=torch.int64)}
    with pytest.raises(CheckpointError, match=r"has dtype torch\.int64, expected one of float32"):
        open_checkpoint(checkpoint(tmp_path, whole, CONFIG))


def test_fields_that_are_not_known_are_said(tmp_path: Path) -> None:
    with open_checkpoint(checkpoint(tmp_path, released_tensors(), CONFIG | {"looks": "good", "off": False})) as opened:
        (note,) = opened.notes
    assert "left out looks, which this version does not know" in note


def test_a_folder_without_its_config_says_where_it_belongs(tmp_path: Path) -> None:
    bare = Path(shutil.copytree(GOLDEN, tmp_path / "bare"))
    (bare / "config.json").rename(tmp_path / "whole.json")
    with pytest.raises(ConfigError, match=r"config\.json: no such file, expected the model's config: copy it there"):
        open_checkpoint(bare)
    with open_checkpoint(bare, tmp_path / "whole.json") as checkpoint:
        assert checkpoint.config.family == "dory"
