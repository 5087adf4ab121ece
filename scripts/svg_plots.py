"""Plots of reports as pictures inside an HTML page, drawn with the page's own colours: heat maps, columns and lines.

Every plot is text of SVG with a description of itself; a cell, column or point tells its value when it is pointed at.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LEFT, _TOP, _BOTTOM, _RIGHT = 64.0, 8.0, 42.0, 16.0
_WIDTH, _HEIGHT = 960.0, 240.0
_CELL_HEIGHT, _NARROWEST, _WIDEST = 22.0, 4.0, 44.0
# Labels below each other's cells have so much room.
_LABEL = 30.0
# Every series has a class of its own, which has the colour and the dashes.
_SERIES = ("first", "second", "third")


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map: how dark from 0 to 1, and what it tells. ``kind``: "bad", or "none" without a value."""

    shade: float
    tip: str
    kind: str = ""


def heat_map(rows: Mapping[str, Sequence[Cell]], columns: Sequence[str], what: str, x_label: str, y_label: str) -> str:
    """Cells below each other by the name of their row, the first at the bottom; ``what`` describes the picture."""
    width = min(_WIDEST, max(_NARROWEST, (_WIDTH - _LEFT - _RIGHT) / max(1, len(columns))))
    height = _TOP + _CELL_HEIGHT * len(rows) + _BOTTOM
    parts = []
    for level, (name, cells) in enumerate(reversed(list(rows.items()))):
        y = _TOP + _CELL_HEIGHT * level
        parts.append(_text(_LEFT - 6, y + _CELL_HEIGHT / 2 + 4, name, "end"))
        parts += [
            f'<rect class="cell {cell.kind}" x="{_LEFT + width * at:.1f}" y="{y:.1f}" width="{width - 1:.1f}" '
            f'height="{_CELL_HEIGHT - 1:.1f}" fill-opacity="{min(1.0, max(0.0, cell.shade)):.3f}">'
            f"<title>{html.escape(cell.tip)}</title></rect>"
            for at, cell in enumerate(cells)
        ]
    every = max(1, math.ceil(_LABEL / width))
    base = _TOP + _CELL_HEIGHT * len(rows)
    for at in range(0, len(columns), every):
        parts.append(_text(_LEFT + width * (at + 0.5), base + 15, columns[at]))
    right = _LEFT + width * len(columns)
    parts += _axis_names(x_label, y_label, (_LEFT + right) / 2, base, height)
    return _svg(parts, max(right + _RIGHT, 200.0), height, what)


def column_chart(values: Mapping[str, float], what: str, x_label: str, y_label: str) -> str:
    """A column for each value, from 0 on, with the value above it."""
    most = max(values.values(), default=0.0) or 1.0
    width = min(60.0, (_WIDTH - _LEFT - _RIGHT) / max(1, len(values)))
    base, room = _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM - _TOP - 18
    parts, every = [], max(1, math.ceil(_LABEL / width))
    for at, (name, value) in enumerate(values.items()):
        x, tall = _LEFT + width * at, room * value / most
        parts.append(
            f'<rect class="column" x="{x + 1:.1f}" y="{base - tall:.1f}" width="{max(1.0, width - 4):.1f}" '
            f'height="{tall:.1f}"><title>{html.escape(f"{name}: {value:g}")}</title></rect>'
        )
        if at % every == 0:
            parts.append(_text(x + width / 2, base + 15, name))
        if width >= _LABEL:
            parts.append(_text(x + width / 2, base - tall - 5, f"{value:g}"))
    right = _LEFT + width * len(values)
    parts.append(_line("axis", _LEFT, base, right, base))
    parts += _axis_names(x_label, y_label, (_LEFT + right) / 2, base, _HEIGHT)
    return _svg(parts, max(right + _RIGHT, 200.0), _HEIGHT, what)


def line_chart(series: Mapping[str, Sequence[float]], what: str, x_label: str, y_label: str) -> str:
    """Up to three series over 0, 1, 2 ... on a logarithmic scale; what is not above 0 or not finite has no point."""
    known = [value for values in series.values() for value in values if _drawn(value)]
    if not known:
        return ""
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    high = max(high, low + 1)
    count = max(map(len, series.values()))
    width, base = 640.0, _HEIGHT - _BOTTOM
    step = (width - _LEFT - _RIGHT) / max(1, count - 1)

    def place(at: int, value: float) -> tuple[float, float]:
        share = (math.log10(value) - low) / (high - low)
        return _LEFT + step * at, base - (base - _TOP - 6) * share

    parts = []
    for power in range(low, high + 1, max(1, (high - low) // 5)):
        y = place(0, 10.0**power)[1]
        parts += [_line("grid", _LEFT, y, width - _RIGHT, y), _text(_LEFT - 6, y + 4, f"1e{power}", "end")]
    every = max(1, math.ceil(_LABEL / step))
    parts += [_text(_LEFT + step * at, base + 15, str(at)) for at in range(0, count, every)]
    for kind, (name, values) in zip(_SERIES, series.items(), strict=False):
        points = [(at, *place(at, value), value) for at, value in enumerate(values) if _drawn(value)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for _, x, y, _ in points)
        parts.append(f'<polyline class="{kind}" points="{drawn}"/>')
        parts += [
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
            f"<title>{html.escape(f'{name}, {x_label} {at}: {value:.3g}')}</title></circle>"
            for at, x, y, value in points
        ]
    parts += _axis_names(x_label, y_label, width / 2, base, _HEIGHT)
    keys = [(f"key {kind}", name) for kind, name in zip(_SERIES, series, strict=False)]
    return legend(keys) + _svg(parts, width, _HEIGHT, what)


def legend(keys: Sequence[tuple[str, str]]) -> str:
    """Classes with the words of what has their colour."""
    items = "".join(f'<span><i class="{kind}"></i>{html.escape(words)}</span>' for kind, words in keys)
    return f'<p class="legend">{items}</p>'


def _drawn(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _axis_names(x_label: str, y_label: str, middle: float, base: float, height: float) -> list[str]:
    turned = _TOP + (base - _TOP) / 2
    return [
        _text(middle, height - 6, x_label),
        f'<text class="name" transform="translate(14 {turned:.1f}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text>",
    ]


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _line(kind: str, x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"/>'


def _svg(parts: Sequence[str], width: float, height: float, what: str) -> str:
    body = "\n".join(parts)
    return (
        f'<div class="wide"><svg role="img" aria-label="{html.escape(what)}" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">\n{body}\n</svg></div>'
    )
