"""Ahead-of-time plugins of full TensorRT: the engine carries PTX and needs no Python, for one kernel a plugin.

So an op is a chain of pieces (``op_pieces``), joined by tensors that would be workspace. TensorRT gives a kernel the
pointers of its inputs, then integers, then the pointers of its outputs: the PTX is rearranged to take them so, and a
float travels as the integer of the same bits.
What is lost against ``trt_plugins``: the experts always use the kernels for few rows, and the number of parts that
attention over a long context is split into is fixed when the graph is made. TensorRT for RTX has no such plugins.
"""

import importlib
import inspect
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.errors import BackendUnavailable
from mythos_edge.plugins import kernel_store, op_pieces, trt_plugins
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
class PiecePlugin:
    """The plugin of a piece: one kernel, which the node's attribute ``kernel`` names.

    ``sizes`` are what the kernel's rule for its grid and its integers are made of, ``shapes`` those of the outputs.
    Inputs the kernel does not take only lend their shape or dtype.
    """

    spec: OpSpec
    sizes: Callable[[Shapes, Attributes], Sizes]
    shapes: Callable[[Sizes], tuple[tuple[Size, ...], ...]]


@dataclass(frozen=True)
class PieceLaunch:
    """The grid of a kernel, and its scalars by name, in the order of its arguments."""

    grid: tuple[Size, Size, Size]
    scalars: dict[str, Size]


def launch_of(plugin: PiecePlugin, kernel: str, shapes: Shapes, attributes: Attributes, divide: Divide) -> PieceLaunch:
    """What ``plugin`` launches; ``divide`` rounds up and gets at least one expression."""
    sizes, variant = plugin.sizes(shapes, attributes), VARIANTS[kernel]
    x, y, z = (variants.grid_size(rule, sizes, divide) for rule in variant.grid)
    scalars = {name: sizes[name] for name, kind in variant.arguments if not kind.startswith("*")}
    return PieceLaunch((x, y, z), scalars)


def ptx_of(spec: OpSpec, kernel: str, compute_capability: int) -> str:
    """The PTX of ``kernel`` with parameters as TensorRT gives them to the plugin of ``spec``."""
    names = [name for name, _ in VARIANTS[kernel].arguments]
    scalars = [number for number, (_, kind) in enumerate(VARIANTS[kernel].arguments) if not kind.startswith("*")]
    inputs = [names.index(name) if name in names else None for name in spec.inputs]
    outputs = [names.index(name) if name in names else None for name in spec.outputs]
    entry = kernel_store.kernel(kernel, compute_capability).entry
    return rearranged(kernel_store.ptx(kernel, compute_capability), entry, [*inputs, *scalars, *outputs])


def register(trt: ModuleType, compute_capability: int) -> None:
    """Declares the plugins of all pieces to the bindings ``trt``, with the PTX for one GPU; not twice in a process.

    Raises BackendUnavailable for a TensorRT without ahead-of-time plugins. What fails in a plugin while an engine is
    built is kept for ``trt_plugins.take_failures``.
    """
    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise BackendUnavailable(
            f"{trt.__name__} {version(trt)} has no ahead-of-time plugins, TensorRT 10.9 and newer have",
            "pip install 'mythos-edge[tensorrt]'",
        )
    bindings = importlib.import_module(f"{trt.__name__}.plugin")
    for plugin in PLUGINS:
        name = f"{DOMAIN}::{plugin.spec.name}"
        bindings.register(name)(_description(plugin, trt, bindings))
        bindings.aot_impl(name)(_implementation(plugin, trt, bindings, compute_capability))


def _description(plugin: PiecePlugin, trt: ModuleType, bindings: Any) -> Callable[..., Any]:
    """The function that tells TensorRT shapes and types of a plugin's outputs."""
    spec, members = plugin.spec, {name: getattr(trt.DataType, member) for member, name in DTYPES.items()}
    several: Any = tuple.__class_getitem__((bindings.TensorDesc,) * len(spec.outputs))
    result = several if len(spec.outputs) > 1 else bindings.TensorDesc

    def describe(given: Mapping[str, Any]) -> Any:
        sizes = plugin.sizes({name: given[name].shape_expr for name in spec.inputs}, given)
        kinds = [spec.types.get(name) for name in spec.outputs]
        made = tuple(
            bindings.from_shape_expr(shape, members[kind] if kind else given[spec.typed_by].dtype)
            for shape, kind in zip(plugin.shapes(sizes), kinds, strict=True)
        )
        return made if len(made) > 1 else made[0]

    return _callback(trt, spec, describe, inspect.Signature(_parameters(spec, bindings), return_annotation=result))


