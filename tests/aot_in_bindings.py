"""A script for a process with the bindings of full TensorRT: takes every ahead-of-time plugin the way a build takes it.

The plugins are TensorRT's own class around our functions. What TensorRT would hand it is made here: expressions of
sizes, which know their value but tell it only where a build would know it too.
"""

import operator
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorrt as trt
from plugin_graphs import ATTRIBUTES, CASES, dtypes, sized
from tensorrt.plugin import _lib, _tensor

from mythos_edge.plugins import kernel_store, launches, trt_aot, trt_plugins
from mythos_edge.plugins.launches import Float, Integer
from mythos_edge.plugins.op_pieces import CHAINS, MERGE_SPLITS, PIECES
from mythos_edge.plugins.ops import DOMAIN, FLOAT_ATTRIBUTES, OpSpec
from mythos_edge.plugins.trt_plugins import DTYPES

MEMBERS = {name: getattr(trt.DataType, member) for member, name in DTYPES.items()}
OPERATIONS = {
    trt.DimensionOperation.SUM: operator.add,
    trt.DimensionOperation.SUB: operator.sub,
    trt.DimensionOperation.PROD: operator.mul,
    trt.DimensionOperation.FLOOR_DIV: operator.floordiv,
    trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
}


class Expression:
    """Stands for ``trt.IDimensionExpr``, which only TensorRT can make."""

    def __init__(self, value: int, known: bool) -> None:
        self.value, self.known = value, known

    def is_constant(self) -> bool:
        return self.known

    def get_constant_value(self) -> int:
        assert self.known, "nobody knows this size while building"
        return self.value


class Builder:
    """Stands for ``trt.IExprBuilder``."""

    def constant(self, value: int) -> Expression:
        assert -(2**31) <= value < 2**31
        return Expression(value, True)

    def operation(self, operation: Any, first: Expression, second: Expression) -> Expression:
        return Expression(OPERATIONS[operation](first.value, second.value), first.known and second.known)


class Dims(list[Any]):
    """Stands for ``trt.DimsExprs``, made with a length."""

    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class Setter(dict[int, Any]):
    """Takes a kernel's integers."""

    nbSymExprs = 0


def main() -> None:
    trt.IDimensionExpr, trt.DimsExprs = Expression, Dims
    # What tells TensorRT's own code about an expression; it takes no other than TensorRT's.
    _tensor.SymExprImpl = lambda expression: SimpleNamespace(expr=expression._expr)
    trt_aot.register(trt, 89)
    assert {f"{DOMAIN}::{name}" for name in PIECES} == set(_lib.QDP_REGISTRY), set(_lib.QDP_REGISTRY)
    check_that_failures_are_kept()
    for op, dtype, codes in CASES:
        for rows, context in ((1, 1), (1, 300), (5, 64), (8, 200)):
            check_chain(op, dtype, codes, rows, context)


def check_chain(op: str, dtype: str, codes: str, rows: int, context: int) -> None:
    """The pieces launch what the program of the op does."""
    shapes, kinds, attributes = sized(op, rows, context), dtypes(op, dtype, codes), dict(ATTRIBUTES[op])
    free = {name: tuple(size < 0 for size in shape) for name, shape in sized(op, -1, -1).items()}
    program = launches.program(op, shapes, kinds, attributes)
    chain = [piece for piece in CHAINS[op] if piece is not MERGE_SPLITS or len(program.launches) > 1]
    assert launches.chain(op, sized(op, -1, -1), kinds, attributes)[: len(chain)] == tuple(
        launch.kernel for launch in program.launches
    )
    if op == "LatentAttention":
        attributes["splits"] = numbers(program.launches[0])[-1]
    for piece, launch in zip(chain, program.launches, strict=True):
        plugin = created(piece, attributes, launch.kernel)
        made = plugin.get_output_data_types([MEMBERS[kinds[name]] for name in piece.inputs], ranks(piece, shapes))
        inputs = [expressions(shapes[name], free[name]) for name in piece.inputs]
        outputs = plugin.get_output_shapes(inputs, [], Builder())
        tensors = [described(shapes[name], MEMBERS[kinds[name]]) for name in piece.inputs]
        for name, kind, shape in zip(piece.outputs, made, outputs, strict=True):
            kinds[name] = DTYPES[kind.name]
            assert kinds[name] == piece.types.get(name, dtype), (piece.name, name)
            shapes[name] = tuple(size.value for size in shape)
            free[name] = tuple(not size.known for size in shape)
            tensors.append(described(shapes[name], kind))
        given, scalars = launched(plugin, inputs, tensors)
        grid = tuple(getattr(given, f"grid_{axis}").expr.value for axis in "xyz")
        kernel = kernel_store.kernel(launch.kernel, 89)
        threads, shared = given.block_x.expr.value, given.shared_mem.expr.value
        found = (grid, threads, shared, scalars)
        assert found == (launch.grid, kernel.threads, kernel.shared_bytes, numbers(launch)), (piece.name, found, launch)
        name, ptx = plugin.get_kernel(
            [tensor.desc for tensor in tensors[: len(inputs)]], [tensor.desc for tensor in tensors[len(inputs) :]]
        )
        assert name == kernel.entry, (piece.name, name)
        assert f".entry {name}(".encode() in ptx, piece.name


