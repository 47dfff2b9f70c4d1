"""The section of outliers."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffmm.analysis.figures import Cell
from diffmm.analysis.magnitudes import Magnitudes
from diffmm.analysis.measurements import MAPS
from diffmm.analysis.row_means import mean_over
from diffmm.analysis.sections.section import (
    AnalysisSection,
    Analyzed,
    Table,
    capitalized,
    chart_by_layer,
    problems_of,
    table_of,
)

TOPS = (1, 2, 3, 10, 100)
"""Ranks of the largest magnitudes in the table, as in the paper's table 5."""


def outlier_section(runs: Sequence[Analyzed]) -> AnalysisSection:
    """Outliers of activations."""
    rows: list[list[Cell]] = []
    details: list[list[Cell]] = []
    lines: dict[str, list[tuple[int, str, int, list[Tensor]]]] = {}
    head = [*(f"top {rank}" for rank in TOPS), "median", "kurtosis"]
    for number, run in enumerate(runs):
        outliers = run.measured.outliers
        if outliers is None:
            continue
        for style, (name, layers) in enumerate(
            (("attention logits", outliers.logits), ("hidden states", outliers.hidden))
        ):
            if not layers:
                continue
            found = list(layers.values())
            every = torch.cat([each.top for each in found]).sort(descending=True).values
            medians, kurtoses = (
                mean_over([torch.tensor([value]) for value in values])
                for values in ([x.median for x in found], [x.kurtosis for x in found])
            )
            rows.append([run.name, name, *_ranks(every), medians, kurtoses])
            details += [
                [run.name, name, layer, *_ranks(each.top), each.median, each.kurtosis]
                for layer, each in layers.items()
            ]
            series: tuple[tuple[str, Callable[[Magnitudes], float]], ...] = (
                ("largest", lambda each: float(each.top[0])),
                ("kurtosis", lambda each: each.kurtosis),
            )
            for what, value_of in series:
                values = [torch.tensor([value_of(each)]) for each in found]
                lines.setdefault(f"{what} {name}", []).append((number, run.name, style, values))
    return AnalysisSection(
        "Outliers",
        "Magnitudes of the attention logits (both components, as the softmax uses them) and of the "
        "hidden states after each block: the largest of all layers, and means over layers of the "
        "median and of the kurtosis (3 for a normal distribution) (Ye et al. 2025, table 5).",
        table_of("outliers", ["run", "activation", *head], rows),
        [Table("outliers_by_layer", ["run", "activation", "layer", *head], details)]
        if details
        else [],
        [
            chart_by_layer(
                f"outliers_{what.replace(' ', '_')}",
                capitalized(_titled(what)),
                "magnitude" if what.startswith("largest") else "kurtosis",
                each,
                log=True,
            )
            for what, each in lines.items()
        ],
        problems_of(runs, MAPS),
    )


def _ranks(top: Tensor) -> list[float]:
    return [float(top[rank - 1]) if rank <= len(top) else math.nan for rank in TOPS]


def _titled(what: str) -> str:
    kind, _, name = what.partition(" ")
    return f"{kind} magnitude of {name}" if kind == "largest" else f"{kind} of {name}"
