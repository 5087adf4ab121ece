"""The table of compiled kernels: each a source function with its types, tile sizes and grid. Needs no Triton.

The grid is text, evaluated with the sizes of a call from left to right, where ``/`` is a division rounded up:
``"rows*top_k/32+experts"``. ``scripts/build_kernels`` writes the table into the manifest; ``launches`` reads it here.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

_TOKEN = r"\w+|[*/+]"
FLOATS = ("fp16", "bf16", "fp32")
CODES = ("int8", "int4", "fp8")
TILE_ROWS = 32
MAX_EXPERTS = 1024
MAX_SPLITS = 64
QUERIES = 16
# Values of a code that share a scale come in multiples of this, and rows of codes too.
GROUP = 32
# Rows of plain weights that are a multiple of this begin at 16 bytes whatever their type.
ALIGNED = 8
# Latent ranks up to each of these are served by tiles of that width; a width not aligned, by the wide enough of ANY.
RANKS = {"fp16": (64, 256, 512, 1024), "bf16": (64, 256, 512, 1024), "fp32": (64, 256, 512)}
ANY_RANKS = (64, 512)
ROPES, ANY_ROPES = 64, 128
# How the weights of experts may be stored, by the end of a kernel's name, and what their rows are multiples of.
STORED: Mapping[str, Mapping[str, int]] = {
    "": {"dim": ALIGNED, "units": ALIGNED},
    "_any": {},
    **{f"_{codes}": {"dim": GROUP, "units": GROUP} for codes in CODES},
}


@dataclass(frozen=True)
class Variant:
    """One compiled kernel.

    ``source`` is ``module:function`` in this folder; ``arguments`` are (name, type), pointers as ``*fp16``;
    ``constants`` are what the source takes after them, None for what it does not look at.
    ``multiples`` says which integers are multiples of how much, and, when not empty, that pointers are of 16 bytes.
    ``stages`` above 1 says that there are products of tiles to overlap with loads. ``oldest`` is the first compute
    capability that has what the kernel needs.
    """

    name: str
    source: str
    arguments: tuple[tuple[str, str], ...]
    grid: tuple[str, str, str]
    constants: Mapping[str, int | str | None]
    warps: int = 4
    stages: int = 1
    multiples: Mapping[str, int] = field(default_factory=dict)
    oldest: int = 75

    def tuned(self, compute_capability: int) -> "Variant":
        """This kernel as it is compiled for one GPU: what may differ is not seen by a launch but for the threads.

        Triton does not use the tensor cores of Turing: products take more registers, so more threads share them.
        """
        if compute_capability >= 80 or self.stages == 1:
            return self
        depth = {"DEPTH": 32} if "DEPTH" in self.constants else {}
        return replace(self, constants={**self.constants, **depth}, warps=8, stages=1)


def ceiling(total: int, divisor: int) -> int:
    """The quotient rounded up."""
    return -(-total // divisor)


def grid_size(rule: str, sizes: Mapping[str, Any], divide: Callable[[Any, Any], Any] = ceiling) -> Any:
    """The number of programs ``rule`` asks for along one axis.

    Sizes may be expressions of a compiler's where ``divide`` is its division rounded up, of which one is an expression.
    """
    first, *rest = [int(token) if token.isdigit() else sizes.get(token, token) for token in re.findall(_TOKEN, rule)]
    total = first
    for operation, size in zip(rest[::2], rest[1::2], strict=True):
        # Expressions want to stand left of an operator.
        left, right = (size, total) if isinstance(total, int) else (total, size)
        if operation == "/":
            numbers = isinstance(total, int) and isinstance(size, int)
            total = ceiling(total, size) if numbers else divide(total, size)
        else:
            total = left * right if operation == "*" else left + right
    return total


def _arguments(text: str, dtype: str) -> tuple[tuple[str, str], ...]:
    """``"x:* chosen:*i32 dim"`` as (name, type); ``*`` points to ``dtype``, nothing said is an int32."""
    pairs = [part.partition(":")[::2] for part in text.split()]
    return tuple((name, f"*{dtype}" if kind == "*" else kind or "i32") for name, kind in pairs)


def _routers(dtype: str) -> Iterator[Variant]:
    for suffix, multiples in (("", {"dim": ALIGNED}), ("_any", {})):
        yield Variant(
            f"router_logits_{dtype}{suffix}",
            "router:router_logits",
            _arguments("x:* router:* logits:*fp32 experts dim", dtype),
            ("rows", "experts/4", "1"),
            {"EXPERTS": 4, "DEPTH": 1024},
            multiples=multiples,
        )
    yield Variant(
        f"router_top_k_{dtype}",
        "router:router_top_k",
        _arguments("logits:*fp32 router_bias:* chosen:*i32 weights:*fp32 experts top_k", dtype),
        ("rows", "1", "1"),
        {"EXPERTS": MAX_EXPERTS},
    )


def _weights(stack: str, ending: str) -> tuple[str, str, dict[str, int | str | None]]:
    """How a kernel of experts takes its weights: the argument, those after the sizes, and constants."""
    codes = ending[1:]
    if codes in CODES:
        return f"{stack}_codes:*i8", f"{stack}_scale:* blocks", {"WEIGHTS": codes}
    return f"{stack}:*", "", {f"{stack}_scale": None, "blocks": None, "WEIGHTS": "plain"}


def _decode(dtype: str, ending: str) -> Iterator[Variant]:
    fc1, scale, constants = _weights("fc1", ending)
    yield Variant(
        f"decode_gate_up_{dtype}{ending}",
        "experts_decode:decode_gate_up",
        _arguments(f"x:* chosen:*i32 {fc1} hidden:*fp32 experts top_k dim units {scale}", dtype),
        ("rows*top_k", "units/8", "1"),
        constants | {"UNITS": 8, "DEPTH": 512},
        multiples=STORED[ending],
    )
    fc2, scale, constants = _weights("fc2", ending)
    yield Variant(
        f"decode_down_{dtype}{ending}",
        "experts_decode:decode_down",
        _arguments(f"hidden:*fp32 chosen:*i32 weights:*fp32 {fc2} y:* experts top_k dim units {scale}", dtype),
        ("rows", "dim/4", "1"),
        constants | {"CHANNELS": 4, "DEPTH": 1024},
        multiples=STORED[ending],
    )


def _prefill(dtype: str, ending: str) -> Iterator[Variant]:
    # float32 has no tensor cores of its own: small tiles keep the sums in registers.
    width, depth, stages = (16, 32, 1) if dtype == "fp32" else (64, 64, 3)
    tiles = "order:*i32 starts:*i32 tile_expert:*i32"
    fc1, scale, constants = _weights("fc1", ending)
    yield Variant(
        f"prefill_gate_up_{dtype}{ending}",
        "experts_prefill:prefill_gate_up",
        _arguments(f"x:* {tiles} {fc1} hidden:* top_k dim units {scale}", dtype),
        ("rows*top_k/32+experts", f"units/{width}", "1"),
        constants | {"ROWS": TILE_ROWS, "UNITS": width, "DEPTH": depth},
        stages=stages,
        multiples=STORED[ending],
    )
    fc2, scale, constants = _weights("fc2", ending)
    yield Variant(
        f"prefill_down_{dtype}{ending}",
        "experts_prefill:prefill_down",
        _arguments(f"hidden:* {tiles} {fc2} made:*fp32 dim units {scale}", dtype),
        ("rows*top_k/32+experts", f"dim/{2 * width}", "1"),
        constants | {"ROWS": TILE_ROWS, "CHANNELS": 2 * width, "DEPTH": depth},
        stages=stages,
        multiples=STORED[ending],
    )


def _attention(dtype: str) -> Iterator[Variant]:
    arguments = "q:* rows:* past:* length:*i64 first:*i64 mixed:* partials:*fp32 sums_log:*fp32"
    aligned = [("", rank, ROPES, {"values": ALIGNED, "ropes": ALIGNED}) for rank in RANKS[dtype]]
    for suffix, rank, ropes, multiples in [*aligned, *(("_any", rank, ANY_ROPES, {}) for rank in ANY_RANKS)]:
        yield Variant(
            f"latent_attention_{dtype}_{rank}{suffix}",
            "latent_attention:latent_attention",
            _arguments(f"{arguments} scale:fp32 chunk heads columns values ropes splits", dtype),
            ("queries/16", "splits", "batch"),
            {"QUERIES": QUERIES, "COLUMNS": 16, "VALUES": rank, "ROPES": ropes},
            warps=8 if rank >= 1024 or (dtype == "fp32" and rank >= 256) else 4,
            stages=2,
            # Turing has 64 KiB of shared memory for a program.
            oldest=80 if rank >= 512 else 75,
            multiples=multiples,
        )
    yield Variant(
        f"merge_splits_{dtype}",
        "latent_attention:merge_splits",
        _arguments("partials:*fp32 sums_log:*fp32 mixed:* values splits", dtype),
        ("batch*queries", "values/64", "1"),
        {"SPLITS": MAX_SPLITS, "VALUES": 64},
    )


def _halting(dtype: str) -> Iterator[Variant]:
    yield Variant(
        f"output_so_far_{dtype}",
        "halting:output_so_far",
        _arguments("out:* halt_mass:*fp32 threshold:*fp32 so_far:* dim", dtype),
        ("rows", "dim/1024", "1"),
        {"CHANNELS": 1024},
    )


def _all() -> Iterator[Variant]:
    for dtype in FLOATS:
        yield from _routers(dtype)
        for ending in STORED:
            yield from _decode(dtype, ending)
            # Those for few rows serve all where rows are not aligned, and codes in float32, which are for comparing.
            if ending == "" or (ending != "_any" and dtype != "fp32"):
                yield from _prefill(dtype, ending)
        yield Variant(
            f"combine_choices_{dtype}",
            "experts_prefill:combine_choices",
            _arguments("made:*fp32 weights:*fp32 y:* top_k dim", dtype),
            ("rows", "dim/512", "1"),
            {"CHANNELS": 512},
            multiples={"dim": ALIGNED},
        )
        yield from _attention(dtype)
        yield from _halting(dtype)
    yield Variant(
        "group_pairs",
        "experts_prefill:group_pairs",
        _arguments("chosen:*i32 order:*i32 starts:*i32 tile_expert:*i32 pairs experts tiles", ""),
        ("experts", "1", "1"),
        {"ROWS": TILE_ROWS, "BLOCK": 1024},
    )
    yield Variant(
        "running_columns",
        "halting:running_columns",
        _arguments("halt_mass:*fp32 threshold:*fp32 count:*i32 columns", ""),
        ("1", "1", "1"),
        {"BLOCK": 1024},
    )


def _typed(variant: Variant) -> Variant:
    """``variant`` from the first GPU on that has its types."""
    has_bf16 = any(kind == "*bf16" for _, kind in variant.arguments)
    return replace(variant, oldest=max(variant.oldest, 80 if has_bf16 else 75))


VARIANTS: dict[str, Variant] = {variant.name: _typed(variant) for variant in _all()}
