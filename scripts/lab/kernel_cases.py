"""Calls of the custom ops at a model's shapes: their inputs, the oracle's answer, and the bytes a GPU has to move.

Weights repeat a block of random values, so that gigabytes of them are made in seconds. Not here: GPUs.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.families.openmythos.config import MythosConfig
from mythos_edge.plugins import reference

Array = NDArray[Any]
NUMPY: dict[str, Any] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "int8": np.int8,
    "int4": np.int8,
    "fp8": ml_dtypes.float8_e4m3fn,
}
# Relative to the norm of the oracle's answer. Sums are float32 everywhere; what is left is the rounding of the
# output and of one intermediate value, each half a unit in the last place at most.
TOLERANCES = {"fp32": 2e-5, "fp16": 2e-3, "bf16": 1.6e-2}
_CODE_BLOCK = 128
_PATTERN = 1 << 20
_SCALE = {"int8": 127.0, "int4": 7.0, "fp8": 128.0}
_CONTEXTS = (128, 512, 1024, 2048, 4096)
_ROWS = (1, 64)
_FLOATS = ("fp16", "bf16", "fp32")
# Cases that run in a process of their own: an illegal address takes the others of its group only.
GROUPS = (
    *(f"experts {kind}" for kind in (*_FLOATS, "int8", "int4", "fp8")),
    *(f"attention {kind}" for kind in _FLOATS),
)


@dataclass(frozen=True)
class Case:
    """One call: ``inputs`` by formal name with logical shapes (int4 as int8), ``dtypes`` as ``launches`` names them.

    ``turns`` are other values of one input, all of which the same call takes: run in turn they touch more memory than
    the caches of a GPU hold. ``decode`` marks the calls that the bandwidth target is for.
    """

    label: str
    op: str
    output: str
    dtype: str
    inputs: dict[str, Array]
    dtypes: dict[str, str]
    attributes: dict[str, int | float]
    output_shape: tuple[int, ...]
    bytes_moved: int
    wanted: Callable[[], Array]
    turns: tuple[str, int] = ("", 0)
    decode: bool = False
    notes: Mapping[str, int] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.inputs.items()}


def cases_of(group: str, name: str, config: MythosConfig, contexts: tuple[int, ...] = _CONTEXTS) -> Iterator[Case]:
    """The cases of one of GROUPS, made as they are asked for: the weights of some are gigabytes."""
    assert group in GROUPS, group
    op, _, kind = group.partition(" ")
    for rows in _ROWS:
        if op == "attention":
            for context in contexts:
                yield attention(name, config, rows, kind, context)
        elif kind in _FLOATS:
            yield experts(name, config, rows, kind, "")
        else:
            yield experts(name, config, rows, "fp16", kind)


def experts(name: str, config: MythosConfig, rows: int, dtype: str, codes: str) -> Case:
    """SparseMoE, or QuantizedSparseMoE with weights of ``codes``."""
    random = np.random.default_rng(0)
    count, dim, units, top_k = config.n_experts, config.dim, config.expert_dim, config.n_experts_per_tok
    kind = NUMPY[dtype]
    inputs: dict[str, Array] = {
        "x": random.standard_normal((rows, dim)).astype(kind),
        "router": (random.standard_normal((count, dim)) / dim**0.5).astype(kind),
        "router_bias": (0.1 * random.standard_normal(count)).astype(kind),
    }
    stacks = {"fc1": (count, 2 * units, dim), "fc2": (count, dim, units)}
    for stack, shape in stacks.items():
        if codes:
            blocks = (*shape[:2], max(1, shape[2] // _CODE_BLOCK))
            inputs[f"{stack}_codes"] = _codes(random, shape, codes)
            spread = 2.0 / (_SCALE[codes] * shape[2] ** 0.5)
            inputs[f"{stack}_scale"] = _repeated(random.uniform(0.5, 1.5, _PATTERN) * spread, blocks).astype(kind)
        else:
            inputs[stack] = _repeated((random.standard_normal(_PATTERN) / shape[2] ** 0.5).astype(kind), shape)
    dtypes = {key: codes if key.endswith("_codes") else dtype for key in inputs}
    used = chosen_experts(inputs, top_k)
    per_expert = sum(stored_bytes(array, dtypes[key]) for key, array in inputs.items() if key.startswith("fc")) // count
    fixed = sum(stored_bytes(inputs[key], dtype) for key in ("x", "router", "router_bias"))
    oracle = reference.quantized_sparse_moe if codes else reference.sparse_moe
    return Case(
        label=f"{name} experts {codes or dtype}, {_rows(rows)}",
        op="QuantizedSparseMoE" if codes else "SparseMoE",
        output="y",
        dtype=dtype,
        inputs=inputs,
        dtypes=dtypes,
        attributes={"top_k": top_k},
        output_shape=(rows, dim),
        bytes_moved=fixed + len(used) * per_expert + stored_bytes(inputs["x"], dtype),
        wanted=lambda: oracle(**inputs, top_k=top_k),
        turns=("x", -(-count // top_k)),
        decode=rows == 1,
        notes={"experts": len(used)},
    )


def attention(name: str, config: MythosConfig, rows: int, dtype: str, context: int, filled: int | None = None) -> Case:
    """LatentAttention with room for ``context`` cached columns, of which the first ``filled`` (or all) are."""
    random = np.random.default_rng(0)
    filled = context if filled is None else filled
    heads, rank = config.n_heads, config.kv_lora_rank
    width = config.cache_width
    kind = NUMPY[dtype]
    inputs: dict[str, Array] = {
        "q": random.standard_normal((1, rows, heads, width)).astype(kind),
        "rows": random.standard_normal((1, rows, width)).astype(kind),
        "past": random.standard_normal((1, context, width)).astype(kind),
        "length": np.array(filled),
        "first": np.zeros(1, np.int64),
    }
    dtypes = {key: "int64" if key in ("length", "first") else dtype for key in inputs}
    scale = width**-0.5
    output_shape = (1, rows, heads, rank)
    return Case(
        label=f"{name} attention {dtype}, context {filled}, {_rows(rows)}",
        op="LatentAttention",
        output="mixed",
        dtype=dtype,
        inputs=inputs,
        dtypes=dtypes,
        attributes={"scale": scale, "value_dim": rank},
        output_shape=output_shape,
        bytes_moved=sum(stored_bytes(array, dtypes[key]) for key, array in inputs.items())
        + int(np.prod(output_shape)) * np.dtype(kind).itemsize,
        wanted=lambda: _attended(inputs, scale, rank),
        turns=("past", max(1, (256 << 20) // stored_bytes(inputs["past"], dtype))),
        decode=rows == 1,
    )


def stored_bytes(array: Array, dtype: str) -> int:
    """The bytes that an input takes on the GPU: two int4 codes are a byte."""
    return array.size // 2 if dtype == "int4" else array.nbytes


def as_stored(array: Array, dtype: str) -> Array:
    """The bytes of an input as kernels read them: of int4 the element 2i in the low nibble of byte i."""
    if dtype != "int4":
        return np.ascontiguousarray(array)
    pairs = array.reshape(-1, 2).astype(np.uint8)
    packed: Array = (pairs[:, 0] & 15) | (pairs[:, 1] << 4)
    return packed


def chosen_experts(inputs: Mapping[str, Array], top_k: int) -> set[int]:
    """The experts that any row chooses: only their weights are read."""
    logits = inputs["x"].astype(np.float64) @ inputs["router"].astype(np.float64).T
    biased = logits + inputs["router_bias"].astype(np.float64)
    return set(np.argsort(-biased, axis=1, kind="stable")[:, :top_k].ravel().tolist())


def turned(case: Case, turn: int) -> Array:
    """The input that changes from run to run, as it is at the run ``turn``: as large, with other values."""
    name, _ = case.turns
    own = case.inputs[name]
    if turn == 0:
        return own
    values = np.random.default_rng([turn, own.size]).standard_normal(_PATTERN).astype(np.float32)
    return _repeated(values, own.shape).astype(own.dtype)


def relative_error(found: Array, wanted: Array) -> float:
    """The norm of the difference over that of ``wanted``; infinite when something found is not finite."""
    if not np.isfinite(found.astype(np.float64)).all():
        return float("inf")
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted))


def _attended(inputs: Mapping[str, Array], scale: float, rank: int) -> Array:
    length = int(inputs["length"])
    attended: Array = reference.latent_attention(
        inputs["q"], inputs["rows"], inputs["past"], length, inputs["first"], scale=scale, value_dim=rank
    )
    return attended


def _codes(random: np.random.Generator, shape: tuple[int, ...], codes: str) -> Array:
    if codes == "fp8":
        return _repeated((30 * random.standard_normal(_PATTERN)).astype(NUMPY[codes]), shape)
    largest = int(_SCALE[codes])
    return _repeated(random.integers(-largest, largest + 1, _PATTERN).astype(np.int8), shape)


def _repeated(pattern: Array, shape: tuple[int, ...]) -> Array:
    """An array of ``shape`` filled with the pattern, whose length no row divides, so that rows differ."""
    count = int(np.prod(shape, dtype=np.int64))
    # An odd length shifts the pattern from row to row.
    return np.resize(pattern[: _PATTERN - 1], count).reshape(shape)


def _rows(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"
