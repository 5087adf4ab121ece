"""One group of ``kernel_cases`` on the GPU, in a process of its own: ``gpu_check`` starts it and reads its rows.

    python -m mythos_edge.scripts.lab.gpu_kernels 1b "experts int4" rows.jsonl

An illegal address makes a GPU useless to the process that caused it, for good. So the rows are written one by one,
the rest of the group is listed as skipped, and the other groups, in processes of their own, know nothing of it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mythos_edge.model.errors import MythosEdgeError
from mythos_edge.model.families.openmythos.config import VARIANTS
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.scripts.lab import gpu_bench
from mythos_edge.scripts.lab.gpu_bench import MeasuredGpu
from mythos_edge.scripts.lab.kernel_cases import GROUPS, Case, cases_of

TORCH = ("none", "eager", "best")
Compared = Callable[[Case], dict[str, Any]]


def main(argv: Sequence[str] | None = None, load_driver: Callable[[], Driver] = Driver.load) -> int:
    """Writes the rows, one JSON object a line; 1 when the group could not begin, with the reason on stderr."""
    args = _parser().parse_args(argv)
    try:
        with args.rows.open("w", encoding="utf-8") as file, MeasuredGpu(load_driver()) as gpu:
            made = cases_of(args.group, args.shape, VARIANTS[args.shape])
            for row in rows(gpu, made, torch_comparison(args.torch)):
                file.write(json.dumps(row) + "\n")
                file.flush()
    except (MythosEdgeError, OSError) as error:
        print(f"error: {gpu_bench.one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_kernels", description="Checks and measures one group of kernels.")
    parser.add_argument("shape", choices=VARIANTS, metavar="SHAPE")
    parser.add_argument("group", choices=GROUPS, metavar="GROUP")
    parser.add_argument("rows", type=Path, metavar="FILE")
    parser.add_argument("--torch", choices=TORCH, default="best")
    return parser


def rows(gpu: MeasuredGpu, made: Iterable[Case], compared: Compared) -> Iterator[dict[str, Any]]:
    """The copy bandwidth, then a row for each case, whatever happens to it. Raises what the copies raise."""
    bandwidth = gpu_bench.copy_bandwidth(gpu)
    yield {"case": "copy on the device", "gb_per_s": round(bandwidth / 1e9, 1)}
    for case in made:
        if gpu.lost:
            yield {"case": case.label, "skipped": f"an earlier case made the GPU useless: {gpu.lost}"}
            continue
        row: dict[str, Any] = {"case": case.label}
        try:
            row |= gpu_bench.check(gpu, case)
            row |= gpu_bench.measure(gpu, case, bandwidth)
            row |= compared(case)
        except Exception as error:  # whatever it is, the other cases are still worth having
            row |= {"ok": False, "why": gpu_bench.one_line(error)}
            gpu.still_works()
        if "torch_us" in row:
            row["times_torch"] = round(row["torch_us"] / row["us"], 2)
        yield row


def torch_comparison(ways: str) -> Compared:
    """Measures torch on a case, in columns of the report; gives a reason instead where it cannot be had."""
    if ways == "none":
        return lambda case: {}
    try:
        import torch
    except ImportError:
        return lambda case: {"torch": "torch is not installed"}
    if not torch.cuda.is_available():
        return lambda case: {"torch": "torch has no GPU here"}
    from mythos_edge.scripts.lab import torch_kernels

    return lambda case: torch_kernels.best_time(case, compiled=ways == "best")


if __name__ == "__main__":
    sys.exit(main())
