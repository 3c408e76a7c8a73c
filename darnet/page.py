"""One self-contained HTML page, for a screen, a phone or paper: sections of text, tables and figures in, HTML out.

Nothing on it is fetched from anywhere (its own security policy forbids that), all text is escaped, and the notice
"research use only" stands on every page.
"""

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from darnet import NOTICE

UNDEFINED = "undefined"

# Okabe and Ito's palette, told apart by colour-blind readers and on grey paper in this order. Source: ours.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

_NUMBER = re.compile(rf"(?:< )?[-−+]?\d(?:[-−+±\d., ()%]|to|of)*|–|{UNDEFINED}|")

LONG_NAME = 40  # letters from which a row's name may break, lest it push all else off the screen


@dataclass(frozen=True, slots=True)
class Bar:
    """A cell drawn as a bar from a baseline, with a line over its interval; its numbers stand in cells beside it.

    Units: shares of the cell's width, from 0 (left) to 1.
    """

    baseline: float
    value: float
    low: float
    high: float
    colour: str


Cell = str | int | float | Bar | None


@dataclass(frozen=True, slots=True)
class HtmlTable:
    """A table: floats are shown with four decimals, NaN as undefined, None as a dash; columns of numbers stand right.

    The first cell of a row names the row. A header of empty cells is not shown. A table with bars is as wide as the
    page, and `legend` says in words what their colours mean.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class HtmlFigure:
    """A picture: SVG from `figure_to_svg`, or a JPEG's bytes; the caption is also read aloud, so it says what is seen.

    A wide one takes the page's whole width.
    """

    picture: str | bytes
    caption: str
    is_wide: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page: paragraphs (a blank line between them), then tables, then figures side by side."""

    title: str
    text: str = ""
    tables: Sequence[HtmlTable] = ()
    figures: Sequence[HtmlFigure] = ()


def render_page(title: str, summary: str, sections: Sequence[Section]) -> str:
    """The whole page; the same arguments give the same bytes.

    Raises: ValueError for a table whose rows are not as long as its header.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"paragraphs": _split_paragraphs, "data_uri": _to_data_uri}
    environment.globals |= {"lay_out": lay_out_table, "notice": NOTICE}
    return environment.from_string(TEMPLATE).render(title=title, summary=summary, sections=sections)


def figure_to_svg(figure: Figure) -> str:
    """Draw a figure as SVG: letters become outlines, so that it looks the same where a font is missing.

    The same figure gives the same bytes.
    """
    sink = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "darnet", "svg.fonttype": "path"}):
        figure.savefig(sink, format="svg", dpi=110, metadata={"Date": None, "Creator": None})
    return sink.getvalue()


def figure_to_png(figure: Figure) -> bytes:
    """Draw a figure as PNG, for slides; the same figure gives the same bytes."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110, metadata={"Software": None})
    return sink.getvalue()