def check_that_failures_are_kept() -> None:
    """What TensorRT may drop is there when the build ends."""
    plugin = created(PIECES["RouterTopK"], {"top_k": 2}, "no_such_kernel")
    try:
        plugin.register_function(1, 2, **plugin.attrs)
    except AttributeError:
        (kept,) = trt_plugins.take_failures()
        assert kept.startswith("RouterTopK (describe): AttributeError: "), kept
    else:
        raise AssertionError("numbers are no tensors")


def numbers(launch: launches.Launch) -> list[int]:
    """The numbers a kernel is given, as TensorRT gives them: floats by their bits."""
    values = [argument.value for argument in launch.arguments if isinstance(argument, Integer | Float)]
    return [value if isinstance(value, int) else int(np.float32(value).view(np.int32)) for value in values]


def created(piece: OpSpec, attributes: dict[str, Any], kernel: str) -> Any:
    """TensorRT's plugin of ``piece``, from the fields that its parser makes of a node's attributes."""
    types = {name: np.float32 if name in FLOAT_ATTRIBUTES else np.int32 for name in piece.attributes}
    creator = _lib._TemplatePluginCreator(
        piece.name, DOMAIN, {name: (False, kind) for name, kind in types.items()} | {"kernel": (True, str)}
    )
    kinds = {np.float32: trt.PluginFieldType.FLOAT32, np.int32: trt.PluginFieldType.INT32}
    fields = [trt.PluginField(name, np.array([attributes[name]], kind), kinds[kind]) for name, kind in types.items()]
    fields.append(trt.PluginField("kernel", kernel.encode() + b"\0", trt.PluginFieldType.CHAR))
    request = trt.QuickPluginCreationRequest.UNKNOWN
    return creator.create_plugin(
        piece.name, DOMAIN, trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD, request
    )


def ranks(piece: OpSpec, shapes: dict[str, tuple[int, ...]]) -> list[int]:
    return [len(shapes[name]) for name in piece.inputs]


def expressions(shape: tuple[int, ...], free: tuple[bool, ...]) -> list[Expression]:
    return [Expression(size, not unknown) for size, unknown in zip(shape, free, strict=True)]


def described(shape: tuple[int, ...], kind: Any) -> Any:
    tensor = trt.DynamicPluginTensorDesc()
    desc = trt.PluginTensorDesc()
    desc.type, desc.format, desc.dims = kind, trt.TensorFormat.LINEAR, trt.Dims(shape)
    tensor.desc = desc
    return tensor


def launched(plugin: Any, inputs: list[list[Expression]], tensors: list[Any]) -> tuple[Any, list[int]]:
    """The launch parameters and the integers, in order."""
    formats = plugin.get_supported_format_combinations(tensors, len(inputs))
    assert [one.type for one in formats] == [tensor.desc.type for tensor in tensors]
    plugin.configure_plugin(tensors[: len(inputs)], tensors[len(inputs) :])
    assert plugin.get_valid_tactics() == []
    plugin.set_tactic(0)
    given, setter = SimpleNamespace(), Setter()
    plugin.get_launch_params(inputs, tensors, len(inputs), given, setter, Builder())
    return given, [setter[index].expr.value for index in range(setter.nbSymExprs)]


if __name__ == "__main__":
    main()
