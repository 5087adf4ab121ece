"""The curve of ``mythos-edge tune`` as a picture, and as one HTML file that needs no other."""

import base64
import html
import io
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure

from mythos_edge.model.errors import OSErrorAs, UsageError
from mythos_edge.model.output_files import writing
from mythos_edge.scripts.tune_points import Point

# KL of 0 is drawn, too: below this the axis is linear.
_LINEAR_KL = 1e-6
# What ``write`` writes.
FILES = ("curve.png", "curve.html")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
img { max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd; }
tr.knee { background: #fff3cd; font-weight: bold; }
"""


def write(
    folder: Path, points: Sequence[Point], knee: Point | None, full_ms: float, max_kl: float, what: str
) -> list[Path]:
    """Writes ``curve.png`` and ``curve.html`` to ``folder`` and returns their paths. Raises UsageError."""
    picture = _picture(points, knee, full_ms, max_kl)
    page = _page(points, knee, full_ms, max_kl, what, picture)
    files = {folder / name: data for name, data in zip(FILES, (picture, page.encode()), strict=True)}
    with OSErrorAs(UsageError, f"{folder}: cannot write the curve"):
        folder.mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        with writing(path, "the curve") as file:
            file.write(data)
    return list(files)


def _picture(points: Sequence[Point], knee: Point | None, full_ms: float, max_kl: float) -> bytes:
    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    # Points come ordered by target, depth and threshold; a line is what a falling threshold does.
    for (target, depth), line in groupby(points, key=lambda one: (one.setting.target, one.setting.max_depth)):
        drawn = list(line)
        axes.plot(
            [point.ms_per_token for point in drawn],
            [point.kl for point in drawn],
            marker="o",
            markersize=4,
            label=f"{target}, max depth {depth}",
        )
    axes.axhline(max_kl, linestyle="--", color="grey", linewidth=1, label=f"budget {max_kl:g} nats")
    axes.axvline(full_ms, linestyle=":", color="grey", linewidth=1, label="full depth, fp32")
    if knee is not None:
        axes.scatter([knee.ms_per_token], [knee.kl], s=160, facecolors="none", edgecolors="crimson", label="knee")
    axes.set_yscale("symlog", linthresh=_LINEAR_KL)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms per token")
    axes.set_ylabel("KL divergence to full depth, nats per position")
    axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _page(points: Sequence[Point], knee: Point | None, full_ms: float, max_kl: float, what: str, picture: bytes) -> str:
    names = ("target", "threshold", "max depth", "KL, nats", "top-1", "mean depth", "ms per token", "speedup")
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = "\n".join(_row(point, point is knee) for point in points)
    image = base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>mythos-edge tune</title><style>{_STYLE}</style></head>
<body>
<h1>Quality against speed</h1>
<p>{html.escape(what)}. Full depth of the fp32 target takes {full_ms:.3g} ms per token; KL and top-1 are measured
against it. The knee is the fastest point with KL at most {max_kl:g}.</p>
<img alt="KL divergence over milliseconds per token" src="data:image/png;base64,{image}">
<table>
<tr>{head}</tr>
{rows}
</table>
</body>
</html>
"""


def _row(point: Point, is_knee: bool) -> str:
    one = point.setting
    cells = (
        one.target,
        f"{one.threshold:.4g}",
        str(one.max_depth),
        f"{point.kl:.2g}",
        f"{point.top1_agreement:.1%}",
        f"{point.mean_depth:.2f}",
        f"{point.ms_per_token:.3g}",
        f"{point.speedup:.2f}x" + ("" if point.steady else ", noisy"),
    )
    opening = '<tr class="knee">' if is_knee else "<tr>"
    return opening + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
