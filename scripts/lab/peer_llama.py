"""Measures llama.cpp on this machine: decode speed of a DeepSeek-2 network of random weights, batch 1, CPU only.

    python -m mythos_edge.scripts.lab.peer_llama --shape 1b --experts 16 --weights int4 --depth 4 -p 64 -n 16

llama.cpp knows no loops, so the peer of a looped model is one without: as many distinct expert layers as loop steps
are taken on average, after as many leading dense layers as the prelude and the coda have together. Attention, experts
and head have the looped model's sizes, so a token reads about the same bytes of weights; ``looped_bytes`` says
how nearly. It compares the share of the memory bandwidth, not tokens: the weights are noise.

Differs: where all loop steps would find a small step's weights in the processor's caches, the peer's layers take turns
in them. The dense feed-forward is rounded up to whole blocks of 32. The head is not shared with the embedding.

Prints a line, then one line of JSON. Needs llama-cpp-python and gguf, which no extra brings.
"""

import argparse
import importlib
import importlib.util
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.errors import BackendUnavailable, UsageError
from mythos_edge.model.families.openmythos.config import VARIANTS, MythosConfig
from mythos_edge.model.families.openmythos.shapes import expected_shapes
from mythos_edge.model.machine import cores
from mythos_edge.model.output_files import writing

INSTALL = "pip install llama-cpp-python gguf"
# On processors with AMX, the llama.cpp of llama-cpp-python 0.3.36 gives attn_k_b to AMX, which refuses the inputs that
# latent attention has, and aborts. GCC 12 also drops the stores of the tile configuration: any prompt then crashes.
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
INSTALL_WITHOUT_AMX = (
    f"CFLAGS='{_NO_AMX}' CXXFLAGS='{_NO_AMX}' pip install --no-binary llama-cpp-python --no-cache-dir "
    "--force-reinstall llama-cpp-python"
)
ARCHITECTURE = "deepseek2"
MOST_FILE_BYTES = 6_000_000_000
# llama.cpp takes these layer counts for DeepSeek-V2-Lite, whose queries have no low rank.
_LITE_LAYERS = (26, 27)


@dataclass(frozen=True)
class Quantization:
    """How ggml stores a matrix: ``block_bytes`` for each ``block_size`` values of a row."""

    tensor_type: str
    file_type: str
    block_size: int
    block_bytes: int
    # Standard deviation of a value whose bits are random, at scale 1; 0 where values are floats.
    deviation: float = 0.0


QUANTIZATIONS = {
    "int4": Quantization("Q4_0", "MOSTLY_Q4_0", 32, 18, math.sqrt((16**2 - 1) / 12)),
    "int8": Quantization("Q8_0", "MOSTLY_Q8_0", 32, 34, math.sqrt((256**2 - 1) / 12)),
    "float16": Quantization("F16", "MOSTLY_F16", 1, 2),
    "float32": Quantization("F32", "ALL_F32", 1, 4),
}


@dataclass(frozen=True)
class LlamaShape:
    """A DeepSeek-2 network with the layer sizes of ``config``; its experts may be fewer than the looped model's."""

    config: MythosConfig
    dense_layers: int
    expert_layers: int

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


@dataclass(frozen=True)
class LlamaRun:
    """One measurement; ``active_bytes`` are the bytes of weights that decoding one token reads."""

    version: str
    threads: int
    load_s: float
    prompt_tokens: int
    prompt_tokens_per_s: float
    decode_ms: list[float]
    active_bytes: int

    @property
    def ms_per_token(self) -> float:
        """Median milliseconds of decoding one token."""
        return statistics.median(self.decode_ms)

    @property
    def bytes_per_s(self) -> float:
        """Weights read per second of decoding, to be held against the machine's stream bandwidth."""
        return self.active_bytes / self.ms_per_token * 1e3


def shape_from_config(
    config: MythosConfig, mean_depth: float, quantization: str, most_file_bytes: int = MOST_FILE_BYTES
) -> LlamaShape:
    """The network that reads about as many bytes per token as ``config`` does at ``mean_depth`` loop steps.

    Experts are halved until the file fits ``most_file_bytes``, never below those that a token uses: what a token reads
    stays, up to the router's rows. Raises UsageError where there is no such network.
    """
    if not config.is_mla or not config.n_shared_experts:
        raise UsageError(f"DeepSeek-2 has latent attention and shared experts; this config: {config}")
    dense_layers = config.prelude_layers + config.coda_layers
    shape = LlamaShape(config, dense_layers, expert_layers=max(1, round(mean_depth)))
    if shape.block_count in _LITE_LAYERS:
        raise UsageError(f"{shape.block_count} layers mean DeepSeek-V2-Lite to llama.cpp: change the depth by one")
    while sum(tensor_bytes(shape, quantization).values()) > most_file_bytes:
        fewer = shape.config.n_experts // 2
        if fewer < config.n_experts_per_tok:
            size = sum(tensor_bytes(shape, quantization).values())
            raise UsageError(f"the file has {size} bytes at least, expected at most {most_file_bytes}: lower the depth")
        shape = replace(shape, config=replace(shape.config, n_experts=fewer))
    return shape


