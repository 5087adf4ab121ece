"""The parts of an HTML page that show depth by token, and which experts every loop step chooses."""

import html
import math
from collections.abc import Mapping, Sequence

from mythos_edge.scripts import html_page, svg_plots
from mythos_edge.scripts.routing import Routing, StepRouting
from mythos_edge.scripts.svg_plots import Cell

# Tokens that are shown with their depth, and the darkest that their ground becomes.
_MOST_TOKENS = 1500
_DARKEST = 75.0
_MOST_EXPERTS = 224


def depth_parts(histogram: Mapping[str, int]) -> list[str]:
    """How many positions went how deep, as columns with every depth between the least and the largest."""
    depths = [int(depth) for depth in histogram]
    counts = {str(depth): histogram.get(str(depth), 0) for depth in range(min(depths), max(depths) + 1)}
    total = sum(counts.values())
    mean = sum(int(depth) * count for depth, count in counts.items()) / total
    told = f"{total} positions went {mean:.2f} loop steps deep on average."
    columns = svg_plots.column_chart(counts, "Positions by depth", "depth in loop steps", "positions")
    return [html_page.heading("Depth"), _paragraph(told), columns]


def token_parts(tokens: Sequence[tuple[str | None, int, int]]) -> list[str]:
    """The tokens (text or None, id, depth) one after the other, the darker the deeper."""
    if not tokens:
        return []
    shown = tokens[:_MOST_TOKENS]
    depths = [depth for _, _, depth in tokens]
    least, most = min(depths), max(depths)
    words = "".join(
        f'<b style="--v:{_DARKEST * (depth - least) / max(1, most - least):.0f}" '
        f'title="depth {depth}, token {number}">{html.escape(_visible(text, number))}</b>'
        for text, number, depth in shown
    )
    told = f"The stronger the colour, the deeper: from {least} to {most} loop steps."
    if least == most:
        told = f"All went {most} loop steps deep."
    if len(tokens) > len(shown):
        told += f" These are the first {len(shown)} of {len(tokens)} tokens."
    return [html_page.heading("Depth by token"), _paragraph(told), f'<div class="tokens">{words}</div>']


def routing_parts(routing: Routing) -> list[str]:
    """Load of every expert by loop step, overlap of the choices, and the figures as a table."""
    steps, dead = routing.steps(), routing.dead
    told = (
        f"Each loop step chooses {routing.chosen_each} of {routing.experts} experts for every position. "
        f"Choices that know nothing of each other have {routing.by_chance:.1%} in common."
    )
    parts = [html_page.heading("Routing per loop step"), _paragraph(told)]
    if dead:
        named = ", ".join(map(str, dead[:20])) + (f" and {len(dead) - 20} more" if len(dead) > 20 else "")
        parts.append(html_page.note(f"{len(dead)} of {routing.experts} experts were chosen at no loop step: {named}."))
    return [*parts, *_load(steps, routing.experts), *_overlap(steps, routing), _table(steps)]


def _load(steps: Sequence[StepRouting], experts: int) -> list[str]:
    shown = min(experts, _MOST_EXPERTS)
    darkest = max((step.largest_share for step in steps if any(step.load)), default=1.0)
    rows = {}
    for index, step in enumerate(steps):
        choices = max(1, sum(step.load))
        rows[str(index)] = [
            Cell(
                step.load[expert] / choices / darkest,
                f"expert {expert}, loop step {index}: chosen {step.load[expert]} times, "
                f"{step.load[expert] / choices:.1%} of the choices",
                "" if step.load[expert] else "none",
            )
            for expert in range(shown)
        ]
    cut = [] if shown == experts else [_paragraph(f"These are the first {shown} of {experts} experts.")]
    keys = [
        ("weak", f"few of a loop step's choices; 1/{experts} is an even share"),
        ("", f"{darkest:.1%} of them, the most"),
        ("none", "never chosen"),
    ]
    names = [str(expert) for expert in range(shown)]
    drawn = svg_plots.heat_map(rows, names, "Load of each expert by loop step", "expert", "loop step")
    return [svg_plots.legend(keys), drawn, *cut]


def _overlap(steps: Sequence[StepRouting], routing: Routing) -> list[str]:
    parts = []
    for title, shares in (
        ("Experts in common with the loop step before", [step.as_before for step in steps]),
        ("Experts in common with the first loop step", [step.as_first for step in steps]),
    ):
        rows = [(f"loop step {at}", share, f"{share:.1%}") for at, share in enumerate(shares) if not math.isnan(share)]
        if rows:
            chance = html_page.measures(
                [*rows, ("by chance", routing.by_chance, f"{routing.by_chance:.1%}")], float, None
            )
            parts += [html_page.heading(title), chance]
    return parts


def _table(steps: Sequence[StepRouting]) -> str:
    head = ("loop step", "positions", "router entropy, nats", "busiest expert", "dead", "as step before", "as first")
    rows = [
        (
            str(index),
            str(step.positions),
            f"{step.entropy:.3f}",
            _percent(step.largest_share),
            str(len(step.dead)),
            _percent(step.as_before),
            _percent(step.as_first),
        )
        for index, step in enumerate(steps)
    ]
    return html_page.table(head, rows)


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.1%}"


def _visible(text: str | None, number: int) -> str:
    """The text of a token, or its id; one that is all space would not be seen, nor would a line break."""
    if not text:
        return f"{number} "
    return text.replace("\n", "↵\n").replace("\t", "⇥\t")


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"