def format_cell(value: Cell) -> str:
    """A cell as text."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if math.isfinite(value) else UNDEFINED
    return _draw_bar(value) if isinstance(value, Bar) else str(value)


def _draw_bar(bar: Bar) -> Markup:
    """Three boxes: the bar, its interval, the baseline. Not read aloud, as the numbers beside it are."""
    box = Markup('<i class="{}" style="left:{:.2f}%;width:{:.2f}%;background:{}"></i>')
    ends = sorted((bar.baseline, bar.value))
    boxes = [
        box.format("value", 100 * ends[0], 100 * (ends[1] - ends[0]), bar.colour),
        box.format("interval", 100 * bar.low, 100 * (bar.high - bar.low), "var(--ink)"),
        box.format("baseline", 100 * bar.baseline, 0, "var(--ink)"),
    ]
    return Markup('<span class="bar" aria-hidden="true">{}</span>').format(Markup("").join(boxes))


def lay_out_table(table: HtmlTable) -> tuple[list[list[str]], list[str]]:
    """A table's cells as text, and each column's CSS class."""
    rows = [[format_cell(value) for value in row] for row in table.rows]
    if any(len(row) != len(table.header) for row in rows):
        raise ValueError(f"table {table.caption!r}: a row is not as long as the header")
    is_number = [all(_NUMBER.fullmatch(row[column]) for row in rows) for column in range(len(table.header))]
    kinds = ["number" if number else "text" for number in is_number]
    for column in range(len(kinds)):
        if any(isinstance(row[column], Bar) for row in table.rows):
            kinds[column] = "text drawn"
    if kinds and any(len(row[0]) > LONG_NAME for row in rows):
        kinds[0] += " long"
    return rows, kinds


def _split_paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _to_data_uri(picture: str | bytes) -> str:
    """An image of its own, not markup of the page: identifiers inside two figures cannot meet."""
    kind, data = ("svg+xml", picture.encode()) if isinstance(picture, str) else ("jpeg", picture)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>{{ title }}</title>
<style>
:root { --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --wash: #f6f8fa; --warn: #8a3b00; --warn-wash: #fff4e5; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem; background: #fff; color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.2rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 48rem; overflow-wrap: anywhere; }
.notice { margin: 1rem 0; padding: .6rem .9rem; max-width: none; border-left: .3rem solid var(--warn);
  background: var(--warn-wash); color: var(--warn); font-weight: 600; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
caption span { display: block; max-width: min(48rem, calc(100vw - 2.5rem)); }
th, td { padding: .3rem .8rem .3rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { border-bottom: 2px solid var(--ink); background: var(--wash); }
tbody th { font-weight: 500; white-space: nowrap; }
.text { text-align: left; }
.number { text-align: right; white-space: nowrap; }
td.text { min-width: 8rem; overflow-wrap: anywhere; }
th.long { white-space: normal; overflow-wrap: anywhere; min-width: 14rem; }
.wide { width: 100%; }
.wide td.text { min-width: 0; white-space: nowrap; }
.wide th, .wide td { padding: .3rem .7rem .3rem .3rem; }
.wide th.long { min-width: 12.5rem; }
.wide td.drawn { width: 28%; }
.bar { position: relative; display: block; height: 1rem; min-width: 6rem; margin: .25rem 0; }
.bar i { position: absolute; height: 100%; }
.bar .interval { top: calc(50% - 1px); height: 2px; min-width: 1px; }
.bar .baseline { min-width: 1px; top: -.3rem; height: calc(100% + .6rem); }
.bar i, .legend i { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
.legend b { margin-right: 1rem; font-weight: 400; white-space: nowrap; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; vertical-align: -.05rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; }
figure { margin: .8rem 0; flex: 1 1 20rem; max-width: 29.5rem; }
figure.wide { flex-basis: 100%; max-width: none; }
img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .3rem; overflow-wrap: anywhere; }
footer { margin-top: 2.5rem; padding-top: .6rem; border-top: 1px solid var(--line); color: var(--soft); }
@media (max-width: 40rem) {
  body { padding: 1rem .8rem 2rem; }
  table { font-size: .85rem; }
  th, td { padding: .3rem .5rem .3rem .3rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, table, tr, .notice { break-inside: avoid; }
  h2 { break-after: avoid; }
  .table { overflow: visible; }
}
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
{% for paragraph in summary | paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
<p class="notice" role="note">{{ notice }}</p>
</header>
<main>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% for paragraph in section.text | paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
{% for table in section.tables %}
{% set rows, kinds = lay_out(table) %}
<div class="table"><table{% if "text drawn" in kinds %} class="wide"{% endif %}>
<caption><span>{{ table.caption }}</span>
{% if table.legend %}
<span class="legend">
{% for colour, words in table.legend %}
<b><i style="background:{{ colour }}"></i>{{ words }}</b>
{% endfor %}
</span>
{% endif %}
</caption>
{% if table.header | join %}
<thead><tr>
{% for name in table.header %}
<th scope="col" class="{{ kinds[loop.index0] }}">{{ name }}</th>
{% endfor %}
</tr></thead>
{% endif %}
<tbody>
{% for row in rows %}
<tr>
{% for cell in row %}
{% if loop.first %}
<th scope="row" class="{{ kinds[0] }}">{{ cell }}</th>
{% else %}
<td class="{{ kinds[loop.index0] }}">{{ cell }}</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
{% if section.figures %}
<div class="figures">
{% for figure in section.figures %}
<figure{% if figure.is_wide %} class="wide"{% endif %}>
<img src="{{ figure.picture | data_uri }}" alt="{{ figure.caption }}">
<figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}
</div>
{% endif %}
</section>
{% endfor %}
</main>
<footer>{{ notice }}</footer>
</body>
</html>
"""
