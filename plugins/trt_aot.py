"""Ahead-of-time plugins of full TensorRT: the engine carries PTX and needs no Python, for one kernel a plugin.

So an op is a chain of pieces (``op_pieces``), joined by tensors that would be workspace. TensorRT gives a kernel the
pointers of its inputs, then integers, then the pointers of its outputs: the PTX is rearranged to take them so, and a
float travels as the integer of the same bits.
What is lost against ``trt_plugins``: the experts always use the kernels for few rows, and the number of parts that
attention over a long context is split into is fixed when the graph is made. TensorRT for RTX has no such plugins.
"""

import importlib
import inspect
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.errors import BackendUnavailable, BuildError
from mythos_edge.plugins import kernel_store, launches, op_pieces
from mythos_edge.plugins.kernels import variants
from mythos_edge.plugins.kernels.variants import VARIANTS
from mythos_edge.plugins.ops import DOMAIN, FLOAT_ATTRIBUTES, OpSpec
from mythos_edge.plugins.ptx_parameters import rearranged
from mythos_edge.plugins.trt_bindings import version
from mythos_edge.plugins.trt_plugins import DTYPES

# An axis: a number, or TensorRT's expression of one that is known when the engine runs.
Size = Any
Shapes = Mapping[str, Sequence[Size]]
Sizes = dict[str, Size]
Attributes = Mapping[str, Any]
Divide = Callable[[Size, Size], Size]


@dataclass(frozen=True)
class Piece:
    """How one kernel computes an op of ``op_pieces``; inputs it does not take only lend their shape or dtype.

    ``sizes`` and ``kernel`` say what the kernel's rule for its grid and its integers are made of, and which kernel it
    is; ``shapes`` are those of the outputs.
    """

    spec: OpSpec
    sizes: Callable[[Shapes, Attributes], Sizes]
    kernel: Callable[[Mapping[str, str], Sizes], str]
    shapes: Callable[[Sizes], tuple[tuple[Size, ...], ...]]


@dataclass(frozen=True)
class PieceLaunch:
    """The kernel of a piece, its grid, and its scalars by name, in the order of its arguments."""

    kernel: str
    grid: tuple[Size, Size, Size]
    scalars: dict[str, Size]


def launch_of(
    piece: Piece, shapes: Shapes, dtypes: Mapping[str, str], attributes: Attributes, divide: Divide
) -> PieceLaunch:
    """What ``piece`` launches; ``divide`` rounds up. Raises BuildError where there is no kernel."""
    sizes = piece.sizes(shapes, attributes)
    kernel = piece.kernel({**dtypes, "": dtypes[piece.spec.typed_by]}, sizes)
    if kernel not in VARIANTS:
        raise BuildError(f"{piece.spec.name}: there is no kernel {kernel}: build with another --dtype or --weights")
    variant = VARIANTS[kernel]
    x, y, z = (_extent(rule, sizes, divide) for rule in variant.grid)
    scalars = {name: sizes[name] for name, kind in variant.arguments if not kind.startswith("*")}
    return PieceLaunch(kernel, (x, y, z), scalars)


def ptx_of(piece: Piece, kernel: str, compute_capability: int) -> str:
    """The PTX of ``kernel`` with parameters as TensorRT gives them to ``piece``."""
    names = [name for name, _ in VARIANTS[kernel].arguments]
    scalars = [number for number, (_, kind) in enumerate(VARIANTS[kernel].arguments) if not kind.startswith("*")]
    inputs = [names.index(name) if name in names else None for name in piece.spec.inputs]
    outputs = [names.index(name) if name in names else None for name in piece.spec.outputs]
    entry = kernel_store.kernel(kernel, compute_capability).entry
    return rearranged(kernel_store.ptx(kernel, compute_capability), entry, [*inputs, *scalars, *outputs])


def register(trt: ModuleType, compute_capability: int) -> None:
    """Declares all pieces to the bindings ``trt``, with the PTX for one GPU; once a process.

    Raises BackendUnavailable for a TensorRT without ahead-of-time plugins.
    """
    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise BackendUnavailable(
            f"{trt.__name__} {version(trt)} has no ahead-of-time plugins, TensorRT 10.9 and newer have",
            "pip install 'mythos-edge[tensorrt]'",
        )
    plugin = importlib.import_module(f"{trt.__name__}.plugin")
    for piece in PIECES:
        name = f"{DOMAIN}::{piece.spec.name}"
        plugin.register(name)(_description(piece, trt, plugin))
        plugin.aot_impl(name)(_implementation(piece, plugin, compute_capability))


