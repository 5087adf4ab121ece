"""The figures of ``mythos-edge bench`` as a table to paste, as CSV, and as an HTML page."""

import csv
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from mythos_edge.scripts import html_page
from mythos_edge.scripts.measuring import Spread

# The figures that every repetition gives one of, in the order of the table.
UNITS = {
    "ttft_ms": "ms",
    "prefill_tokens_per_s": "1/s",
    "decode_tokens_per_s": "1/s",
    "ms_per_token": "ms",
    "ms_per_loop_step": "ms",
    "graph_ms_per_loop_step": "ms",
    "host_us_per_loop_step": "us",
    "mean_depth": "loop steps",
    "block_calls_per_token": "",
    "weight_mb_per_token": "MB",
    "stream_percent": "%",
    "loop_step_stream_percent": "%",
    "drafted_tokens_accepted": "",
}
_ONCE = {"load_ms": "ms", "resident_mb": "MB"}
_BATCH = ("batch_one_by_one_tokens_per_s", "batch_together_tokens_per_s", "batch_ratio", "batch_equal_tokens")
# The figures with bars in the page.
_DRAWN = {"decode_tokens_per_s": "Decoding, tokens per second", "ttft_ms": "Time to the first token, ms"}
Targets = Mapping[str, Mapping[str, Any]]


def page(report: Mapping[str, Any]) -> str:
    """The report of a run as an HTML page that needs no other file."""
    targets: Targets = report["targets"]
    about = (
        f"{report['machine']}: {report['prompt_tokens']} prompt tokens, {report['new_tokens']} new tokens, policy "
        f"{report['policy']}, median of {report['repetitions']} repetitions (least to largest). Memory is read at "
        f"{report['stream_gb_per_s']:.1f} GB/s."
    )
    parts = [html_page.note(f"{name}: {one['noise']}") for name, one in targets.items() if one["noise"] is not None]
    for figure, title in _DRAWN.items():
        drawn = {name: Spread(**one[figure]) for name, one in targets.items()}
        parts += [html_page.heading(title), html_page.bars(drawn)]
    rows = [
        (_label(figure, unit), *(_cell(one.get(figure, np.nan)) for one in targets.values()))
        for figure, unit in _rows_of(targets).items()
    ]
    parts += [html_page.heading("All figures"), html_page.table(["", *targets], rows)]
    if "loop_graph" in report:
        rows = [(_label(figure, "ms"), _cell(spread)) for figure, spread in report["loop_graph"].items()]
        parts += [html_page.heading("model.onnx over the prompt"), html_page.table(["", "model.onnx"], rows)]
    return html_page.page(f"Speed of {report['bundle']}", about, *parts)


def csv_of(targets: Targets) -> str:
    """A line for each figure of each target."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["target", "figure", "unit", "median", "min", "max"])
    for name, target in targets.items():
        for figure in (*_ONCE, *_BATCH):
            if figure in target:
                writer.writerow([name, figure, _ONCE.get(figure, ""), target[figure], "", ""])
        for figure, unit in UNITS.items():
            writer.writerow([name, figure, unit, *(target[figure][part] for part in ("median", "min", "max"))])
    return text.getvalue().rstrip("\n")


def markdown(targets: Targets, width: int | None) -> str:
    """A line for each figure and a column for each target, as median (least to largest).

    Where a terminal has too few columns for all targets, the others follow in tables of their own.
    """
    columns = [["", *(_label(figure, unit) for figure, unit in _rows_of(targets).items())]]
    for name, target in targets.items():
        columns.append([name, *(_cell(target.get(figure, np.nan)) for figure in _rows_of(targets))])
    widths = [max(map(len, column)) for column in columns]
    tables, fits = [[0]], width or sum(widths) + 3 * len(widths) + 1
    for number in range(1, len(columns)):
        if len(tables[-1]) > 1 and sum(widths[one] + 3 for one in (*tables[-1], number)) + 1 > fits:
            tables.append([0])
        tables[-1].append(number)
    return "\n\n".join(_lines([columns[one] for one in table], [widths[one] for one in table]) for table in tables)


def _rows_of(targets: Targets) -> dict[str, str]:
    """The figures of a table with their units; those of a batch where one was measured."""
    batch = [figure for figure in _BATCH if any(figure in target for target in targets.values())]
    return _ONCE | UNITS | dict.fromkeys(batch, "")


def _label(figure: str, unit: str) -> str:
    label = (
        figure.replace("_mb_", "_").removesuffix("_ms").removesuffix("_mb").removesuffix("_percent").replace("_", " ")
    )
    return f"{label}, {unit}" if unit and not label.startswith("ms") else label


def _lines(columns: list[list[str]], widths: list[int]) -> str:
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [[cell.rjust(width) for cell in column] for column, width in zip(columns, widths, strict=True)]
    padded[0] = [cell.ljust(widths[0]) for cell in columns[0]]
    head, *rows = zip(*padded, strict=True)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))


def _cell(figure: Any) -> str:
    if isinstance(figure, bool):
        return "yes" if figure else "no"
    if not isinstance(figure, dict):
        return "" if np.isnan(figure) else f"{figure:.4g}"
    if np.isnan(figure["median"]):
        return ""
    return f"{figure['median']:.4g} ({figure['min']:.4g} to {figure['max']:.4g})"
