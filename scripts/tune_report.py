"""The curve of ``mythos-edge tune`` as a picture, and as one HTML file that needs no other."""

import io
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure

from mythos_edge.model.errors import OSErrorAs, UsageError
from mythos_edge.model.output_files import writing
from mythos_edge.scripts import html_page
from mythos_edge.scripts.tune_points import Point

# KL of 0 is drawn, too: below this the axis is linear.
_LINEAR_KL = 1e-6
# What ``write`` writes.
FILES = ("curve.png", "curve.html")


def write(
    folder: Path | None,
    page_file: Path | None,
    points: Sequence[Point],
    knee: Point | None,
    full_ms: float,
    max_kl: float,
    what: str,
) -> list[Path]:
    """Writes ``curve.png`` and ``curve.html`` to ``folder`` and the page to ``page_file``, where these are given.

    Returns what was written. Raises UsageError.
    """
    picture = _picture(points, knee, full_ms, max_kl)
    page = _page(points, knee, full_ms, max_kl, what, picture).encode()
    files = {} if folder is None else {folder / name: data for name, data in zip(FILES, (picture, page), strict=True)}
    if folder is not None:
        with OSErrorAs(UsageError, f"{folder}: cannot write the curve"):
            folder.mkdir(parents=True, exist_ok=True)
    if page_file is not None:
        files[page_file] = page
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
    # Room above the worst point, which would lie on the frame.
    axes.set_ylim(0, 2 * max([max_kl, *(point.kl for point in points)]) or None)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms per token")
    axes.set_ylabel("KL divergence to full depth, nats per position")
    axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _page(points: Sequence[Point], knee: Point | None, full_ms: float, max_kl: float, what: str, picture: bytes) -> str:
    names = ("target", "threshold", "max depth", "KL, nats", "top-1", "mean depth", "ms per token", "speedup")
    marked = next((number for number, point in enumerate(points) if point is knee), None)
    about = (
        f"{what}. Full depth of the fp32 target takes {full_ms:.3g} ms per token; KL and top-1 are measured against "
        f"it. The knee is the fastest point with KL at most {max_kl:g}."
    )
    drawn = html_page.picture(picture, "KL divergence over milliseconds per token")
    return html_page.page("Quality against speed", about, drawn, html_page.table(names, map(_cells, points), marked))


def _cells(point: Point) -> tuple[str, ...]:
    one = point.setting
    return (
        one.target,
        f"{one.threshold:.4g}",
        str(one.max_depth),
        f"{point.kl:.2g}",
        f"{point.top1_agreement:.1%}",
        f"{point.mean_depth:.2f}",
        f"{point.ms_per_token:.3g}",
        f"{point.speedup:.2f}x" + ("" if point.steady else ", noisy"),
    )
