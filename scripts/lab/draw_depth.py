"""Draws the staircase of a real run as an animated picture: which loop steps each token took, and when.

    python -m mythos_edge.scripts.lab.draw_depth out/carry-adder.bundle -o docs/depth.svg

The run adds two numbers with the demo model, one column of digits after another. A cell is one loop step of one
token: blue where the token itself went on, orange where a later token needed a step that had been skipped, empty where
nobody did.
"""

import argparse
from pathlib import Path

import numpy as np

from mythos_edge.runtime.halting import Depth
from mythos_edge.runtime.session import Session
from mythos_edge.runtime.staircase import Staircase
from mythos_edge.scripts import addition

# One long carry, then short ones: a hard token among easy ones.
_A, _B = 1_841_675_215_938_746, 1_334_353_134_061_255
_MAX_DEPTH = 8
_CELL, _GAP, _LEFT, _TOP = 34, 4, 96, 30
_OWN, _LATER, _NEVER, _TEXT = "#4a78c8", "#e8973a", "#88888830", "#808080"
# Seconds between two tokens, and how long the finished picture stays.
_PACE_S, _REST_S = 0.5, 4.0


def cells_of(bundle: Path, columns: list[int]) -> tuple[dict[tuple[int, int], int], list[int]]:
    """The token during which each (token, loop step) was computed, and the digits that the model says."""
    computed: dict[tuple[int, int], int] = {}
    digits = []
    with Session.open(bundle) as session:
        depth = Depth(max_depth=_MAX_DEPTH).resolve(session.model)
        staircase = Staircase(session.backend, session.model, depth, session.max_context)
        for now, column in enumerate(columns):
            before = staircase.lengths
            fed = staircase.feed(np.array([[column]]), np.zeros(1, np.int64))
            digits.append(int(fed.logits[0, 0, addition.DIGIT_BASE :].argmax()))
            for step, (had, has) in enumerate(zip(before, staircase.lengths, strict=True)):
                computed |= {(token, step): now for token in range(had, has)}
    return computed, digits


def picture(columns: list[int], digits: list[int], computed: dict[tuple[int, int], int]) -> str:
    """The animated SVG; without animation it shows the finished staircase."""
    count = len(columns)
    width, height = _LEFT + count * _CELL + 16, _TOP + (_MAX_DEPTH + 3) * _CELL
    whole_s = count * _PACE_S + _REST_S
    bottom = _TOP + _MAX_DEPTH * _CELL
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        ' font-family="monospace" font-size="15">',
        f"<title>{len(computed)} of {count * _MAX_DEPTH} loop steps</title>",
        f"<style>text{{fill:{_TEXT}}} .c{{animation:a {whole_s}s infinite}}",
        "@keyframes a{0%{opacity:0}1%{opacity:1}}",
        "@media (prefers-reduced-motion: reduce){.c{animation:none}}</style>",
        f'<text x="4" y="18">exact dynamic depth: {len(computed)} of {count * _MAX_DEPTH} loop steps were taken</text>',
    ]
    for step in range(_MAX_DEPTH):
        y = bottom - (step + 1) * _CELL
        parts.append(f'<text x="4" y="{y + 22}">step {step + 1}</text>')
        parts += [_cell(token, y, computed.get((token, step))) for token in range(count)]
    rows = (("columns", [f"{column:02d}" for column in columns]), ("sum", [str(digit) for digit in digits]))
    for row, (title, texts) in enumerate(rows):
        y = bottom + (row + 1) * _CELL - 10
        parts.append(f'<text x="4" y="{y}">{title}</text>')
        parts += [
            f'<text x="{_LEFT + token * _CELL + 15}" y="{y}" text-anchor="middle">{text}</text>'
            for token, text in enumerate(texts)
        ]
    y = bottom + 3 * _CELL - 12
    for index, (colour, text) in enumerate(
        ((_OWN, "the token went on"), (_LATER, "a later token needed it"), (_NEVER, "skipped"))
    ):
        x = 4 + (0, 210, 450)[index]
        parts.append(f'<rect x="{x}" y="{y - 13}" width="16" height="16" rx="3" fill="{colour}"/>')
        parts.append(f'<text x="{x + 24}" y="{y}">{text}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _cell(token: int, y: int, computed_at: int | None) -> str:
    side = _CELL - _GAP
    place = f'x="{_LEFT + token * _CELL}" y="{y}" width="{side}" height="{side}" rx="5"'
    if computed_at is None:
        return f'<rect {place} fill="{_NEVER}"/>'
    colour = _OWN if computed_at == token else _LATER
    # Hidden until its time by a delay with the first frame filled backwards.
    delay = f"animation-delay:{computed_at * _PACE_S:.1f}s;animation-fill-mode:backwards"
    return f'<rect {place} fill="{colour}" class="c" style="{delay}"/>'


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the staircase of a real run.")
    parser.add_argument("bundle", type=Path, help="the demo model's bundle")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/depth.svg"))
    args = parser.parse_args()
    columns = addition.stream_of(_A, _B)
    computed, digits = cells_of(args.bundle, columns)
    args.output.write_text(picture(columns, digits, computed), encoding="utf-8")
    print(f"wrote {args.output}: {len(computed)} of {len(columns) * _MAX_DEPTH} loop steps")


if __name__ == "__main__":
    main()
