"""Which kernels compute one call of an op, with which grids, arguments and workspace. Needs neither Triton nor a GPU.

Served: ``LatentAttention``, ``SparseMoE`` (without shared experts), ``QuantizedSparseMoE``, and two questions the
runtime asks between loop steps: ``RunningColumns`` (``halt_mass``, ``threshold`` -> ``count``) and ``OutputSoFar``
(``out``, ``halt_mass``, ``threshold`` -> ``so_far``). A program depends on shapes alone, never on values in memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mythos_edge.model.errors import BuildError
from mythos_edge.plugins.kernels import variants as table
from mythos_edge.plugins.kernels.variants import VARIANTS, grid_size

# Up to so many rows mostly meet different experts, so nothing is gained by sorting them.
DECODE_ROWS = 8
# Programs that keep a large GPU busy, and the least context worth a program of its own.
_PROGRAMS, _SPLIT_COLUMNS = 256, 64
_LONG = 1 << 20
_WORKSPACE_ALIGNMENT = 256
_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "i32": 4}

Shapes = Mapping[str, tuple[int, ...]]
Dtypes = Mapping[str, str]
Attributes = Mapping[str, int | float]


@dataclass(frozen=True)
class Pointer:
    """The address of an input or the output of the op, by its formal name."""

    name: str


@dataclass(frozen=True)
class Workspace:
    """An address inside the workspace."""

    offset_bytes: int


@dataclass(frozen=True)
class Integer:
    """An int32 argument."""

    value: int


@dataclass(frozen=True)
class Float:
    """A float32 argument."""

    value: float


Argument = Pointer | Workspace | Integer | Float


@dataclass(frozen=True)
class Launch:
    """One kernel of the table ``kernels.variants`` with its grid and its arguments in the kernel's order."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Program:
    """Launches in order, each of which may read what those before it wrote."""

    launches: tuple[Launch, ...]
    workspace_bytes: int


def program(op: str, shapes: Shapes, dtypes: Dtypes, attributes: Attributes) -> Program:
    """The launches of one call; shapes and dtypes are keyed by the formal inputs, shapes of int4 are logical.

    Raises BuildError for an op, shapes or dtypes no kernel serves.
    """
    if op not in _PROGRAMS_OF:
        raise BuildError(f"no kernels for {op}, only for {', '.join(_PROGRAMS_OF)}: leave it to TensorRT")
    return _PROGRAMS_OF[op](shapes, dtypes, attributes)


def variants(op: str, shapes: Shapes, dtypes: Dtypes, attributes: Attributes, max_rows: int) -> tuple[str, ...]:
    """The kernels ``program`` may ask for with 1 to ``max_rows`` rows and any context, in order of their names.

    Sizes in ``shapes`` that a call may change (batch, rows, context) are not looked at and may be -1.
    """
    names: set[str] = set()
    for rows in {1, min(max_rows, DECODE_ROWS), max_rows}:
        for context in (0, _LONG):
            sized = _resized(shapes, rows, context)
            names |= {launch.kernel for launch in program(op, sized, dtypes, attributes).launches}
    return tuple(sorted(names))


