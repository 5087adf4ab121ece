"""Where the time of one loop step goes, by the kernels of ONNX Runtime: which of them bounds decoding.

    python -m mythos_edge.scripts.lab.profile_step model.bundle --target ort-cpu-int4 --context 512

Feeds noise, as values change no time, but in models with experts. Takes the least time of every node; prints a table by
op, then one line of JSON. A branch is counted by what runs in it.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.linked_weights import lent_weights, weights_apart
from mythos_edge.model.target_options import OrtOptions, options_of
from mythos_edge.runtime.backends.ort_session import import_onnxruntime, session_options
from mythos_edge.scripts import measuring


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tell where the time of a loop step goes.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", help="default: the bundle's first")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("-r", "--repetitions", type=int, default=30)
    args = parser.parse_args(argv)
    bundle = open_bundle(args.bundle)
    target = args.target or bundle.manifest.default_target
    spec, ort = bundle.target(target), import_onnxruntime()
    path = bundle.file(spec.graphs["step"])
    options = session_options(ort, 0, options_of(spec, OrtOptions).prepacked)
    with tempfile.TemporaryDirectory() as folder, lent_weights(options, weights_apart(bundle, path, target)):
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "step")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {one.name: _fed(one, args.rows, args.context) for one in session.get_inputs()}
        for _ in range(args.repetitions):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    microseconds, nodes = _by_op(events)
    total = sum(microseconds.values())
    print("| op | nodes | us | share |\n|---|---:|---:|---:|")
    for op, taken in sorted(microseconds.items(), key=lambda item: -item[1]):
        print(f"| {op} | {nodes[op]} | {taken:.0f} | {taken / total:.1%} |")
    report = {"machine": measuring.machine(), "step_bytes": spec.step_bytes, "us": microseconds, "nodes": nodes}
    print(json.dumps({"target": target, "context": args.context, "rows": args.rows, **report}))
    return 0


def _by_op(events: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
    """The least microseconds of all nodes of an op together, and how many there are."""
    taken: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            taken[event["args"]["op_name"], event["name"]].append(event["dur"])
    microseconds: dict[str, float] = defaultdict(float)
    nodes: Counter[str] = Counter()
    for (op, _), each in taken.items():
        if op != "If":
            microseconds[op] += min(each)
            nodes[op] += 1
    return dict(microseconds), dict(nodes)


def _fed(given: Any, rows: int, context: int) -> NDArray[Any]:
    """Values for an input of the step: noise, but nothing halted, and positions after the context."""
    free = context if given.name.startswith("past") else rows
    shape = [size if isinstance(size, int) else free for size in given.shape]
    if given.name == "positions":
        return np.broadcast_to(context + np.arange(rows), shape).copy()
    if given.type == "tensor(int64)":
        return np.zeros(shape, np.int64)
    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}[given.type]
    if given.name in ("halt_mass", "threshold"):
        return np.full(shape, given.name == "threshold", dtype)
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


if __name__ == "__main__":
    sys.exit(main())
