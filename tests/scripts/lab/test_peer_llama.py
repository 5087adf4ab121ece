"""The peer of a looped model in llama.cpp: its layers and bytes, and one real run where llama.cpp is installed."""

import json
import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from mythos_edge.model.errors import BackendUnavailable, UsageError
from mythos_edge.model.families.looped_llama.layout import tensor_shapes
from mythos_edge.model.families.openmythos.config import VARIANTS
from mythos_edge.model.families.openmythos.shapes import expected_shapes
from mythos_edge.scripts.lab import llama_files, peer_llama
from mythos_edge.scripts.lab.random_checkpoints import OURO_1_4B

ONE_B = VARIANTS["1b"]
TINY = replace(
    ONE_B,
    vocab_size=96,
    dim=64,
    n_heads=2,
    n_kv_heads=2,
    max_seq_len=64,
    prelude_layers=1,
    coda_layers=1,
    kv_lora_rank=32,
    q_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=32,
    v_head_dim=32,
    n_experts=8,
    n_experts_per_tok=2,
    n_shared_experts=1,
    expert_dim=32,
)
LOOPED = replace(
    OURO_1_4B,
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
INSTALLED = all(find_spec(name) for name in ("llama_cpp", "gguf"))
needs_llama = pytest.mark.skipif(not INSTALLED, reason=f"needs llama.cpp: {llama_files.INSTALL}")


@pytest.mark.parametrize(("depth", "layers"), [(0.2, 1), (1, 1), (4.25, 4), (5.67, 6), (16, 16)])
def test_layers_follow_the_mean_depth(depth: float, layers: int) -> None:
    shape = peer_llama.shape_from_config(ONE_B, depth, "int4")
    assert (shape.dense_layers, shape.expert_layers, shape.block_count) == (4, layers, 4 + layers)


def test_shared_experts_are_as_wide_as_the_looped_models() -> None:
    shape = peer_llama.shape_from_config(ONE_B, 4, "int4")
    assert shape.shared_experts * ONE_B.expert_dim == ONE_B.shared_dim


@pytest.mark.parametrize("quantization", llama_files.QUANTIZATIONS)
@pytest.mark.parametrize("depth", [1, 4, 16])
def test_active_bytes_are_nearly_the_looped_models(depth: int, quantization: str) -> None:
    shape = peer_llama.shape_from_config(ONE_B, depth, quantization, most_file_bytes=10**11)
    sizes = llama_files.tensor_bytes(shape, quantization)
    active = llama_files.active_bytes(sizes, ONE_B.n_experts, ONE_B.n_experts_per_tok)
    assert active == pytest.approx(peer_llama.looped_bytes(ONE_B, depth, quantization), rel=0.02)


def test_a_looped_step_has_the_weights_of_an_expert_layer() -> None:
    shapes = peer_llama.shape_from_config(ONE_B, 1, "int4").tensor_shapes()
    layer = sum(math.prod(value) for name, value in shapes.items() if name.startswith("blk.4."))
    block = sum(math.prod(v) for name, v in expected_shapes(ONE_B).items() if name.startswith("recurrent.block."))
    assert layer == block - ONE_B.n_experts  # the router's bias


def test_active_bytes_scale_experts_and_leave_the_embedding_out() -> None:
    sizes = {
        "token_embd.weight": 1000,
        "output.weight": 100,
        "blk.0.ffn_up_exps.weight": 80,
        "blk.0.ffn_up_shexp.weight": 7,
    }
    assert llama_files.active_bytes(sizes, experts=16, used=4) == 100 + 20 + 7


def test_bytes_of_blocks() -> None:
    shape = peer_llama.shape_from_config(TINY, 1, "int4")
    for quantization, a_block in (("int4", 18), ("int8", 34), ("float16", 64), ("float32", 128)):
        sizes = llama_files.tensor_bytes(shape, quantization)
        assert sizes["output.weight"] == 96 * 64 // 32 * a_block
        assert sizes["output_norm.weight"] == 64 * 4
        assert sizes["blk.2.ffn_gate_inp.weight"] == 8 * 64 * 4


def test_fewer_experts_keep_the_bytes_a_token_reads() -> None:
    whole = peer_llama.shape_from_config(ONE_B, 4, "int8", most_file_bytes=10**11)
    fewer = peer_llama.shape_from_config(ONE_B, 4, "int8", most_file_bytes=2 * 10**9)
    assert (whole.config.n_experts, fewer.config.n_experts) == (64, 16)
    sizes = [llama_files.tensor_bytes(shape, "int8") for shape in (whole, fewer)]
    assert sum(sizes[1].values()) <= 2 * 10**9
    active = [llama_files.active_bytes(size, experts, 4) for size, experts in zip(sizes, (64, 16), strict=True)]
    routers = 4 * (64 - 16) * ONE_B.dim * 4
    assert active[0] - active[1] == routers


@pytest.mark.parametrize(
    ("config", "depth", "most", "message"),
    [
        (replace(TINY, attn_type="gqa"), 1, 10**9, "latent attention"),
        (replace(TINY, n_shared_experts=0), 1, 10**9, "shared experts"),
        (TINY, 24, 10**9, "26 layers mean DeepSeek-V2-Lite"),
        (TINY, 1, 1000, "expected at most 1000"),
    ],
)
def test_what_has_no_peer_is_refused(config: peer_llama.MythosConfig, depth: float, most: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        peer_llama.shape_from_config(config, depth, "int4", most)


def test_a_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("llama_cpp", "gguf"):
        monkeypatch.setitem(sys.modules, name, None)
    shape = peer_llama.shape_from_config(TINY, 1, "int4")
    with pytest.raises(BackendUnavailable, match="pip install llama-cpp-python gguf"):
        llama_files.write_gguf(tmp_path / "peer.gguf", shape, "int4")
    with pytest.raises(BackendUnavailable, match="pip install llama-cpp-python gguf"):
        llama_files.measure(tmp_path / "peer.gguf", 4, 2, threads=1)
    assert not list(tmp_path.iterdir())


@needs_llama
def test_rows_that_are_no_whole_blocks_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    shape = peer_llama.shape_from_config(replace(TINY, kv_lora_rank=24), 1, "int4")
    with pytest.raises(UsageError, match="rows of 24 values, expected a multiple of 32"):
        llama_files.write_gguf(tmp_path / "peer.gguf", shape, "int4")
    assert not list(tmp_path.iterdir())


@needs_llama
@pytest.mark.parametrize("quantization", llama_files.QUANTIZATIONS)
def test_llama_runs_the_file(quantization: str, tmp_path: Path) -> None:
    path = tmp_path / "peer.gguf"
    shape = peer_llama.shape_from_config(TINY, 3, quantization)
    llama_files.write_gguf(path, shape, quantization)
    assert [file.name for file in tmp_path.iterdir()] == ["peer.gguf"]
    run = llama_files.measure(path, prompt_tokens=8, new_tokens=4, threads=1)
    assert run.active_bytes == llama_files.active_bytes(llama_files.tensor_bytes(shape, quantization), 8, 2)
    assert len(run.decode_ms) == 4
    assert run.bytes_per_s == pytest.approx(run.active_bytes / run.ms_per_token * 1e3)
    assert run.prompt_tokens_per_s > 0


@pytest.mark.parametrize(("depth", "layers"), [(0.1, 1), (1, 6), (2, 12), (2.04, 12), (4, 24)])
def test_a_looped_llama_has_a_layer_for_each_of_its_inner_layers_in_each_loop_step(depth: float, layers: int) -> None:
    network = peer_llama.dense_peer(LOOPED, depth)
    assert network.layers == layers
    sizes = llama_files.tensor_bytes(network, "float32")
    stored = {name: math.prod(shape) * 4 for name, shape in tensor_shapes(LOOPED).items()}
    step = sum(size for name, size in stored.items() if ".layers." in name and not name.endswith("_2.weight"))
    assert sum(size for name, size in sizes.items() if name.startswith("blk.")) == layers * step // 6
    assert sizes["output.weight"] == stored["lm_head.weight"]


@needs_llama
@pytest.mark.parametrize("quantization", llama_files.QUANTIZATIONS)
def test_llama_runs_the_file_of_a_looped_llama(quantization: str, tmp_path: Path) -> None:
    path, network = tmp_path / "peer.gguf", peer_llama.dense_peer(LOOPED, 0.5)
    llama_files.write_gguf(path, network, quantization)
    run = llama_files.measure(path, prompt_tokens=8, new_tokens=4, threads=1)
    sizes = llama_files.tensor_bytes(network, quantization)
    assert run.active_bytes == sum(sizes.values()) - sizes["token_embd.weight"]


@needs_llama
def test_the_last_line_is_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(VARIANTS, "1b", TINY)
    arguments = ["--experts", "4", "--depth", "2", "-p", "4", "-n", "3", "--threads", "1", "--folder", str(tmp_path)]
    assert peer_llama.main(arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["dense_layers"], report["expert_layers"], report["experts"]) == (2, 2, 4)
    assert report["active_bytes"] > 0
    assert not list(tmp_path.iterdir())
