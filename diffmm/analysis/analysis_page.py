"""A self-contained HTML page of an analysis: tables and figures, without scripts or external files,
in a light and a dark theme."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from diffmm.analysis.comparison import (
    COLORS,
    LIGHTER,
    Page,
    maps_of,
    results_of,
    run_styles,
    run_table,
    table,
)
from diffmm.analysis.exhibits import Exhibit
from diffmm.analysis.figures import svg
from diffmm.analysis.sections import AnalysisSection


@dataclass(frozen=True)
class AnalysisPage:
    """The contents of a page.

    Attributes:
        title: Heading of the page.
        data: Description of the data of the measurements.
        head: Header of the table of runs.
        rows: Rows of the table of runs.
        problems: Why runs could not be measured, one line each.
        sections: Tables and figures.
        training: Settings, results and curves of the runs, as on the page of `diffmm compare`; None
            if not all models are those of runs.
        exhibits: Samples with attention maps; their views are named by the runs' numbers, from 1.
        why_none: The reason if there are no exhibits.
        facts: Versions, for the last line.
    """

    title: str
    data: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    problems: Sequence[str]
    sections: Sequence[AnalysisSection]
    training: Page | None
    exhibits: Sequence[Exhibit]
    why_none: str
    facts: str


def render_analysis(page: AnalysisPage) -> str:
    """Render the page as HTML."""
    style = files("diffmm.analysis").joinpath("report.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{_anchor(s)}">{escape(s.title)}</a>' for s in page.sections)
    results = "" if page.training is None else results_of(page.training)
    if results:
        links += '<a href="#results">Settings and results</a><a href="#curves">Curves</a>'
    if page.exhibits:
        links += '<a href="#maps">Maps</a>'
    colors, lighter = (
        "".join(f"--run-{number}: {form.format(color)}; " for number, color in enumerate(COLORS))
        for form in ("{}", LIGHTER)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(page.title)}</title>
<style>
{style}{run_styles(len(page.rows))}:root {{ {colors}}}
@media (prefers-color-scheme: dark) {{ :root {{ {lighter}}} }}
svg.figure {{ display: block; width: 100%; max-width: 34rem; height: auto; }}
.card {{ min-width: 0; max-width: 37rem; }} .problem {{ border-left-color: var(--series-2); }}
</style>
</head>
<body>
<header>
<h1>{escape(page.title)}</h1>
<p class="lede">{escape(page.data)}</p>
<nav>{links}</nav>
</header>
<main>
<h2 id="runs">Runs</h2>
{run_table(page.head, page.rows)}
{_note(page.problems)}
{"".join(map(_section, page.sections))}
{results}
{maps_of(page.exhibits, page.why_none)}
</main>
<footer class="quiet"><p>{escape(page.facts)}</p></footer>
</body>
</html>
"""


def _section(section: AnalysisSection) -> str:
    summary = section.summary
    printed = "" if summary is None else table(summary.head, summary.texts())
    figures = "".join(f'<figure class="card">{svg(figure)}</figure>' for figure in section.figures)
    charts = f'<div class="charts">{figures}</div>' if figures else ""
    return (
        f'<h2 id="{_anchor(section)}">{escape(section.title)}</h2>'
        f'<p class="quiet">{escape(section.intro)}</p>{_note(section.problems)}{printed}{charts}'
    )


def _note(problems: Sequence[str]) -> str:
    lines = "".join(f"<p>{escape(problem)}</p>" for problem in problems)
    return f'<div class="note problem">{lines}</div>' if lines else ""


def _anchor(section: AnalysisSection) -> str:
    return section.title.lower().replace(" ", "-")