def tensor_shapes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the file by name, rows last axis, in the order it is written.

    Source: llama.cpp, ``src/models/deepseek2.cpp`` ``load_arch_tensors``, with latent attention split into k_b and v_b.
    """
    c = shape.config
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (c.vocab_size, c.dim)}
    for index in range(shape.block_count):
        layer = _attention(c) | (_dense(shape) if index < shape.dense_layers else _experts(shape))
        shapes |= {f"blk.{index}.{name}": value for name, value in layer.items()}
    shapes |= {"output_norm": (c.dim,), "output": (c.vocab_size, c.dim)}
    return {f"{name}.weight": value for name, value in shapes.items()}


def _attention(c: MythosConfig) -> dict[str, tuple[int, ...]]:
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


def _dense(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    dim, hidden = shape.config.dim, shape.dense_dim
    return {"ffn_gate": (hidden, dim), "ffn_up": (hidden, dim), "ffn_down": (dim, hidden)}


def _experts(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    c = shape.config
    return {
        "ffn_gate_inp": (c.n_experts, c.dim),
        "ffn_gate_exps": (c.n_experts, c.expert_dim, c.dim),
        "ffn_up_exps": (c.n_experts, c.expert_dim, c.dim),
        "ffn_down_exps": (c.n_experts, c.dim, c.expert_dim),
        "ffn_gate_shexp": (c.shared_dim, c.dim),
        "ffn_up_shexp": (c.shared_dim, c.dim),
        "ffn_down_shexp": (c.dim, c.shared_dim),
    }


def tensor_bytes(shape: LlamaShape, quantization: str) -> dict[str, int]:
    """Bytes of every tensor of the file, by name."""
    return {name: _bytes(name, value, quantization) for name, value in tensor_shapes(shape).items()}


def active_bytes(sizes: Mapping[str, int], experts: int, used: int) -> int:
    """Bytes of weights that one token reads, given each tensor's: of the experts those used, of the embedding none."""
    total = 0.0
    for name, size in sizes.items():
        if name != "token_embd.weight":
            total += size * used / experts if "_exps." in name else size
    return round(total)


def looped_bytes(config: MythosConfig, mean_depth: float, quantization: str) -> int:
    """Bytes of weights that the looped model reads for a token, stored the same way, each loop step reading anew."""
    total = 0.0
    for name, shape in expected_shapes(config).items():
        size = float(_bytes(name, shape, quantization))
        if ".routed_experts." in name:
            size *= config.n_experts_per_tok / config.n_experts
        total += size * mean_depth if name.startswith("recurrent.") else size
    return round(total)


def _quantization_of(name: str, shape: tuple[int, ...], quantization: str) -> Quantization:
    # llama.cpp keeps vectors and routers in float32 in files of every type.
    kept = len(shape) == 1 or "ffn_gate_inp" in name or ".router." in name
    return QUANTIZATIONS["float32" if kept else quantization]


def _bytes(name: str, shape: tuple[int, ...], quantization: str) -> int:
    how = _quantization_of(name, shape, quantization)
    return math.prod(shape[:-1]) * math.ceil(shape[-1] / how.block_size) * how.block_bytes


def write_gguf(path: Path, shape: LlamaShape, quantization: str) -> None:
    """Write the network with random weights to ``path``; memory holds one tensor at a time.

    Raises UsageError when rows are not whole blocks.
    """
    gguf = _library("gguf")
    random = np.random.default_rng(0)
    # The library opens files by name.
    with writing(path, "the model") as file, closing(gguf.GGUFWriter(file.name, ARCHITECTURE)) as writer:
        _add_metadata(gguf, writer, shape, quantization)
        for name, stored in tensor_shapes(shape).items():
            _add_info(gguf, writer, name, stored, _quantization_of(name, stored, quantization))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, stored in tensor_shapes(shape).items():
            writer.write_tensor_data(_random_tensor(name, stored, quantization, random))


def _add_metadata(gguf: Any, writer: Any, shape: LlamaShape, quantization: str) -> None:
    c = shape.config
    writer.add_file_type(int(gguf.LlamaFileType[QUANTIZATIONS[quantization].file_type]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    # A vocabulary of nameless tokens: ids go in and logits come out.
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_seq_len)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(shape.block_count)
    writer.add_leading_dense_block_count(shape.dense_layers)
    writer.add_feed_forward_length(shape.dense_dim)
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
    writer.add_expert_shared_count(shape.shared_experts)
    writer.add_expert_feed_forward_length(c.expert_dim)
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)


