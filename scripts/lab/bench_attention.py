"""The ways ONNX Runtime has to attend over cached keys and values on the CPU: what the lowering chose among.

    python -m mythos_edge.scripts.lab.bench_attention --heads 16 --kv-heads 16 --head-dim 128

A cached row is keys | values of all key/value heads, or both are cached apart as in a bundle; what an op wants in
another layout is made of it at every call, as a bundle would have to. Variants take turns on caches that are not warm;
every result is held against the oracle. Prints a table of milliseconds (least / median), then one line of JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mythos_edge.exporter.graph_writer import GraphWriter
from mythos_edge.exporter.lowering.halved_caches import halve_caches
from mythos_edge.exporter.lowering.ort_attention import grouped_query_attention
from mythos_edge.exporter.lowering.ort_kernels import HIDDEN_SCORE, MICROSOFT
from mythos_edge.model.stages import HALVES, half_name
from mythos_edge.plugins import ops, reference
from mythos_edge.runtime.backends.ort_session import ort_session
from mythos_edge.scripts import measuring

Float32 = NDArray[np.float32]
# Caches that take turns, so that each was last read as long ago as in a model with many layers.
_CACHE_BYTES = 256 << 20
# float32 sums of thousands of products.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Shape:
    """The ``heads`` of queries and ``groups`` of keys and values, each of ``width``, over ``context`` cached rows."""

    heads: int
    groups: int
    width: int
    context: int
    rows: int

    @property
    def scale(self) -> float:
        return float(self.width**-0.5)

    @property
    def half(self) -> int:
        """Values of all keys, or all values, of a row."""
        return self.groups * self.width


@dataclass(frozen=True)
class Inputs:
    """``q (1, S, H, W)``, ``rows (1, S, 2GW)`` and ``past (1, C, 2GW)``."""

    q: ir.Value
    rows: ir.Value
    past: ir.Value


Write = Callable[[GraphWriter, Inputs, Shape], ir.Value]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure ONNX Runtime's attentions over a cache.")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--context", default="512,4096")
    parser.add_argument("--rows", default="1,128")
    parser.add_argument("--only", default=",".join(VARIANTS), help="names of variants, with commas")
    parser.add_argument("-r", "--repetitions", type=int, default=25)
    args = parser.parse_args(argv)
    contexts, counts = ([int(number) for number in given.split(",")] for given in (args.context, args.rows))
    cases = [
        Shape(args.heads, args.kv_heads, args.head_dim, context, rows) for rows, context in product(counts, contexts)
    ]
    found: dict[str, list[list[float] | None]] = {name: [] for name in args.only.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            print(case, file=sys.stderr, flush=True)
            measured = _measured(case, list(found), Path(folder), args.repetitions)
            for name, times in found.items():
                times.append(measured.get(name))
    print(f"| ms, least / median | {' | '.join(f'{case.rows} after {case.context}' for case in cases)} |")
    print(f"|---|{'---:|' * len(cases)}")
    for name, times in found.items():
        cells = ("-" if pair is None else f"{pair[0]:.2f} / {pair[1]:.2f}" for pair in times)
        print(f"| {name} | {' | '.join(cells)} |")
    print(json.dumps({**vars(args), "machine": measuring.machine(), "ms": found}))
    return 0


def _measured(case: Shape, names: list[str], folder: Path, repetitions: int) -> dict[str, list[float]]:
    """Least and median milliseconds of every variant that can do the case."""
    random = np.random.default_rng(case.context + case.rows)
    row = 2 * case.half
    pasts = [
        random.standard_normal((1, case.context, row), np.float32)
        for _ in range(max(2, min(64, _CACHE_BYTES // (case.context * row * 4))))
    ]
    feeds = {
        "q": random.standard_normal((1, case.rows, case.heads, case.width), np.float32),
        "rows": random.standard_normal((1, case.rows, row), np.float32),
    }
    wanted = reference.grouped_query_attention(
        feeds["q"],
        feeds["rows"],
        pasts[0],
        length=case.context,
        first=np.zeros(1, np.int64),
        scale=case.scale,
        kv_heads=case.groups,
    )
    caches = {apart: [_caches(past, apart) for past in pasts] for apart in (False, True)}
    sessions = {}
    for name in names:
        if VARIANTS[name].can(case):
            sessions[name] = _session(case, VARIANTS[name], folder)
            error = np.abs(_run(sessions[name], {**feeds, **caches[VARIANTS[name].apart][0]})[0] - wanted).max()
            assert error < _TOLERANCE, (name, error)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(repetitions):
        for place, (name, session) in enumerate(sessions.items()):
            taken = caches[VARIANTS[name].apart]
            past = taken[(turn * len(sessions) + place) % len(taken)]
            times[name].append(_run(session, {**feeds, **past})[1])
    return {name: [min(taken), statistics.median(taken)] for name, taken in times.items()}


def _session(case: Shape, variant: "Variant", folder: Path) -> Any:
    model = _model(case, variant)
    path = folder / "model.onnx"
    ir.save(model, path)
    return ort_session(path)


def _run(session: Any, feeds: dict[str, Float32]) -> tuple[Float32, float]:
    """The result, and the milliseconds it took."""
    started = time.perf_counter()
    made = session.run(None, feeds)[0]
    return made, (time.perf_counter() - started) * 1e3


def _caches(past: Float32, apart: bool) -> dict[str, Float32]:
    """The cached rows as inputs; ``apart`` for keys and values in arrays of their own."""
    if not apart:
        return {"past_0": past}
    halves = zip(HALVES, np.split(past, len(HALVES), axis=-1), strict=True)
    return {half_name("past_0", half): np.ascontiguousarray(rows) for half, rows in halves}


def _model(case: Shape, variant: "Variant") -> ir.Model:
    row = 2 * case.half
    sizes: dict[str, list[int | str]] = {"q": [1, "rows", case.heads, case.width], "rows": [1, "rows", row]}
    sizes["past_0"] = [1, "context", row]
    values = {
        name: ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(size))
        for name, size in sizes.items()
    }
    imports = {"": ops.OPSET, MICROSOFT: 1}
    graph = ir.Graph(list(values.values()), [], nodes=[], opset_imports=imports, name="attention")
    writer = GraphWriter(graph, "attention")
    output = variant.write(writer, Inputs(*values.values()), case)
    output.type = ir.TensorType(ir.DataType.FLOAT)
    output.shape = ir.Shape([1, "rows", case.heads, case.width])
    graph.outputs.append(output)
    model = ir.Model(graph, ir_version=10)
    return halve_caches(model) if variant.apart else model


# --- the variants -------------------------------------------------------------------------------------------------


def _products(writer: GraphWriter, given: Inputs, case: Shape) -> ir.Value:
    """Attention as the lowering writes it."""
    attributes = {"scale": case.scale, "kv_heads": case.groups}
    node = ir.node("GroupedQueryAttention", [given.q, given.rows, given.past], attributes, domain=ops.DOMAIN)
    return grouped_query_attention(writer, node, as_they_lie=True)


def _turned_products(writer: GraphWriter, given: Inputs, case: Shape) -> ir.Value:
    """Attention as the lowering for CUDA writes it: keys and values are turned before."""
    attributes = {"scale": case.scale, "kv_heads": case.groups}
    node = ir.node("GroupedQueryAttention", [given.q, given.rows, given.past], attributes, domain=ops.DOMAIN)
    return grouped_query_attention(writer, node)


def _whole_rows(writer: GraphWriter, given: Inputs, case: Shape) -> ir.Value:
    """Keys and values are twice as many groups of one product, so that nothing of a slot is copied: queries of the
    second half are 0, and so are the weights of the first."""
    share = case.heads // case.groups
    queries = _by_group(writer, given.q, case)
    nothing = writer.add("Mul", [queries, writer.number(0)])
    both = writer.add("Concat", [queries, nothing], axis=1)
    shape = writer.integers([-1, 1, 2 * case.groups, case.width])
    rows, past = (writer.add("Reshape", [value, shape]) for value in (given.rows, given.past))
    scores = []
    for value in (past, rows):
        whole = writer.add("FusedMatMul", [both, value], MICROSOFT, transB=1, transBatchB=1, alpha=case.scale)
        bounds = [writer.integers([number]) for number in (0, case.groups, 1)]
        scores.append(writer.add("Slice", [whole, *bounds]))
    weights = _weights(writer, scores[0], scores[1], share)
    mixed = []
    for one, value in zip(weights, (past, rows), strict=True):
        doubled = writer.add("Concat", [writer.add("Mul", [one, writer.number(0)]), one], axis=1)
        whole = writer.add("FusedMatMul", [doubled, value], MICROSOFT, transBatchB=1)
        bounds = [writer.integers([number]) for number in (case.groups, 2 * case.groups, 1)]
        mixed.append(writer.add("Slice", [whole, *bounds]))
    return _by_row(writer, writer.add("Add", mixed), case)


def _group_query_op(writer: GraphWriter, given: Inputs, case: Shape) -> ir.Value:
    """com.microsoft::GroupQueryAttention, whose past is by head."""
    query = writer.add("Reshape", [given.q, writer.integers([1, -1, case.heads * case.width])])
    halves = writer.add_many("Split", [given.rows], 2, axis=2, num_outputs=2)
    turned = _turned(writer, given.past, case)
    total = writer.add("Add", [writer.sizes(given.past, 1), writer.sizes(given.rows, 1)])
    last = writer.add("Sub", [total, writer.integers([1])])
    narrow = [writer.add("Cast", [value], to=ir.DataType.INT32) for value in (last, writer.add("Squeeze", [total]))]
    made = writer.add_many(
        "GroupQueryAttention",
        [query, *halves, *turned, *narrow],
        3,
        MICROSOFT,
        num_heads=case.heads,
        kv_num_heads=case.groups,
        scale=case.scale,
    )
    return writer.add("Reshape", [made[0], writer.integers([1, -1, case.heads, case.width])])


def _attention_op(writer: GraphWriter, given: Inputs, case: Shape) -> ir.Value:
    """ai.onnx Attention with the past it takes, which is by head."""
    query = writer.add("Reshape", [given.q, writer.integers([1, -1, case.heads * case.width])])
    halves = writer.add_many("Split", [given.rows], 2, axis=2, num_outputs=2)
    turned = _turned(writer, given.past, case)
    made = writer.add_many(
        "Attention",
        [query, *halves, None, *turned],
        3,
        is_causal=1,
        scale=case.scale,
        q_num_heads=case.heads,
        kv_num_heads=case.groups,
    )
    return writer.add("Reshape", [made[0], writer.integers([1, -1, case.heads, case.width])])


def _attention_over_all(writer: GraphWriter, given: Inputs, case: Shape) -> ir.Value:
    """ai.onnx Attention over cached and new rows put together, with a mask."""
    query = writer.add("Reshape", [given.q, writer.integers([1, -1, case.heads * case.width])])
    keys, values = _joined(writer, given)
    made = writer.add(
        "Attention",
        [query, keys, values, _mask(writer, given)],
        scale=case.scale,
        q_num_heads=case.heads,
        kv_num_heads=case.groups,
    )
    return writer.add("Reshape", [made, writer.integers([1, -1, case.heads, case.width])])


def _multi_head_op(writer: GraphWriter, given: Inputs, case: Shape) -> ir.Value:
    """com.microsoft::MultiHeadAttention over cached and new rows put together; as many heads of keys as of queries."""
    query = writer.add("Reshape", [given.q, writer.integers([1, -1, case.heads * case.width])])
    keys, values = _joined(writer, given)
    bias = writer.add("Where", [_mask(writer, given), writer.number(0), writer.number(HIDDEN_SCORE)])
    bias = writer.add("Unsqueeze", [bias, writer.integers([0, 1])])
    made = writer.add(
        "MultiHeadAttention",
        [query, keys, values, None, None, bias],
        MICROSOFT,
        num_heads=case.heads,
        scale=case.scale,
    )
    return writer.add("Reshape", [made, writer.integers([1, -1, case.heads, case.width])])


def _by_group(writer: GraphWriter, q: ir.Value, case: Shape) -> ir.Value:
    """Queries (1, groups, S * share, width)."""
    share = case.heads // case.groups
    apart = writer.add("Reshape", [q, writer.integers([1, -1, case.groups, share, case.width])])
    turned = writer.add("Transpose", [apart], perm=[0, 2, 1, 3, 4])
    return writer.add("Reshape", [turned, writer.integers([1, case.groups, -1, case.width])])


def _by_row(writer: GraphWriter, mixed: ir.Value, case: Shape) -> ir.Value:
    share = case.heads // case.groups
    apart = writer.add("Reshape", [mixed, writer.integers([1, case.groups, -1, share, case.width])])
    back = writer.add("Transpose", [apart], perm=[0, 2, 1, 3, 4])
    return writer.add("Reshape", [back, writer.integers([1, -1, case.heads, case.width])])


def _weights(writer: GraphWriter, old: ir.Value, new: ir.Value, share: int) -> Sequence[ir.Value]:
    """The weights of cached and of new rows, of their scores."""
    queries, columns = (writer.range_to(writer.sizes(new, axis)) for axis in (2, 3))
    row = writer.add("Div", [queries, writer.integer(share)])
    seen = writer.add("LessOrEqual", [columns, writer.add("Unsqueeze", [row, writer.integers([1])])])
    new = writer.add("Where", [seen, new, writer.number(HIDDEN_SCORE)])
    weights = writer.add("Softmax", [writer.add("Concat", [old, new], axis=3)], axis=-1)
    counts = writer.add("Concat", [writer.sizes(old, 3), writer.sizes(new, 3)], axis=0)
    return writer.add_many("Split", [weights, counts], 2, axis=3)


def _turned(writer: GraphWriter, past: ir.Value, case: Shape) -> list[ir.Value]:
    """Keys and values of a slot (1, groups, C, width)."""
    halves = writer.add_many("Split", [past], 2, axis=2, num_outputs=2)
    shape = writer.integers([1, -1, case.groups, case.width])
    return [writer.add("Transpose", [writer.add("Reshape", [half, shape])], perm=[0, 2, 1, 3]) for half in halves]


def _joined(writer: GraphWriter, given: Inputs) -> Sequence[ir.Value]:
    """Keys and values (1, C + S, groups * width) of cached and new rows."""
    whole = writer.add("Concat", [given.past, given.rows], axis=1)
    return writer.add_many("Split", [whole], 2, axis=2, num_outputs=2)


def _mask(writer: GraphWriter, given: Inputs) -> ir.Value:
    """Which columns (C + S) each new row (S) sees."""
    length, count = (writer.sizes(value, 1) for value in (given.past, given.rows))
    own = writer.add("Add", [writer.range_to(count), length])
    columns = writer.range_to(writer.add("Add", [length, count]))
    return writer.add("LessOrEqual", [columns, writer.add("Unsqueeze", [own, writer.integers([1])])])


@dataclass(frozen=True)
class Variant:
    """One way: ``apart`` for caches of keys and of values, ``grouped`` for whether key heads may be fewer."""

    write: Callable[..., ir.Value]
    apart: bool = False
    grouped: bool = True

    def can(self, case: Shape) -> bool:
        """Whether it can express the case."""
        return self.grouped or case.heads == case.groups


VARIANTS = {
    "products on caches apart": Variant(_products, apart=True),
    "products of parts": Variant(_products),
    "turned products of parts": Variant(_turned_products),
    "products of whole rows": Variant(_whole_rows),
    "GroupQueryAttention": Variant(_group_query_op),
    "Attention with its past": Variant(_attention_op),
    "Attention over all": Variant(_attention_over_all),
    "MultiHeadAttention": Variant(_multi_head_op, grouped=False),
}


if __name__ == "__main__":
    sys.exit(main())