def _resized(shapes: Shapes, rows: int, context: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a call with so many rows and columns."""

    def resized(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if name == "x":
            return (rows, *shape[1:])
        if name in ("q", "rows", "past", "out", "halt_mass"):
            return (1, context if name == "past" else rows, *shape[2:])
        return (1,) if name == "first" else shape

    return {name: resized(name, shape) for name, shape in shapes.items()}


class _Writer:
    """Collects launches; ``sizes`` name what grids and integer arguments are made of."""

    def __init__(self, sizes: dict[str, int], floats: dict[str, float] | None = None) -> None:
        self.sizes, self._floats = sizes, floats or {}
        self._launches: list[Launch] = []
        self._places: dict[str, Argument] = {}
        self._bytes = 0

    def workspace(self, name: str, dtype: str, count: int) -> None:
        """Room for ``count`` values that kernels know as ``name``."""
        self._places[name] = Workspace(self._bytes)
        self._bytes += -(-count * _BYTES[dtype] // _WORKSPACE_ALIGNMENT) * _WORKSPACE_ALIGNMENT

    def launch(self, kernel: str, **sizes: int) -> None:
        """One launch; ``sizes`` hold for it alone."""
        variant, known = VARIANTS[kernel], self.sizes | sizes
        x, y, z = (grid_size(rule, known) for rule in variant.grid)
        arguments = tuple(self._argument(name, kind, known) for name, kind in variant.arguments)
        self._launches.append(Launch(kernel, (x, y, z), arguments))

    def _argument(self, name: str, kind: str, sizes: Mapping[str, int]) -> Argument:
        if kind.startswith("*"):
            return self._places.get(name, Pointer(name))
        return Float(self._floats[name]) if kind == "fp32" else Integer(sizes[name])

    def program(self) -> Program:
        return Program(tuple(self._launches), self._bytes)


def _compute_dtype(dtypes: Dtypes, names: tuple[str, ...], op: str) -> str:
    """The one dtype of the inputs ``names``."""
    found = {name: dtypes[name] for name in names}
    dtype = found[names[0]]
    if dtype not in table.FLOATS or set(found.values()) != {dtype}:
        raise BuildError(f"{op} has inputs {found}, expected one of {', '.join(table.FLOATS)} for all of them")
    return dtype


def _fits(shapes: Shapes, wanted: Mapping[str, tuple[int, ...]], op: str) -> None:
    for name, shape in wanted.items():
        if tuple(shapes[name]) != shape:
            raise BuildError(f"{op}: {name} is {tuple(shapes[name])}, expected {shape} as the other inputs have it")


def _latent_attention(shapes: Shapes, dtypes: Dtypes, attributes: Attributes) -> Program:
    op = "LatentAttention"
    dtype = _compute_dtype(dtypes, ("q", "rows", "past"), op)
    batch, chunk, heads, width = shapes["q"]
    columns, values = shapes["past"][1], int(attributes["value_dim"])
    _fits(shapes, {"rows": (batch, chunk, width), "past": (batch, columns, width), "first": (batch,)}, op)
    kernel = _attention_kernel(dtype, values, width - values)
    sizes = {"batch": batch, "chunk": chunk, "heads": heads, "columns": columns, "queries": chunk * heads}
    splits = _splits(batch, chunk, heads, columns)
    sizes |= {"values": values, "ropes": width - values, "splits": splits}
    writer = _Writer(sizes, {"scale": float(attributes["scale"])})
    partials = batch * chunk * heads * splits if splits > 1 else 0
    writer.workspace("partials", "fp32", partials * values)
    writer.workspace("sums_log", "fp32", partials)
    writer.launch(kernel)
    if splits > 1:
        writer.launch(f"merge_splits_{dtype}")
    return writer.program()


def _splits(batch: int, chunk: int, heads: int, columns: int) -> int:
    tiles = batch * -(-chunk * heads // table.QUERIES)
    # The context at hand is not known here: a split is a share of what is there, and may be empty.
    return max(1, min(table.MAX_SPLITS, _PROGRAMS // tiles, (columns + chunk) // _SPLIT_COLUMNS))


def _attention_kernel(dtype: str, values: int, ropes: int) -> str:
    aligned = values % table.ALIGNED == 0 and ropes % table.ALIGNED == 0 and ropes <= table.ROPES
    ranks, suffix, most = (
        (table.RANKS[dtype], "", table.ROPES) if aligned else (table.ANY_RANKS, "_any", table.ANY_ROPES)
    )
    fitting = [rank for rank in ranks if values <= rank]
    if not fitting or not 0 <= ropes <= most or values < 1:
        raise BuildError(
            f"latent attention in {dtype} with a latent rank of {values} and {ropes} rotary channels has no kernel, "
            f"expected at most {ranks[-1]} and {most}: build with --target ort-cuda, or use --target ort-cpu"
        )
    return f"latent_attention_{dtype}_{fitting[0]}{suffix}"


def _sparse_moe(shapes: Shapes, dtypes: Dtypes, attributes: Attributes) -> Program:
    op = "SparseMoE"
    if "shared_gate_up" in shapes:
        raise BuildError("SparseMoE has shared experts, expected none on TensorRT: the lowering makes them products")
    dtype = _compute_dtype(dtypes, ("x", "router", "router_bias", "fc1", "fc2"), op)
    sizes = _moe_sizes(shapes, attributes, "fc1", op)
    _fits(shapes, {"fc2": (sizes["experts"], sizes["dim"], sizes["units"])}, op)
    aligned = sizes["dim"] % table.ALIGNED == 0 and sizes["units"] % table.ALIGNED == 0
    few = sizes["rows"] <= DECODE_ROWS or not aligned
    return _experts(sizes, dtype, "" if aligned else "_any", few, (1, 1))


def _quantized_sparse_moe(shapes: Shapes, dtypes: Dtypes, attributes: Attributes) -> Program:
    op = "QuantizedSparseMoE"
    dtype = _compute_dtype(dtypes, ("x", "router", "router_bias", "fc1_scale", "fc2_scale"), op)
    codes = dtypes["fc1_codes"]
    if codes not in table.CODES or dtypes["fc2_codes"] != codes:
        found = f"{codes} and {dtypes['fc2_codes']}"
        raise BuildError(f"{op} has codes of {found}, expected one of {', '.join(table.CODES)} for both")
    sizes = _moe_sizes(shapes, attributes, "fc1_codes", op)
    experts, dim, units = (sizes[name] for name in ("experts", "dim", "units"))
    blocks = shapes["fc1_scale"][-1], shapes["fc2_scale"][-1]
    wanted = {"fc1_scale": (experts, 2 * units, blocks[0]), "fc2_scale": (experts, dim, blocks[1])}
    _fits(shapes, wanted | {"fc2_codes": (experts, dim, units)}, op)
    for length, count in ((dim, blocks[0]), (units, blocks[1])):
        if length % (count * table.GROUP):
            raise BuildError(
                f"{op}: {length} codes in {count} blocks have no kernel, expected blocks of a multiple of "
                f"{table.GROUP}: build with --weights none"
            )
    few = sizes["rows"] <= DECODE_ROWS or dtype == "fp32"
    return _experts(sizes, dtype, f"_{codes}", few, blocks)


def _moe_sizes(shapes: Shapes, attributes: Attributes, fc1: str, op: str) -> dict[str, int]:
    (rows, dim), (experts, both, _) = shapes["x"], shapes[fc1]
    top_k = int(attributes["top_k"])
    _fits(shapes, {"router": (experts, dim), "router_bias": (experts,), fc1: (experts, both // 2 * 2, dim)}, op)
    if experts > table.MAX_EXPERTS or not 1 <= top_k <= experts:
        raise BuildError(
            f"{op}: the best {top_k} of {experts} experts have no kernel, expected at most {table.MAX_EXPERTS} experts "
            "and no more chosen than there are"
        )
    return {"rows": rows, "dim": dim, "experts": experts, "units": both // 2, "top_k": top_k, "pairs": rows * top_k}


def _experts(sizes: dict[str, int], dtype: str, suffix: str, few: bool, blocks: tuple[int, int]) -> Program:
    """Router and routed experts, ``few`` rows or many; ``suffix`` names the kind of weights in kernel names."""
    writer = _Writer(sizes)
    pairs, experts = sizes["pairs"], sizes["experts"]
    writer.workspace("logits", "fp32", sizes["rows"] * experts)
    writer.workspace("chosen", "i32", pairs)
    writer.workspace("weights", "fp32", pairs)
    writer.workspace("hidden", "fp32" if few else dtype, pairs * sizes["units"])
    writer.launch(f"router_logits_{dtype}{'' if sizes['dim'] % table.ALIGNED == 0 else '_any'}")
    writer.launch(f"router_top_k_{dtype}")
    if few:
        writer.launch(f"decode_gate_up_{dtype}{suffix}", blocks=blocks[0])
        writer.launch(f"decode_down_{dtype}{suffix}", blocks=blocks[1])
        return writer.program()
    tiles = -(-pairs // table.TILE_ROWS) + experts
    writer.workspace("order", "i32", pairs)
    writer.workspace("starts", "i32", experts + 1)
    writer.workspace("tile_expert", "i32", tiles)
    writer.workspace("made", "fp32", pairs * sizes["dim"])
    writer.launch("group_pairs", tiles=tiles)
    writer.launch(f"prefill_gate_up_{dtype}{suffix}", blocks=blocks[0])
    writer.launch(f"prefill_down_{dtype}{suffix}", blocks=blocks[1])
    writer.launch(f"combine_choices_{dtype}")
    return writer.program()


def _running_columns(shapes: Shapes, dtypes: Dtypes, attributes: Attributes) -> Program:
    _compute_halting(dtypes, "RunningColumns")
    writer = _Writer({"columns": shapes["halt_mass"][-1]})
    writer.launch("running_columns")
    return writer.program()


def _output_so_far(shapes: Shapes, dtypes: Dtypes, attributes: Attributes) -> Program:
    _compute_halting(dtypes, "OutputSoFar")
    dtype = _compute_dtype(dtypes, ("out",), "OutputSoFar")
    *leading, dim = shapes["out"]
    rows = 1
    for size in leading:
        rows *= size
    writer = _Writer({"rows": rows, "dim": dim})
    writer.launch(f"output_so_far_{dtype}")
    return writer.program()


def _compute_halting(dtypes: Dtypes, op: str) -> None:
    if dtypes["halt_mass"] != "fp32":
        raise BuildError(f"{op}: halt_mass is {dtypes['halt_mass']}, expected fp32: halting is decided in float32")


_PROGRAMS_OF: dict[str, Callable[[Shapes, Dtypes, Attributes], Program]] = {
    "LatentAttention": _latent_attention,
    "SparseMoE": _sparse_moe,
    "QuantizedSparseMoE": _quantized_sparse_moe,
    "RunningColumns": _running_columns,
    "OutputSoFar": _output_so_far,
}
