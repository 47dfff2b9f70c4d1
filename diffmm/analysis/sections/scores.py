"""The section of attention scores."""

import math
from collections.abc import Sequence

from diffmm.analysis.figures import Cell, Chart, HeatMap, Series
from diffmm.analysis.measurements import SCORES
from diffmm.analysis.sections.section import (
    AnalysisSection,
    Analyzed,
    Table,
    chart_by_layer,
    problems_of,
    table_of,
)


def score_section(runs: Sequence[Analyzed]) -> AnalysisSection:
    """Attention scores."""
    scored = [(run, run.measured.scores) for run in runs if run.measured.scores is not None]
    rows: list[list[Cell]] = []
    details: list[list[Cell]] = []
    by_query: list[list[Cell]] = []
    problems = problems_of(runs, SCORES)
    heat_maps: list[HeatMap] = []
    shares = [
        float(share)
        for _, scores in scored
        for layer in scores.layers
        for share in layer.answer
        if math.isfinite(share)
    ]
    for run, scores in scored:
        if math.isnan(scores.answer):
            problems.append(
                f"{run.name}: lambda is within 0.05 of 1 at every query, where scores divided by "
                f"1 - lambda are not defined"
            )
        rows.append(
            [
                run.name,
                scores.answer,
                scores.noise,
                scores.signal_to_noise,
                scores.left_out,
                scores.above_one,
            ]
        )
        details += [
            [run.name, layer.name, head, *(float(value) for value in values)]
            for layer in scores.layers
            for head, values in enumerate(
                zip(layer.answer, layer.noise, layer.left_out, layer.above_one, strict=True)
            )
        ]
        by_query += [
            [run.name, number, query.answer, query.noise]
            for number, query in enumerate(scores.queries)
        ]
        number = runs.index(run)
        widest = max(len(layer.answer) for layer in scores.layers)
        values = [
            [*map(float, layer.answer), *[math.nan] * (widest - len(layer.answer))]
            for layer in scores.layers
        ]
        if not math.isnan(scores.answer):
            heat_maps.append(
                HeatMap(
                    f"scores_of_run_{number + 1}",
                    f"Share to the answer, {run.name}",
                    "head",
                    "layer",
                    values,
                    [str(index) for index in range(len(scores.layers))],
                    [str(head) for head in range(widest)],
                    (min(shares), max(shares)),
                )
            )
    names = ("share to answer", "share to noise", "queries left out", "lambda above 1")
    figures: list[Chart | HeatMap] = [
        chart_by_layer(
            "scores_answer",
            "Share to the answer",
            "share",
            [(runs.index(run), run.name, 0, [s.answer for s in x.layers]) for run, x in scored],
        ),
        chart_by_layer(
            "scores_noise",
            "Share to the noise",
            "share",
            [(runs.index(run), run.name, 0, [s.noise for s in x.layers]) for run, x in scored],
        ),
        Chart(
            "scores_by_query",
            "Share to the answer by query of a sample",
            "query",
            "share",
            [
                Series(run.name, [(i, q.answer) for i, q in enumerate(x.queries)], runs.index(run))
                for run, x in scored
            ],
        ),
        *heat_maps,
    ]
    if not any(len(scores.queries) > 1 for _, scores in scored):
        figures = [figure for figure in figures if figure.name != "scores_by_query"]
    return AnalysisSection(
        "Attention scores",
        "Share of the attention to the tokens that hold the answer and to the noise around them, "
        "divided by 1 − λ, so that all shares of a query sum to 1; means over queries, heads and "
        "layers (Ye et al. 2025, table 3). Queries with |1 − λ| below 0.05 are left out.",
        table_of(
            "scores",
            ["run", names[0], names[1], "signal to noise", *names[2:]],
            rows,
        ),
        [
            Table("scores_by_head", ["run", "layer", "head", *names], details),
            Table("scores_by_query", ["run", "query", *names[:2]], by_query),
        ]
        if details
        else [],
        figures if scored else [],
        problems,
    )