def _description(piece: Piece, trt: ModuleType, plugin: Any) -> Callable[..., Any]:
    """The function that tells TensorRT shapes and types of a piece's outputs."""
    members = {name: getattr(trt.DataType, member) for member, name in DTYPES.items()}
    several: Any = tuple.__class_getitem__((plugin.TensorDesc,) * len(piece.spec.outputs))
    signature = inspect.Signature(
        _parameters(piece, plugin), return_annotation=several if len(piece.spec.outputs) > 1 else plugin.TensorDesc
    )

    def describe(*tensors: Any, **attributes: Any) -> Any:
        given = _bound(piece, signature, *tensors, **attributes)
        sizes = piece.sizes({name: given[name].shape_expr for name in piece.spec.inputs}, given)
        kinds = [piece.spec.types.get(name) for name in piece.spec.outputs]
        made = tuple(
            plugin.from_shape_expr(shape, members[kind] if kind else given[piece.spec.typed_by].dtype)
            for shape, kind in zip(piece.shapes(sizes), kinds, strict=True)
        )
        return made if len(made) > 1 else made[0]

    return _signed(describe, signature)


def _implementation(piece: Piece, plugin: Any, compute_capability: int) -> Callable[..., Any]:
    """The function that gives TensorRT a piece's kernel and how to launch it."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = [inspect.Parameter("outputs", kind), inspect.Parameter("tactic", kind, annotation=int)]
    result = tuple[str, str, plugin.KernelLaunchParams, plugin.SymIntExprs]
    signature = inspect.Signature([*_parameters(piece, plugin), *own], return_annotation=result)

    def implement(*arguments: Any) -> Any:
        given = _bound(piece, signature, *arguments)
        tensors = {name: given[name] for name in piece.spec.inputs}
        launch = launch_of(
            piece,
            {name: tensor.shape_expr for name, tensor in tensors.items()},
            {name: DTYPES.get(tensor.dtype.name, "") for name, tensor in tensors.items()},
            given,
            plugin.cdiv,
        )
        kernel = kernel_store.kernel(launch.kernel, compute_capability)
        grid = dict(zip(("grid_x", "grid_y", "grid_z"), launch.grid, strict=True))
        parameters = plugin.KernelLaunchParams(**grid, block_x=kernel.threads, shared_mem=kernel.shared_bytes)
        scalars = plugin.SymIntExprs(len(launch.scalars))
        for index, value in enumerate(launch.scalars.values()):
            scalars[index] = plugin.SymInt32(bits_of(value) if isinstance(value, float) else value)
        return kernel.entry, ptx_of(piece, launch.kernel, compute_capability), parameters, scalars

    return _signed(implement, signature)


def bits_of(value: float) -> int:
    """The int32 whose bits are those of ``value`` as a float32."""
    number: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return number


def _bound(piece: Piece, signature: inspect.Signature, *arguments: Any, **named: Any) -> dict[str, Any]:
    """Tensors and attributes by name."""
    given = signature.bind(*arguments, **named).arguments
    return given | {name: given[name].item() for name in piece.spec.attributes}


def _parameters(piece: Piece, plugin: Any) -> list[inspect.Parameter]:
    # Arrays of one number: TensorRT up to 10.16 makes int and float of them in a way that NumPy refuses since 2.4.
    attributes = {
        name: NDArray[np.float32] if name in FLOAT_ATTRIBUTES else NDArray[np.int32] for name in piece.spec.attributes
    }
    types = {**dict.fromkeys(piece.spec.inputs, plugin.TensorDesc), **attributes}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [inspect.Parameter(name, kind, annotation=of) for name, of in types.items()]


def _signed(function: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """``function`` with the signature that TensorRT's decorators read a plugin's inputs and attributes from."""
    # inspect honours it on any callable; the type of functions does not list it.
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def _extent(rule: str, sizes: Sizes, divide: Divide) -> Size:
    """``variants.grid_size`` for numbers and expressions; these want to stand left of their operators."""
    total, operation = None, ""
    for token in re.findall(r"\w+|[*/+]", rule):
        if token in "*/+":
            operation = token
            continue
        value = int(token) if token.isdigit() else sizes[token]
        if total is None:
            total = value
        elif operation == "/":
            numbers = isinstance(total, int) and isinstance(value, int)
            total = -(-total // value) if numbers else divide(total, value)
        else:
            left, right = (value, total) if isinstance(total, int) else (total, value)
            total = left * right if operation == "*" else left + right
    return total


def _known(size: Size) -> Size:
    """The number of an axis that is fixed when the engine is built; while TensorRT asks for types, nothing is."""
    return size if isinstance(size, int) or size.is_fake else int(size.constant_value())


def _aligned(*sizes: Size) -> str:
    """The end of the names of kernels for rows that do, or do not, begin at multiples of 16 bytes."""
    return "" if all(_known(size) % variants.ALIGNED == 0 for size in sizes) else "_any"


def _attention_sizes(shapes: Shapes, attributes: Attributes) -> Sizes:
    batch, chunk, heads, width = shapes["q"]
    values, splits = int(attributes["value_dim"]), int(attributes["splits"])
    sizes = {"batch": batch, "chunk": chunk, "heads": heads, "columns": shapes["past"][1], "queries": chunk * heads}
    return sizes | {
        "values": values,
        "ropes": _known(width) - values,
        "splits": splits,
        "scale": float(attributes["scale"]),
    }


def _attention_kernel(dtypes: Mapping[str, str], sizes: Sizes) -> str:
    heads, width = _known(sizes["heads"]), sizes["values"] + sizes["ropes"]
    shapes = {"q": (1, 1, heads, width), "rows": (1, 1, width), "past": (1, 0, width), "length": (), "first": (1,)}
    kinds = dict.fromkeys(shapes, dtypes[""])
    attributes = {"scale": sizes["scale"], "value_dim": sizes["values"]}
    return launches.program("LatentAttention", shapes, kinds, attributes).launches[0].kernel


def _merge_sizes(shapes: Shapes, attributes: Attributes) -> Sizes:
    batch, chunk, heads, splits, values = shapes["partials"]
    sizes = {"batch": batch, "chunk": chunk, "heads": heads, "splits": splits, "values": values}
    return sizes | {"queries": chunk * heads}


def _experts_sizes(shapes: Shapes, attributes: Attributes) -> Sizes:
    """Sizes of either half of the experts: one knows the input, the other the output."""
    rows, codes = shapes["chosen"][0], "fc1_codes" in shapes or "fc2_codes" in shapes
    sizes: Sizes = {"rows": rows, "top_k": int(attributes["top_k"])}
    if "x" in shapes:
        stack = shapes["fc1_codes" if codes else "fc1"]
        sizes |= {"units": _known(stack[1]) // 2, "dim": _known(stack[2])}
        scale = shapes.get("fc1_scale")
    else:
        stack = shapes["fc2_codes" if codes else "fc2"]
        sizes |= {"units": _known(stack[2]), "dim": _known(stack[1])}
        scale = shapes.get("fc2_scale")
    sizes["experts"] = _known(stack[0])
    return sizes | ({} if scale is None else {"blocks": _known(scale[2])})


def _experts_piece(spec: OpSpec) -> Piece:
    """``gate_up`` (x -> hidden) or ``down`` (hidden -> y) of the chosen experts."""
    half = "gate_up" if "x" in spec.inputs else "down"
    codes = next((name for name, kind in spec.types.items() if kind == "codes"), None)

    def kernel(dtypes: Mapping[str, str], sizes: Sizes) -> str:
        end = f"_{dtypes[codes]}" if codes else _aligned(sizes["dim"], sizes["units"])
        return f"decode_{half}_{dtypes['']}{end}"

    return Piece(
        spec,
        sizes=_experts_sizes,
        kernel=kernel,
        shapes=lambda sizes: (
            ((sizes["rows"] * sizes["top_k"], sizes["units"]),)
            if half == "gate_up"
            else ((sizes["rows"], sizes["dim"]),)
        ),
    )


PIECES = (
    Piece(
        op_pieces.LATENT_ATTENTION_PART,
        sizes=_attention_sizes,
        kernel=_attention_kernel,
        shapes=lambda sizes: (
            (sizes["batch"], sizes["chunk"], sizes["heads"], sizes["values"]),
            (sizes["batch"], sizes["chunk"], sizes["heads"], sizes["splits"], sizes["values"]),
            (sizes["batch"], sizes["chunk"], sizes["heads"], sizes["splits"]),
        ),
    ),
    Piece(
        op_pieces.MERGE_SPLITS,
        sizes=_merge_sizes,
        kernel=lambda dtypes, sizes: f"merge_splits_{dtypes['']}",
        shapes=lambda sizes: ((sizes["batch"], sizes["chunk"], sizes["heads"], sizes["values"]),),
    ),
    Piece(
        op_pieces.ROUTER_LOGITS,
        sizes=lambda shapes, attributes: {
            "rows": shapes["x"][0],
            "dim": _known(shapes["router"][1]),
            "experts": _known(shapes["router"][0]),
        },
        kernel=lambda dtypes, sizes: f"router_logits_{dtypes['']}{_aligned(sizes['dim'])}",
        shapes=lambda sizes: ((sizes["rows"], sizes["experts"]),),
    ),
    Piece(
        op_pieces.ROUTER_TOP_K,
        sizes=lambda shapes, attributes: {
            "rows": shapes["logits"][0],
            "experts": _known(shapes["router_bias"][0]),
            "top_k": int(attributes["top_k"]),
        },
        kernel=lambda dtypes, sizes: f"router_top_k_{dtypes['']}",
        shapes=lambda sizes: ((sizes["rows"], sizes["top_k"]),) * 2,
    ),
    _experts_piece(op_pieces.EXPERTS_GATE_UP),
    _experts_piece(op_pieces.EXPERTS_DOWN),
    _experts_piece(op_pieces.EXPERTS_GATE_UP_CODES),
    _experts_piece(op_pieces.EXPERTS_DOWN_CODES),
)