def _implementation(plugin: PiecePlugin, trt: ModuleType, bindings: Any, compute_capability: int) -> Callable[..., Any]:
    """The function that gives TensorRT a plugin's kernel and how to launch it."""
    spec, kind = plugin.spec, inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = [inspect.Parameter("outputs", kind), inspect.Parameter("tactic", kind, annotation=int)]
    result = tuple[str, str, bindings.KernelLaunchParams, bindings.SymIntExprs]

    def implement(given: Mapping[str, Any]) -> Any:
        shapes = {name: given[name].shape_expr for name in spec.inputs}
        launch = launch_of(plugin, given["kernel"], shapes, given, bindings.cdiv)
        kernel = kernel_store.kernel(given["kernel"], compute_capability)
        grid = dict(zip(("grid_x", "grid_y", "grid_z"), launch.grid, strict=True))
        parameters = bindings.KernelLaunchParams(**grid, block_x=kernel.threads, shared_mem=kernel.shared_bytes)
        scalars = bindings.SymIntExprs(len(launch.scalars))
        for index, value in enumerate(launch.scalars.values()):
            scalars[index] = bindings.SymInt32(bits_of(value) if isinstance(value, float) else value)
        return kernel.entry, ptx_of(spec, kernel.name, compute_capability), parameters, scalars

    signature = inspect.Signature([*_parameters(spec, bindings), *own], return_annotation=result)
    return _callback(trt, spec, implement, signature)


def bits_of(value: float) -> int:
    """The int32 whose bits are those of ``value`` as a float32."""
    number: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return number


def _parameters(spec: OpSpec, bindings: Any) -> list[inspect.Parameter]:
    """What TensorRT calls a plugin's functions with: tensors, then attributes."""
    # Arrays of one number: TensorRT up to 10.16 makes int and float of them in a way that NumPy refuses since 2.4.
    numbers = {name: NDArray[np.float32] if name in FLOAT_ATTRIBUTES else NDArray[np.int32] for name in spec.attributes}
    types = {**dict.fromkeys(spec.inputs, bindings.TensorDesc), **numbers, "kernel": str}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [inspect.Parameter(name, kind, annotation=of) for name, of in types.items()]


def _callback(
    trt: ModuleType, spec: OpSpec, function: Callable[[Mapping[str, Any]], Any], signature: inspect.Signature
) -> Callable[..., Any]:
    """``function`` of what is given by name, as TensorRT calls it; its decorators read ``signature``."""

    def called(*arguments: Any, **named: Any) -> Any:
        try:
            given = signature.bind(*arguments, **named).arguments
            numbers = {name: given[name].item() for name in spec.attributes}
            # The parser gives strings with their end.
            return function(given | numbers | {"kernel": given["kernel"].rstrip("\0")})
        except Exception as error:  # whatever it is, TensorRT may drop it; it goes on below
            trt_plugins.remember(trt, f"{spec.name} ({function.__name__})", error)
            raise

    # inspect honours it on any callable; the type of functions does not list it.
    called.__signature__ = signature  # type: ignore[attr-defined]
    return called


def _known(size: Size) -> Size:
    """The number of an axis that is fixed when the engine is built; while TensorRT asks for types, nothing is."""
    return size if isinstance(size, int) or size.is_fake else int(size.constant_value())


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


def _part_shapes(sizes: Sizes) -> tuple[tuple[Size, ...], ...]:
    rows = (sizes["batch"], sizes["chunk"], sizes["heads"])
    if sizes["splits"] == 1:
        # Nobody reads or writes what is beside ``mixed``.
        return (*rows, sizes["values"]), (1,) * 5, (1,) * 4
    return (*rows, sizes["values"]), (*rows, sizes["splits"], sizes["values"]), (*rows, sizes["splits"])


def _hidden_shapes(sizes: Sizes) -> tuple[tuple[Size, ...], ...]:
    return ((sizes["rows"] * sizes["top_k"], sizes["units"]),)


def _output_shapes(sizes: Sizes) -> tuple[tuple[Size, ...], ...]:
    return ((sizes["rows"], sizes["dim"]),)


PLUGINS = (
    PiecePlugin(op_pieces.LATENT_ATTENTION_PART, _attention_sizes, _part_shapes),
    PiecePlugin(
        op_pieces.MERGE_SPLITS,
        _merge_sizes,
        lambda sizes: ((sizes["batch"], sizes["chunk"], sizes["heads"], sizes["values"]),),
    ),
    PiecePlugin(
        op_pieces.ROUTER_LOGITS,
        lambda shapes, attributes: {
            "rows": shapes["x"][0],
            "dim": _known(shapes["router"][1]),
            "experts": _known(shapes["router"][0]),
        },
        lambda sizes: ((sizes["rows"], sizes["experts"]),),
    ),
    PiecePlugin(
        op_pieces.ROUTER_TOP_K,
        lambda shapes, attributes: {
            "rows": shapes["logits"][0],
            "experts": _known(shapes["router_bias"][0]),
            "top_k": int(attributes["top_k"]),
        },
        lambda sizes: ((sizes["rows"], sizes["top_k"]),) * 2,
    ),
    PiecePlugin(op_pieces.EXPERTS_GATE_UP, _experts_sizes, _hidden_shapes),
    PiecePlugin(op_pieces.EXPERTS_DOWN, _experts_sizes, _output_shapes),
    PiecePlugin(op_pieces.EXPERTS_GATE_UP_CODES, _experts_sizes, _hidden_shapes),
    PiecePlugin(op_pieces.EXPERTS_DOWN_CODES, _experts_sizes, _output_shapes),
)
