"""Networks of llama.cpp that read as many bytes a token as a looped model; measures that of OpenMythos: DeepSeek-2.

    python -m mythos_edge.scripts.lab.peer_llama --shape 1b --experts 16 --weights int4 --depth 4 -p 64 -n 16

llama.cpp knows no loops, so the peer of a looped model is one without. Of a looped Llama it is a Llama that has the
inner layers of all loop steps, each with weights of its own. Of OpenMythos it has as many distinct expert layers as
loop steps are taken on average, after as many leading dense layers as the prelude and the coda have together.
Attention, experts and head have the looped model's sizes, so a token reads about the same bytes of weights;
``looped_bytes`` says how nearly. It compares the share of the memory bandwidth, not tokens: the weights are noise.

Differs: where all loop steps would find a small step's weights in the processor's caches, the peer's layers take turns
in them. The dense feed-forward is rounded up to whole blocks of 32. The head is not shared with the embedding.

Prints a line, then one line of JSON. Needs llama-cpp-python and gguf, which no extra brings.
"""

import argparse
import json
import math
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mythos_edge.model.errors import UsageError
from mythos_edge.model.families.looped_llama.config import StackConfig
from mythos_edge.model.families.openmythos.config import VARIANTS, MythosConfig
from mythos_edge.model.families.openmythos.shapes import expected_shapes
from mythos_edge.model.machine import cores
from mythos_edge.scripts.lab.llama_files import QUANTIZATIONS, measure, stored_bytes, tensor_bytes, write_gguf

MOST_FILE_BYTES = 6_000_000_000
# llama.cpp takes these layer counts for DeepSeek-V2-Lite, whose queries have no low rank.
_LITE_LAYERS = (26, 27)


@dataclass(frozen=True)
class DeepSeekShape:
    """A DeepSeek-2 network with the layer sizes of ``config``; its experts may be fewer than the looped model's."""

    config: MythosConfig
    dense_layers: int
    expert_layers: int

    @property
    def architecture(self) -> str:
        return "deepseek2"

    @property
    def block_count(self) -> int:
        return self.dense_layers + self.expert_layers

    @property
    def dense_dim(self) -> int:
        """Hidden size of a dense layer's feed-forward, in whole blocks of 32."""
        return math.ceil(self.config.dense_dim / 32) * 32

    @property
    def shared_experts(self) -> int:
        """Shared experts of ``expert_dim``: OpenMythos makes each of its own ``n_experts_per_tok`` times as wide."""
        return self.config.n_shared_experts * self.config.n_experts_per_tok

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the file.

        Source: llama.cpp, ``src/models/deepseek2.cpp`` ``load_arch_tensors``, with latent attention split into k_b and
        v_b.
        """
        c = self.config
        layers = [self._dense() if index < self.dense_layers else self._experts() for index in range(self.block_count)]
        return _named(c.vocab_size, c.dim, [self._attention() | layer for layer in layers])

    def add_sizes(self, gguf: Any, writer: Any) -> None:
        c = self.config
        writer.add_vocab_size(c.vocab_size)
        writer.add_context_length(c.max_seq_len)
        writer.add_embedding_length(c.dim)
        writer.add_block_count(self.block_count)
        writer.add_leading_dense_block_count(self.dense_layers)
        writer.add_feed_forward_length(self.dense_dim)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(c.rope_theta)
        writer.add_rope_dimension_count(c.qk_rope_head_dim)
        writer.add_head_count(c.n_heads)
        # Latent attention is multi-query attention over one head as wide as the cache.
        writer.add_head_count_kv(1)
        writer.add_key_length(c.cache_width)
        writer.add_value_length(c.kv_lora_rank)
        writer.add_key_length_mla(c.head_dim)
        writer.add_value_length_mla(c.v_head_dim)
        writer.add_q_lora_rank(c.q_lora_rank)
        writer.add_kv_lora_rank(c.kv_lora_rank)
        writer.add_expert_count(c.n_experts)
        writer.add_expert_used_count(c.n_experts_per_tok)
        writer.add_expert_shared_count(self.shared_experts)
        writer.add_expert_feed_forward_length(c.expert_dim)
        writer.add_expert_weights_scale(1.0)
        writer.add_expert_weights_norm(True)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)

    def _attention(self) -> dict[str, tuple[int, ...]]:
        c = self.config
        return {
            "attn_norm": (c.dim,),
            "attn_q_a": (c.q_lora_rank, c.dim),
            "attn_q_a_norm": (c.q_lora_rank,),
            "attn_q_b": (c.n_heads * c.head_dim, c.q_lora_rank),
            "attn_kv_a_mqa": (c.cache_width, c.dim),
            "attn_kv_a_norm": (c.kv_lora_rank,),
            "attn_k_b": (c.n_heads, c.kv_lora_rank, c.qk_nope_head_dim),
            "attn_v_b": (c.n_heads, c.v_head_dim, c.kv_lora_rank),
            "attn_output": (c.dim, c.n_heads * c.v_head_dim),
            "ffn_norm": (c.dim,),
        }

    def _dense(self) -> dict[str, tuple[int, ...]]:
        dim, hidden = self.config.dim, self.dense_dim
        return {"ffn_gate": (hidden, dim), "ffn_up": (hidden, dim), "ffn_down": (dim, hidden)}

    def _experts(self) -> dict[str, tuple[int, ...]]:
        c = self.config
        return {
            "ffn_gate_inp": (c.n_experts, c.dim),
            "ffn_gate_exps": (c.n_experts, c.expert_dim, c.dim),
            "ffn_up_exps": (c.n_experts, c.expert_dim, c.dim),
            "ffn_down_exps": (c.n_experts, c.dim, c.expert_dim),
            "ffn_gate_shexp": (c.shared_dim, c.dim),
            "ffn_up_shexp": (c.shared_dim, c.dim),
            "ffn_down_shexp": (c.dim, c.shared_dim),
        }


@dataclass(frozen=True)
class DenseShape:
    """A Llama with the layer sizes of ``config``: its ``layers`` are the inner layers of all loop steps, each anew."""

    config: StackConfig
    layers: int

    @property
    def architecture(self) -> str:
        return "llama"

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the file. Source: llama.cpp, ``src/models/llama.cpp`` ``load_arch_tensors``."""
        c = self.config
        dim, hidden = c.hidden_size, c.intermediate_size
        q_rows, kv_rows = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        layer = {
            "attn_norm": (dim,),
            "attn_q": (q_rows, dim),
            "attn_k": (kv_rows, dim),
            "attn_v": (kv_rows, dim),
            "attn_output": (dim, q_rows),
            "ffn_norm": (dim,),
            "ffn_gate": (hidden, dim),
            "ffn_up": (hidden, dim),
            "ffn_down": (dim, hidden),
        }
        return _named(c.vocab_size, dim, [layer] * self.layers)

    def add_sizes(self, gguf: Any, writer: Any) -> None:
        del gguf
        c = self.config
        writer.add_vocab_size(c.vocab_size)
        writer.add_context_length(c.max_position_embeddings)
        writer.add_embedding_length(c.hidden_size)
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_theta)
        writer.add_rope_dimension_count(c.head_dim)
        writer.add_head_count(c.num_attention_heads)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)


