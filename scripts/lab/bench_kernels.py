"""The ways ONNX Runtime has to multiply with a model's weights on the CPU, by rows: what the lowering chose among.

    python -m mythos_edge.scripts.lab.bench_kernels --dim 2048 --hidden 2048 --experts 32

Routed experts: its MoE and QMoE kernels against one If an expert. Dense: Gemm, MatMulNBits, and QGemm over rows rounded
to 8 bits. Random weights, medians of milliseconds. A matrix that is read again and again stays in the processor's
caches, in part; a second table has as many dense matrices as ``--copies`` read in turn, by one row, and what share of
the memory bandwidth that reaches. Prints the tables, then one line of JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mythos_edge.exporter.lowering.ort_cpu import lower_for_ort
from mythos_edge.exporter.lowering.ort_kernels import FUSED_EXPERTS, MICROSOFT, Pack
from mythos_edge.exporter.rounding import ROW, Rounding, round_blocks
from mythos_edge.model.machine import cores
from mythos_edge.plugins import ops
from mythos_edge.runtime.backends.ort_session import ort_session
from mythos_edge.scripts import measuring

Array = NDArray[Any]
_ROUNDINGS = {
    "int8, a row": Rounding(8, ROW, "rtn"),
    "int8, blocks of 128": Rounding(8, 128, "rtn"),
    "int4, blocks of 32": Rounding(4, 32, "rtn"),
    "int4, blocks of 64": Rounding(4, 64, "rtn"),
    "int4, blocks of 128": Rounding(4, 128, "rtn"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure ONNX Runtime's products by rows.")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=2048, help="of one routed expert; the dense one has 8 times that")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--rows", default="1,2,4,8,16,64,512")
    parser.add_argument("--copies", type=int, default=12, help="dense matrices that are read in turn")
    parser.add_argument("-r", "--repetitions", type=int, default=15)
    args = parser.parse_args(argv)
    rows = [int(count) for count in args.rows.split(",")]
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for label, model, prepack in _kernels(args, Path(name)):
            print(label, file=sys.stderr, flush=True)
            ir.save(model, Path(name) / "model.onnx")
            session = ort_session(Path(name) / "model.onnx", prepack=prepack)
            found[label] = [_median_ms(session, count, args) for count in rows]
        bandwidths = [measuring.stream_bandwidth(cores())]
        in_turn = dict(_in_turn(args, Path(name)))
        bandwidths.append(measuring.stream_bandwidth(cores()))
    print(f"| ms for rows | {' | '.join(map(str, rows))} |")
    print(f"|---|{'---:|' * len(rows)}")
    for label, times in found.items():
        print(f"| {label} | {' | '.join(f'{ms:.2f}' for ms in times)} |")
    stream = max(bandwidths) / 1e9
    print(f"\n| one row, {args.copies} matrices in turn | ms each | GB/s | % of the stream, {stream:.1f} GB/s |")
    print("|---|---:|---:|---:|")
    for label, (ms, rate) in in_turn.items():
        print(f"| {label} | {ms:.2f} | {rate:.1f} | {100 * rate / stream:.0f} |")
    report = {"machine": measuring.machine(), "stream_gb_per_s": stream, "rows": rows, "ms": found, "in_turn": in_turn}
    print(json.dumps({**vars(args), **report}))
    return 0


def _kernels(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, ir.Model, bool]]:
    random = np.random.default_rng(0)
    dim, hidden, experts = args.dim, args.hidden, args.experts
    stacks = {"fc1": _noise(random, experts, 2 * hidden, dim), "fc2": _noise(random, experts, dim, hidden)}
    small = {"router": _noise(random, experts, dim), "router_bias": np.zeros(experts, np.float32)}
    plain = _op(args, {**small, **stacks}, folder)
    yield "experts, MoE kernel, float32", _moe_kernel(args, {**small, **stacks}, folder), False
    yield "experts, If each, float32 mapped", lower_for_ort(plain), False
    yield "experts, If each, float32 prepacked", lower_for_ort(plain), True
    for label, rounding in _ROUNDINGS.items():
        how = "If each" if rounding.block == ROW else "QMoE kernel"
        packs = {name: _pack(stack, rounding, name == "fc1") for name, stack in stacks.items()}
        yield f"experts, {how}, {label}", _in_file(lower_for_ort(plain, packs), folder), True
    matrix = _noise(random, 8 * hidden, dim)
    dense = _graph("Gemm", {"matrix": matrix}, dim, 8 * hidden, folder, transB=1)
    yield "dense, Gemm, float32 mapped", dense, False
    yield "dense, Gemm, float32 prepacked", dense, True
    for label, rounding in _ROUNDINGS.items():
        packs = {"matrix": _pack(matrix, rounding)}
        yield f"dense, {label}", _in_file(lower_for_ort(dense, packs), folder), True


def _in_turn(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, tuple[float, float]]]:
    """Milliseconds of one row by one of many dense matrices, and the GB/s of weights that are read."""
    matrix = _noise(np.random.default_rng(0), 8 * args.hidden, args.dim)
    names = [f"matrix_{index}" for index in range(args.copies)]
    plain = _graph("Gemm", dict.fromkeys(names, matrix), args.dim, 8 * args.hidden, folder, transB=1)
    packs = {label: _pack(matrix, rounding) for label, rounding in _ROUNDINGS.items()}
    models = {f"dense, {label}": lower_for_ort(plain, dict.fromkeys(names, pack)) for label, pack in packs.items()}
    sizes = {f"dense, {label}": pack.values.nbytes + pack.scales.nbytes for label, pack in packs.items()}
    for label, model in {"dense, Gemm, float32 prepacked": plain, **models}.items():
        print(f"{label}, in turn", file=sys.stderr, flush=True)
        ir.save(_in_file(model, folder), folder / "model.onnx")
        ms = _median_ms(ort_session(folder / "model.onnx", prepack=True), 1, args) / args.copies
        yield label, (ms, sizes.get(label, matrix.nbytes) / ms / 1e6)


def _noise(random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return random.standard_normal(shape, np.float32) * np.float32(0.02)


def _op(args: argparse.Namespace, weights: dict[str, Array], folder: Path) -> ir.Model:
    values = {name: _initializer(name, array) for name, array in weights.items()}
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", args.dim]))
    node = ir.node(ops.SPARSE_MOE.name, [x, *values.values()], {"top_k": args.top_k}, domain=ops.DOMAIN)
    return _model([node], x, list(values.values()), args.dim, folder)


def _moe_kernel(args: argparse.Namespace, weights: dict[str, Array], folder: Path) -> ir.Model:
    values = {name: _initializer(name, array) for name, array in weights.items() if name != "router_bias"}
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", args.dim]))
    logits = ir.node("Gemm", [x, values["router"]], {"transB": 1})
    logits.outputs[0].name = "logits"
    inputs, attributes = [x, logits.outputs[0], values["fc1"], None, values["fc2"]], {"k": args.top_k, **FUSED_EXPERTS}
    node = ir.node("MoE", inputs, attributes, domain=MICROSOFT)
    return _model([node], x, list(values.values()), args.dim, folder, before=logits)


def _graph(op_type: str, weights: dict[str, Array], dim: int, width: int, folder: Path, **attributes: int) -> ir.Model:
    """A product of ``x`` with each of the matrices in ``weights``."""
    values = [_initializer(name, array) for name, array in weights.items()]
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", dim]))
    return _model([ir.node(op_type, [x, value], attributes) for value in values], x, values, width, folder)


def _model(
    nodes: list[ir.Node], x: ir.Value, weights: list[ir.Value], width: int, folder: Path, before: ir.Node | None = None
) -> ir.Model:
    """A graph whose outputs, each (rows, width), are those of ``nodes``."""
    outputs = [node.outputs[0] for node in nodes]
    for index, y in enumerate(outputs):
        y.name, y.type, y.shape = f"y_{index}", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", width])
    nodes = nodes if before is None else [before, *nodes]
    imports = {"": ops.OPSET, ops.DOMAIN: ops.VERSION, MICROSOFT: 1}
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=weights, opset_imports=imports, name="one")
    return _in_file(ir.Model(graph, ir_version=10), folder)


def _in_file(model: ir.Model, folder: Path) -> ir.Model:
    """The model with its large weights in a file of their own, as in a bundle."""
    name = f"weights-{len(list(folder.iterdir()))}.bin"
    return ir.external_data.unload_from_model(model, folder, name, size_threshold_bytes=1 << 16)


def _initializer(name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)


def _pack(matrix: Array, rounding: Rounding, interleaved: bool = False) -> Pack:
    flat = matrix.reshape(-1, matrix.shape[-1])
    if interleaved and rounding.block == ROW:
        flat = np.concatenate([matrix[:, 0::2], matrix[:, 1::2]], axis=1).reshape(flat.shape)
    values, scales = round_blocks(flat, rounding)
    if matrix.ndim == 3:
        values = values.reshape(*matrix.shape[:2], -1)
        scales = scales.reshape(*matrix.shape[:2], *scales.shape[1:])
    return Pack(rounding.bits, rounding.block, matrix.shape[-1], ir.tensor(values), ir.tensor(scales))


def _median_ms(session: Any, rows: int, args: argparse.Namespace) -> float:
    random = np.random.default_rng(rows)
    # Other rows each time choose other experts, as in decoding.
    feeds = [{"x": random.standard_normal((rows, args.dim), np.float32)} for _ in range(4)]
    session.run(None, feeds[0])
    times = []
    for index in range(args.repetitions if rows < 64 else max(2, args.repetitions // 4)):
        started = time.perf_counter()
        session.run(None, feeds[index % len(feeds)])
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
