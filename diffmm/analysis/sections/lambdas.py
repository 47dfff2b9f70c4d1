"""The section of lambda."""

from collections.abc import Sequence

import torch

from diffmm.analysis.figures import Cell, Chart, HeatMap, Series
from diffmm.analysis.measurements import MAPS
from diffmm.analysis.sections.section import (
    AnalysisSection,
    Analyzed,
    Table,
    chart_by_layer,
    problems_of,
    table_of,
)


def lambda_section(runs: Sequence[Analyzed]) -> AnalysisSection:
    """Lambda by layer, on the data and over training."""
    rows: list[list[Cell]] = []
    figures: list[Chart | HeatMap] = []
    problems = []
    lines = []
    for number, run in enumerate(runs):
        layers = run.measured.lambdas
        rows += [
            [run.name, layer.name, layer.mean, layer.smallest, layer.largest, layer.above_one]
            for layer in layers
        ]
        if layers:
            lines.append((number, run.name, 0, [torch.tensor([x.mean]) for x in layers]))
        elif run.measured.concentration:
            problems.append(f"{run.name}: its attention has no lambda")
        if run.curves:
            figures.append(
                Chart(
                    f"lambda_over_training_of_run_{number + 1}",
                    f"λ over training, {run.name}",
                    "step",
                    "λ",
                    [
                        Series(f"layer {index}", curve, color, color // 8)
                        for color, (index, curve) in enumerate(run.curves.items())
                    ],
                )
            )
        elif layers and run.why_no_curves:
            problems.append(f"{run.name}: no curves over training: {run.why_no_curves}")
    if lines:
        figures.insert(0, chart_by_layer("lambda", "λ by layer", "mean λ", lines))
    curves: list[list[Cell]] = [
        [run.name, index, step, value]
        for run in runs
        for index, curve in run.curves.items()
        for step, value in curve
    ]
    return AnalysisSection(
        "Lambda",
        "The factor of the second map, over the heads and queries of the data; and over training, "
        "as logged.",
        table_of("lambda", ["run", "layer", "mean", "min", "max", "share above 1"], rows),
        [Table("lambda_over_training", ["run", "layer", "step", "lambda"], curves)]
        if curves
        else [],
        figures,
        problems + problems_of(runs, MAPS),
    )