def _add_info(gguf: Any, writer: Any, name: str, shape: tuple[int, ...], how: Quantization) -> None:
    if shape[-1] % how.block_size:
        raise UsageError(f"{name} has rows of {shape[-1]} values, expected a multiple of {how.block_size}")
    count = math.prod(shape) // how.block_size * how.block_bytes
    # The writer takes any float dtype beside an explicit type for a shape in values.
    writer.add_tensor_info(name, shape, np.dtype(np.float32), count, gguf.GGMLQuantizationType[how.tensor_type])


def _random_tensor(name: str, shape: tuple[int, ...], quantization: str, random: np.random.Generator) -> NDArray[Any]:
    """Weights that keep activations of size 1, as stored: floats, or bytes of blocks; norms are ones."""
    how = _quantization_of(name, shape, quantization)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    deviation = shape[-1] ** -0.5
    if not how.deviation:
        values = random.random(shape, np.float32)
        values -= 0.5
        values *= deviation * math.sqrt(12)
        return values.astype(np.float16 if how.tensor_type == "F16" else np.float32, copy=False)
    count = math.prod(shape) // how.block_size
    blocks = np.frombuffer(bytearray(random.bytes(count * how.block_bytes)), np.uint8).reshape(count, how.block_bytes)
    # A block of either type begins with its scale.
    blocks[:, :2] = np.array([deviation / how.deviation], np.float16).view(np.uint8)
    return blocks


def measure(path: Path, prompt_tokens: int, new_tokens: int, threads: int) -> LlamaRun:
    """Speed of the GGUF file at ``path``: a prompt, then ``new_tokens`` tokens one by one, all of random ids.

    Nothing is sampled: with ids drawn before, experts vary from token to token and the network alone is timed.
    It runs in a process of its own, beside no other library's threads. Raises BackendUnavailable when a library is
    missing, or when llama.cpp ended that process.
    """
    for name in ("llama_cpp", "gguf"):
        _require(name)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, path, prompt_tokens, new_tokens, threads).result()
        except BrokenProcessPool as error:
            raise BackendUnavailable("llama.cpp crashed; its build may be at fault", INSTALL_WITHOUT_AMX) from error


def _measure(path: Path, prompt_tokens: int, new_tokens: int, threads: int) -> LlamaRun:
    llama_cpp = _library("llama_cpp")
    active = _file_active_bytes(path)
    started = time.perf_counter()
    with _loaded(llama_cpp, path, prompt_tokens + new_tokens, threads) as llama:
        load_s = time.perf_counter() - started
        ids = np.random.default_rng(0).integers(0, llama.n_vocab(), prompt_tokens + new_tokens).tolist()
        # Touches the weights once and allocates what both kinds of call need.
        llama.eval(ids[:prompt_tokens])
        llama.eval(ids[:1])
        llama.reset()
        prompt_s = _seconds(llama, ids[:prompt_tokens])
        decode_ms = [_seconds(llama, [token]) * 1e3 for token in ids[prompt_tokens:]]
    return LlamaRun(
        version=llama_cpp.__version__,
        threads=threads,
        load_s=load_s,
        prompt_tokens=prompt_tokens,
        prompt_tokens_per_s=prompt_tokens / prompt_s,
        decode_ms=decode_ms,
        active_bytes=active,
    )


@contextmanager
def _loaded(llama_cpp: Any, path: Path, context: int, threads: int) -> Iterator[Any]:
    """The model in ``llama_cpp``, CPU only, closed at the end.

    Differs: flash attention, which the package leaves off and llama.cpp's own programs choose.
    """
    llama = llama_cpp.Llama(
        model_path=str(path),
        n_gpu_layers=0,
        n_ctx=context + 1,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        verbose=False,
    )
    with closing(llama):
        yield llama


def _seconds(llama: Any, ids: list[int]) -> float:
    started = time.perf_counter()
    llama.eval(ids)
    return time.perf_counter() - started


def _file_active_bytes(path: Path) -> int:
    """``active_bytes`` of a GGUF file of the architecture, by what it holds."""
    reader = _library("gguf").GGUFReader(path)
    experts, used = (
        int(reader.get_field(f"{ARCHITECTURE}.{key}").contents()) for key in ("expert_count", "expert_used_count")
    )
    return active_bytes({tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}, experts, used)


def _library(name: str) -> Any:
    _require(name)
    return importlib.import_module(name)


def _require(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise BackendUnavailable(f"measuring llama.cpp needs {name}", INSTALL)


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
