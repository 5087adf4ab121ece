"""``validate --level deep --report``: the deep comparison as one HTML page for people, the verdict first."""

import html
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.output_files import writing
from mythos_edge.runtime.session import Session
from mythos_edge.scripts import html_page, model_page, svg_plots
from mythos_edge.scripts.deep_report import ADVICE, DeepReport, Divergence
from mythos_edge.scripts.model_stats import PAGE, ModelStats
from mythos_edge.scripts.routing import Routing
from mythos_edge.scripts.svg_plots import Cell

# Columns of the heat map: more positions share them, and the worst of a column is shown.
_MOST_COLUMNS = 220
# Shares of the allowed error, as powers of ten: what is shown as nothing, and as the worst there is.
_LEAST, _WORST = -3.0, 3.0
# Rows of a table, of which a page of a bad target would have thousands.
_MOST_ROWS = 40


def write(path: Path, bundle: Bundle, target: str, report: DeepReport, about: str, trust: bool = False) -> None:
    """Writes the page of a ``report`` on a target of ``bundle``; ``about`` says what it was compared with, on what.

    Of a model with experts, the target scores the tokens once more, to show its routing. Raises UsageError.
    """
    with Session.of(bundle, target=target, trust=trust) as session:
        stats = ModelStats(session)
        stats.add(0, report.ids, 0, session.score(report.ids[None]).depth[0])
        texts = stats.texts
    made = page(f"Deep check of {bundle.path.name}", about, report, texts, stats.routing)
    with writing(path, PAGE) as file:
        file.write(made.encode())


def page(title: str, about: str, report: DeepReport, texts: Sequence[str | None], routing: Routing | None) -> str:
    """The page of a ``report`` on tokens with these ``texts``, None for those of a model without a tokenizer."""
    shown = [_token(text, number) for text, number in zip(texts, report.ids.tolist(), strict=True)]
    depths = report.depth.tolist()
    histogram = {str(depth): depths.count(depth) for depth in sorted(set(depths))}
    parts = [
        _verdict(report, shown),
        *_error_map(report, shown),
        *_bars(report),
        *_growth(report),
        *_ties(report, shown),
        *_disagreements(report, shown),
        *_left_out(report),
        *model_page.depth_parts(histogram),
        *model_page.token_parts(list(zip(texts, report.ids.tolist(), depths, strict=True))),
        *([] if routing is None else model_page.routing_parts(routing)),
    ]
    return html_page.page(title, about, *parts)


def _verdict(report: DeepReport, shown: Sequence[str]) -> str:
    found = report.first_divergence
    differing = sum(tie.differs for tie in report.ties)
    if found is None:
        ties = f" {differing} ties fell the other way, which is no failure." if differing else ""
        text = f"Every part that was compared is within what float32 allows.{ties}"
        return f'<div class="verdict"><strong>Passed</strong><p>{html.escape(text)}</p></div>'
    where, errors = _where(found, shown), ""
    if found.allowed:
        errors = f" It is off by {found.error:.3g}, {found.allowed:.3g} is allowed."
    lines = [
        f"The first divergence is at {where}, in the part {found.part}"
        + (f" ({found.tap})" if found.tap else "")
        + f".{errors}",
        f"{found.detail}" if found.detail else "",
        f"Its class is {found.kind}: {ADVICE[found.kind]}.",
    ]
    told = "".join(f"<p>{html.escape(line)}</p>" for line in lines if line)
    return f'<div class="verdict bad"><strong>FAILED</strong>{told}</div>'


def _where(found: Divergence, shown: Sequence[str]) -> str:
    token = f" ({shown[found.position]})" if found.position < len(shown) else ""
    return f"position {found.position}{token}, loop step {found.step_index}"


def _error_map(report: DeepReport, shown: Sequence[str]) -> list[str]:
    """The worst error of all parts by position and loop step, where there is any."""
    _, steps, positions = report.error.shape
    known = ~np.isnan(report.error)
    worst = np.where(known, report.error, -np.inf).max(axis=0)
    which = np.where(known, report.error, -np.inf).argmax(axis=0)
    edges = np.linspace(0, positions, min(positions, _MOST_COLUMNS) + 1).astype(int).tolist()
    columns = list(pairwise(edges))
    rows = {}
    for index in range(steps):
        cells = []
        for first, after in columns:
            at = first + int(worst[index, first:after].argmax())
            value, part = float(worst[index, at]), report.parts[which[index, at]]
            where = f"position {at} ({shown[at]}), loop step {index}"
            cells.append(_cell(value, f"{where}: {part} {_of_allowed(value)}", f"{where}: not compared"))
        rows[str(index)] = cells
    keys = [("weak", "far below what is allowed"), ("", "all that is allowed"), ("bad", "beyond")]
    keys.append(("none", "not compared, as nobody needed it"))
    names = [str(first) for first, _ in columns]
    what = "Largest error by position and loop step, as a share of what is allowed"
    told = (
        "The worst of all parts, as a share of what is allowed. The prelude counts at the first loop step, the coda at "
        "the last."
    )
    return [
        html_page.heading("Error by position and loop step"),
        _paragraph(told),
        svg_plots.legend(keys),
        svg_plots.heat_map(rows, names, what, "position", "loop step"),
    ]


