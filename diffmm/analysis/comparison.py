"""A self-contained HTML page that compares several runs: table, curves and attention maps.

Like `diffmm.analysis.report`, it has no scripts or external files, and a light and a dark theme.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from diffmm.analysis.charts import Line, line_chart
from diffmm.analysis.exhibits import Exhibit
from diffmm.analysis.report import draw_exhibit
from diffmm.analysis.word_maps import WordsExhibit

COLORS = ("#0072b2", "#d55e00", "#009e73", "#b5569b", "#8a6d00", "#3f7fae", "#7a52c7", "#6b6b6b")
"""Colors of the runs (after Okabe and Ito); further runs have dashed lines."""

LIGHTER = "color-mix(in srgb, {} 75%, white)"
"""A color of the dark theme."""

DASHES = ("", "7 4", "2 4", "10 4 2 4")

WIDEST = 40
"""Maximum number of characters per cell."""

MOST_POINTS = 400
"""Approximate maximum number of points per curve; longer curves are averaged."""


@dataclass(frozen=True)
class Chart:
    """The curves of one metric.

    Attributes:
        title: Name of the metric.
        curves: Points `(step, value)` in ascending order of steps, by the index of the run.
    """

    title: str
    curves: Mapping[int, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Page:
    """The contents of a page, except attention maps.

    Attributes:
        title: Heading of the page.
        tasks: Descriptions of the runs' recipes.
        head: Header of the table.
        rows: Rows of the table, one per run.
        seed_tables: Headers and rows of tables of runs that differ only in their seeds.
        charts: Charts of the metrics.
        facts: Versions, for the last line.
    """

    title: str
    tasks: Sequence[str]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    seed_tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]]
    charts: Sequence[Chart]
    facts: str


def render_comparison(page: Page, exhibits: Sequence[Exhibit], why_none: str) -> str:
    """Render the page as HTML.

    Args:
        page: Table and curves.
        exhibits: Samples with attention maps; their views are named by the runs' numbers, from 1.
        why_none: The reason if there are no exhibits.
    """
    style = files("diffmm.analysis").joinpath("report.css").read_text(encoding="utf-8")
    tasks = "".join(f'<p class="lede">{escape(task)}</p>' for task in page.tasks)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(page.title)}</title>
<style>
{style}{run_styles(len(page.rows))}</style>
</head>
<body>
<header>
<h1>{escape(page.title)}</h1>
{tasks}</header>
<main>
{results_of(page)}
{maps_of(exhibits, why_none)}
</main>
<footer class="quiet"><p>{escape(page.facts)}</p></footer>
</body>
</html>
"""


def results_of(page: Page) -> str:
    """The table of settings and results, those over seeds, and the curves."""
    charts = "".join(f'<figure class="card">{_chart(chart)}</figure>' for chart in page.charts)
    seeds = "".join(table(head, rows) for head, rows in page.seed_tables)
    return f"""<h2 id="results">Settings and results</h2>
{run_table(page.head, page.rows)}
{seeds}
<h2 id="curves">Curves</h2>
<div class="charts">{charts}</div>
<p class="quiet">The number at the end of each line is that of the run in the table. The first tenth
of the steps is ignored when scaling the axis: lines may start outside the chart.</p>"""


def run_styles(num_runs: int) -> str:
    """CSS rules for the colors and dashes of the runs."""
    rules = [
        "body { max-width: 76rem; } table { max-width: none; }\n",
        "td.name::before { content: '■ '; }\n",
    ]
    for number in range(num_runs):
        color = COLORS[number % len(COLORS)]
        dash = DASHES[number // len(COLORS) % len(DASHES)]
        # The groups of maps are named by the runs' numbers, from 1.
        own = f".run{number}, [class='group {number + 1}']"
        lighter = LIGHTER.format(color)
        rules.append(f"{own} {{ --c: {color}; }}\n")
        rules.append(f"@media (prefers-color-scheme: dark) {{ {own} {{ --c: {lighter}; }} }}\n")
        if dash:
            rules.append(f"svg .run{number} .line {{ stroke-dasharray: {dash}; }}\n")
    return "".join(rules)


def run_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a row per run, in the run's color."""
    body = "".join(
        f'<tr><td class="name run{number}">{number + 1} {escape(row[0])}</td>'
        f"{''.join(map(cell, row[1:]))}</tr>"
        for number, row in enumerate(rows)
    )
    return _scrolled(header, body)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text."""
    return _scrolled(header, "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows))


def _scrolled(header: Sequence[str], body: str) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in header)
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
        f"</div>"
    )


def cell(text: str) -> str:
    """A cell of the table; long text is truncated and shown in full as a tooltip."""
    if len(text) <= WIDEST:
        return f"<td>{escape(text)}</td>"
    return f'<td title="{escape(text)}">…{escape(text[1 - WIDEST :])}</td>'


def _chart(chart: Chart) -> str:
    lines = [
        Line(f"run{number}", str(number + 1), _thinned(curve))
        for number, curve in chart.curves.items()
    ]
    # A curve of one point has no line.
    markers = any(len(line.points) == 1 for line in lines)
    return line_chart(lines, title=chart.title, x_label="step", markers=markers)


def _thinned(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average groups of points, so that at most about `MOST_POINTS` are left, including the last
    step."""
    span = -(-len(curve) // MOST_POINTS)
    groups = [curve[max(0, end - span) : end] for end in range(len(curve), 0, -span)][::-1]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def maps_of(exhibits: Sequence[Exhibit], why_none: str) -> str:
    """The attention maps of samples, or the reason why there are none."""
    if not exhibits:
        return f'<p class="quiet">No attention maps: {escape(why_none)}.</p>'
    drawn = "".join(map(draw_exhibit, exhibits))
    words = ""
    if any(isinstance(exhibit, WordsExhibit) for exhibit in exhibits):
        words = (
            " Below, the words that each model writes about a sample, in several layers: of a "
            "caption what the decoder attends to when it chooses the word, of a transcript by CTC "
            "what the encoder attends to at the times of the word."
        )
    return (
        '<h2 id="maps">What the last layer attends to</h2>'
        '<p class="quiet">Samples of the validation data; groups have the numbers of the runs. '
        "Weights are means over heads, from each run's newest checkpoint: "
        '<span class="scale-line">negative<span class="scale"></span>positive.</span>'
        f"{words}</p>{drawn}"
    )
