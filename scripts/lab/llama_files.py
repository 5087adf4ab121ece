"""GGUF files of random weights for llama.cpp, and how fast it decodes them on this machine: batch 1, CPU only.

What a file holds is a ``Network``. Needs llama-cpp-python and gguf, which no extra brings.
"""

import importlib
import importlib.util
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.errors import BackendUnavailable, UsageError
from mythos_edge.model.output_files import writing

INSTALL = "pip install llama-cpp-python gguf"
# On processors with AMX, the llama.cpp of llama-cpp-python 0.3.36 gives attn_k_b to AMX, which refuses the inputs that
# latent attention has, and aborts. GCC 12 also drops the stores of the tile configuration: any prompt then crashes.
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
INSTALL_WITHOUT_AMX = (
    f"CFLAGS='{_NO_AMX}' CXXFLAGS='{_NO_AMX}' pip install --no-binary llama-cpp-python --no-cache-dir "
    "--force-reinstall llama-cpp-python"
)


class Network(Protocol):
    """A network that llama.cpp knows: the name of its ``architecture``, its tensors, and its numbers in a file."""

    @property
    def architecture(self) -> str: ...

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the file by name, rows last axis, in the order it is written."""
        ...

    def add_sizes(self, gguf: Any, writer: Any) -> None:
        """Tells the ``GGUFWriter`` the sizes of the network."""
        ...


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


def tensor_bytes(network: Network, quantization: str) -> dict[str, int]:
    """Bytes of every tensor of the file, by name."""
    return {name: stored_bytes(name, value, quantization) for name, value in network.tensor_shapes().items()}


def active_bytes(sizes: Mapping[str, int], experts: int, used: int) -> int:
    """Bytes of weights that one token reads, given each tensor's: of the experts those used, of the embedding none."""
    total = 0.0
    for name, size in sizes.items():
        if name != "token_embd.weight":
            total += size * used / experts if "_exps." in name else size
    return round(total)


def _quantization_of(name: str, shape: tuple[int, ...], quantization: str) -> Quantization:
    # llama.cpp keeps vectors and routers in float32 in files of every type.
    kept = len(shape) == 1 or "ffn_gate_inp" in name or ".router." in name
    return QUANTIZATIONS["float32" if kept else quantization]


def stored_bytes(name: str, shape: tuple[int, ...], quantization: str) -> int:
    """Bytes of a tensor of that name and shape."""
    how = _quantization_of(name, shape, quantization)
    return math.prod(shape[:-1]) * math.ceil(shape[-1] / how.block_size) * how.block_bytes


def write_gguf(path: Path, network: Network, quantization: str) -> None:
    """Write the network with random weights to ``path``; memory holds one tensor at a time.

    Raises UsageError when rows are not whole blocks.
    """
    gguf = _library("gguf")
    random = np.random.default_rng(0)
    # The library opens files by name.
    with writing(path, "the model") as file, closing(gguf.GGUFWriter(file.name, network.architecture)) as writer:
        writer.add_file_type(int(gguf.LlamaFileType[QUANTIZATIONS[quantization].file_type]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        # A vocabulary of nameless tokens: ids go in and logits come out.
        writer.add_tokenizer_model("none")
        network.add_sizes(gguf, writer)
        for name, stored in network.tensor_shapes().items():
            _add_info(gguf, writer, name, stored, _quantization_of(name, stored, quantization))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, stored in network.tensor_shapes().items():
            writer.write_tensor_data(_random_tensor(name, stored, quantization, random))


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
    """``active_bytes`` of a GGUF file, by what it holds."""
    reader = _library("gguf").GGUFReader(path)
    architecture = reader.get_field("general.architecture").contents()
    fields = (reader.get_field(f"{architecture}.{key}") for key in ("expert_count", "expert_used_count"))
    experts, used = (1 if field is None else int(field.contents()) for field in fields)
    return active_bytes({tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}, experts, used)


def _library(name: str) -> Any:
    _require(name)
    return importlib.import_module(name)


def _require(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise BackendUnavailable(f"measuring llama.cpp needs {name}", INSTALL)