def dense_peer(config: StackConfig, depth: float) -> DenseShape:
    """The Llama that reads about as many bytes per token as ``config`` does at ``depth`` loop steps."""
    return DenseShape(config, max(1, round(config.num_hidden_layers * depth)))


def _named(vocab_size: int, dim: int, layers: list[dict[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """The tensors of a file with these layers."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab_size, dim)}
    for index, layer in enumerate(layers):
        shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    shapes |= {"output_norm": (dim,), "output": (vocab_size, dim)}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def shape_from_config(
    config: MythosConfig, mean_depth: float, quantization: str, most_file_bytes: int = MOST_FILE_BYTES
) -> DeepSeekShape:
    """The network that reads about as many bytes per token as ``config`` does at ``mean_depth`` loop steps.

    Experts are halved until the file fits ``most_file_bytes``, never below those that a token uses: what a token reads
    stays, up to the router's rows. Raises UsageError where there is no such network.
    """
    if not config.is_mla or not config.n_shared_experts:
        raise UsageError(f"DeepSeek-2 has latent attention and shared experts; this config: {config}")
    dense_layers = config.prelude_layers + config.coda_layers
    shape = DeepSeekShape(config, dense_layers, expert_layers=max(1, round(mean_depth)))
    if shape.block_count in _LITE_LAYERS:
        raise UsageError(f"{shape.block_count} layers mean DeepSeek-V2-Lite to llama.cpp: change the depth by one")
    while sum(tensor_bytes(shape, quantization).values()) > most_file_bytes:
        fewer = shape.config.n_experts // 2
        if fewer < config.n_experts_per_tok:
            size = sum(tensor_bytes(shape, quantization).values())
            raise UsageError(f"the file has {size} bytes at least, expected at most {most_file_bytes}: lower the depth")
        shape = replace(shape, config=replace(shape.config, n_experts=fewer))
    return shape


def looped_bytes(config: MythosConfig, mean_depth: float, quantization: str) -> int:
    """Bytes of weights that the looped model reads for a token, stored the same way, each loop step reading anew."""
    total = 0.0
    for name, shape in expected_shapes(config).items():
        size = float(stored_bytes(name, shape, quantization))
        if ".routed_experts." in name:
            size *= config.n_experts_per_tok / config.n_experts
        total += size * mean_depth if name.startswith("recurrent.") else size
    return round(total)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure llama.cpp's decode speed on a network of a shape like ours.")
    parser.add_argument("--shape", choices=VARIANTS, default="1b")
    parser.add_argument("--experts", type=int, help="routed experts of a layer (default: the shape's)")
    parser.add_argument("--weights", choices=QUANTIZATIONS, default="int4")
    parser.add_argument("--depth", type=float, default=4.0, help="mean loop steps of the looped model")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=64)
    parser.add_argument("-n", "--new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--folder", type=Path, help="folder for the temporary file (default: the system's)")
    args = parser.parse_args(argv)
    config = VARIANTS[args.shape]
    config = replace(config, n_experts=args.experts or config.n_experts)
    shape = shape_from_config(config, args.depth, args.weights)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "peer.gguf"
        write_gguf(path, shape, args.weights)
        file_bytes = path.stat().st_size
        run = measure(path, args.prompt_tokens, args.new_tokens, args.threads)
    looped = looped_bytes(config, args.depth, args.weights)
    print(
        f"{args.weights}: {shape.dense_layers} dense and {shape.expert_layers} expert layers of "
        f"{shape.config.n_experts} experts; {run.active_bytes / 1e6:.0f} MB of weights a token "
        f"({run.active_bytes / looped:.3f} of the looped model's) in {run.ms_per_token:.1f} ms: "
        f"{run.bytes_per_s / 1e9:.1f} GB/s; prompt {run.prompt_tokens_per_s:.1f} tokens/s"
    )
    report = {
        "shape": args.shape,
        "weights": args.weights,
        "depth": args.depth,
        "dense_layers": shape.dense_layers,
        "expert_layers": shape.expert_layers,
        "experts": shape.config.n_experts,
        "file_bytes": file_bytes,
        "looped_bytes": looped,
        **asdict(run),
        "ms_per_token": run.ms_per_token,
        "bytes_per_s": run.bytes_per_s,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