def _cell(value: float, tip: str, without: str) -> Cell:
    if value == -math.inf:
        return Cell(0.0, without, "none")
    if not value <= 1:
        return Cell(0.55 + 0.45 * min(1.0, _power(value) / _WORST), tip, "bad")
    return Cell(max(0.04, 1 - _power(value) / _LEAST) * 0.8, tip)


def _power(value: float) -> float:
    return math.log10(min(max(value, 10**_LEAST), 10**_WORST))


def _bars(report: DeepReport) -> list[str]:
    """The worst error of each part, on a logarithmic scale on which all that is allowed is in the middle."""
    rows = []
    for part, error in zip(report.parts, report.error, strict=True):
        known = error[~np.isnan(error)]
        if known.size:
            rows.append((part, float(known.max()), _of_allowed(float(known.max()))))

    def scale(value: float) -> float:
        return (_power(value) - _LEAST) / (_WORST - _LEAST)

    told = "The worst error of each part, from a thousandth to a thousand times what is allowed, where the line is."
    return [html_page.heading("Error by part"), _paragraph(told), html_page.measures(rows, scale, 1.0)]


def _growth(report: DeepReport) -> list[str]:
    """The error of the state over loop steps, beside that of float32 and what the contraction leaves of the first."""
    series = {"this target": report.growth.tolist(), "the reference's own": report.reference_growth.tolist()}
    told = "The relative error of the state, the largest of all positions, over loop steps that follow each other."
    if report.bound is not None and report.contraction is not None:
        series["bound of the contraction"] = report.bound.tolist()
        least, largest = report.contraction.least, report.contraction.largest
        holds = "holds" if report.contraction.contracts else "does NOT hold"
        told += (
            f" The injection keeps A of a state, from {least:.4g} to {largest:.4g}: 0 < A < 1 {holds}. The bound is "
            "what the largest A alone would leave of the first error; what is above it was added by later loop steps."
        )
    drawn = svg_plots.line_chart(series, "Relative error of the state by loop step", "loop step", "relative error")
    return [
        html_page.heading("Growth of the error over loop steps"),
        _paragraph(told),
        drawn or _paragraph("No error."),
    ]


def _ties(report: DeepReport, shown: Sequence[str]) -> list[str]:
    if not report.ties:
        return []
    differing = sum(tie.differs for tie in report.ties)
    told = (
        f"{len(report.ties)} decisions were so near that float32 may take them either way, {differing} fell otherwise "
        "here. What follows from them is no failure, and counts for nothing above."
    )
    rows = [
        (
            str(tie.position),
            _place(tie.position, shown),
            str(tie.step_index),
            tie.kind,
            f"{tie.margin:.2g}",
            _yes(tie.differs),
        )
        for tie in sorted(report.ties, key=lambda tie: (not tie.differs, tie.margin))
    ]
    head = ("position", "token", "loop step", "tie", "margin", "fell otherwise")
    return [html_page.heading("Near ties"), _paragraph(told), *_cut(head, rows)]


def _disagreements(report: DeepReport, shown: Sequence[str]) -> list[str]:
    if report.router_agreement is None:
        return []
    told = f"{report.router_agreement:.2%} of the choices of experts are those of the reference."
    parts = [html_page.heading("Agreement of the router"), _paragraph(told)]
    if not report.disagreements:
        return parts
    rows = [
        (str(one.position), _place(one.position, shown), str(one.step_index), f"{one.margin:.2g}", _yes(one.tie))
        for one in sorted(report.disagreements, key=lambda one: -one.margin)
    ]
    head = ("position", "token", "loop step", "margin of the reference's choice", "a tie")
    return [*parts, *_cut(head, rows)]


def _left_out(report: DeepReport) -> list[str]:
    parts = []
    if report.other_weights:
        rows = [(name,) for name in report.other_weights]
        parts += [html_page.heading("Tensors that differ from the reference's"), *_cut(("tensor",), rows)]
    if report.missing:
        told = "The target's graphs do not show these values, so that nothing was compared with them."
        parts += [
            html_page.heading("Not compared"),
            _paragraph(told),
            *_cut(("value",), [(one,) for one in report.missing]),
        ]
    return parts


def _cut(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    more = len(rows) - _MOST_ROWS
    return [html_page.table(head, rows[:_MOST_ROWS]), *([_paragraph(f"And {more} more.")] if more > 0 else [])]


def _of_allowed(value: float) -> str:
    return f"{value:.3g} of what is allowed"


def _token(text: str | None, number: int) -> str:
    return str(number) if text is None else repr(text)


def _place(position: int, shown: Sequence[str]) -> str:
    return shown[position] if position < len(shown) else ""


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"
