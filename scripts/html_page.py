"""Reports of verbs as one HTML file that needs no other file and no host: the frame, tables, pictures and bars."""

import base64
import html
from collections.abc import Callable, Iterable, Mapping, Sequence

from mythos_edge.model.versions import version_of
from mythos_edge.scripts.measuring import Spread

# Nothing but what stands in the file itself.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root {
  color-scheme: light dark;
  --ground: #faf9f7; --card: #fff; --line: #e3dfd8; --ink: #1d1a22; --soft: #67616f; --accent: #6a3d9a; --mark: #f6ead0;
  --bad: #c0392b; --good: #2e7d4f; --second: #b8860b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #15131a; --card: #1d1a24; --line: #322d3d; --ink: #ece8f2; --soft: #a49cb2; --accent: #c79bf2;
    --mark: #463a1d; --bad: #ff7b6b; --good: #7fd6a0; --second: #e6b94d;
  }
}
body {
  font: 15px/1.5 system-ui, sans-serif; max-width: 68em; margin: 2em auto; padding: 0 1em;
  background: var(--ground); color: var(--ink);
}
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin: 1.6em 0 .4em; }
img { max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; background: var(--card); }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; }
tbody th { font-weight: inherit; } thead th { font-weight: 600; color: var(--soft); }
tr.knee { background: var(--mark); font-weight: bold; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .3em 1em; align-items: center; }
.bar { position: relative; height: 1.1em; background: var(--line); border-radius: 4px; }
.bar span { position: absolute; inset: 0 auto 0 0; background: var(--accent); border-radius: 4px; }
.bar i { position: absolute; top: .45em; height: .2em; background: var(--ink); }
.bar i.limit { top: -.15em; width: 2px; height: 1.4em; }
.note { border-left: 4px solid var(--accent); padding-left: .8em; }
.soft { color: var(--soft); }
.bar.bad span { background: var(--bad); }
.verdict { border-left: 6px solid var(--good); background: var(--card); padding: .6em 1em; border-radius: 0 8px 8px 0; }
.verdict.bad { border-color: var(--bad); } .verdict strong { font-size: 1.15em; } .verdict p { margin: .3em 0; }
svg { display: block; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg .cell { fill: var(--accent); stroke: var(--line); stroke-width: .6; }
svg .cell.bad { fill: var(--bad); } svg .cell.none { fill: none; stroke: var(--soft); stroke-dasharray: 2 2; }
svg .column { fill: var(--accent); } svg .axis { stroke: var(--soft); } svg .grid { stroke: var(--line); }
svg polyline { fill: none; stroke: var(--accent); stroke-width: 2; } svg circle { fill: var(--accent); }
svg polyline.second { stroke: var(--second); } svg circle.second { fill: var(--second); }
svg polyline.third { stroke: var(--soft); stroke-dasharray: 5 4; } svg circle.third { fill: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: .3em 1.4em; margin: .3em 0; color: var(--soft); font-size: .9em; }
.legend i { display: inline-block; width: 1.6em; height: .8em; margin-right: .45em; border-radius: 2px; }
.legend i { background: var(--accent); } .legend .second { background: var(--second); }
.legend .third { background: var(--soft); } .legend .bad { background: var(--bad); } .legend .weak { opacity: .25; }
.legend .none { background: none; border: 1px dashed var(--soft); }
.tokens { background: var(--card); padding: .8em 1em; line-height: 1.9; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens b {
  font-weight: inherit; border-radius: 3px;
  background: color-mix(in srgb, var(--accent) calc(var(--v) * 1%), transparent);
}
"""


def page(title: str, about: str, *parts: str) -> str:
    """The whole file: ``title`` and ``about`` are text, ``parts`` are HTML."""
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(about)}</p>
{body}
<p class="soft">mythos-edge {html.escape(version_of("mythos-edge"))}</p>
</body>
</html>
"""


def note(text: str) -> str:
    """A paragraph that stands out."""
    return f'<p class="note">{html.escape(text)}</p>'


def heading(text: str) -> str:
    """The title of a part."""
    return f"<h2>{html.escape(text)}</h2>"


def picture(png: bytes, what: str) -> str:
    """Embeds a picture in the page. ``what`` describes it in words."""
    return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], marked: int | None = None) -> str:
    """A table of texts, whose first column names the rows; the ``marked`` row stands out."""
    top = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    lines = [_row(cells, number == marked) for number, cells in enumerate(rows)]
    return (
        f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{"".join(lines)}</tbody>\n</table></div>'
    )


def measures(rows: Iterable[tuple[str, float, str]], scale: Callable[[float], float], limit: float | None) -> str:
    """A bar for each (name, value, text), as long as ``scale`` says from 0 to 1; those beyond the ``limit`` stand out,
    and a line shows where it is."""
    mark = "" if limit is None else f'<i class="limit" style="left:{100 * scale(limit):.2f}%"></i>'
    lines = [
        f"<span>{html.escape(name)}</span>"
        f'<div class="bar{" bad" if limit is not None and not value <= limit else ""}" aria-hidden="true">'
        f'<span style="width:{100 * min(1.0, max(0.0, scale(value))):.2f}%"></span>{mark}</div>'
        f"<span>{html.escape(text)}</span>"
        for name, value, text in rows
    ]
    return '<div class="bars">\n' + "\n".join(lines) + "\n</div>"


def _row(cells: Sequence[str], marked: bool) -> str:
    first, *others = (html.escape(cell) for cell in cells)
    opening = '<tr class="knee">' if marked else "<tr>"
    return f'{opening}<th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>\n'


def bars(spreads: Mapping[str, Spread]) -> str:
    """A bar as long as each median, with a line from the least to the largest, on one scale from 0 on."""
    longest = max((spread.max for spread in spreads.values()), default=0.0) or 1.0

    def share(value: float) -> str:
        return f"{100 * value / longest:.2f}%"

    lines = [
        f"<span>{html.escape(name)}</span>"
        f'<div class="bar" aria-hidden="true"><span style="width:{share(spread.median)}"></span>'
        f'<i style="left:{share(spread.min)};width:{share(spread.max - spread.min)}"></i></div>'
        f"<span>{spread.median:.4g}</span>"
        for name, spread in spreads.items()
    ]
    return '<div class="bars">\n' + "\n".join(lines) + "\n</div>"
