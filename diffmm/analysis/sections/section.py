"""What the sections of an analysis are made of."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from diffmm.analysis.figures import Cell, Chart, HeatMap, Series
from diffmm.analysis.measurements import Measurements
from diffmm.analysis.row_means import mean_over


@dataclass(frozen=True)
class Analyzed:
    """A run and its measurements.

    Attributes:
        name: Short name of the run.
        measured: Its measurements.
        curves: Curves of lambda over training, by the index of the layer; may be empty.
        why_no_curves: The reason if there are none.
    """

    name: str
    measured: Measurements
    curves: Mapping[int, Sequence[tuple[float, float]]] = field(default_factory=dict)
    why_no_curves: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: Name of its file, without an ending.
        head: Header.
        rows: Rows; numbers are not rounded.
    """

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def texts(self) -> list[list[str]]:
        """The rows as text, with four significant digits."""
        return [[_text(cell) for cell in row] for row in self.rows]


@dataclass(frozen=True)
class AnalysisSection:
    """One part of an analysis.

    Attributes:
        title: Heading.
        intro: What is measured.
        summary: The table that is printed, with means over layers and heads; None if nothing was
            measured.
        details: Tables with a row per layer (and head), which are written as CSV.
        figures: Figures.
        problems: What could not be measured, and why, one line each.
    """

    title: str
    intro: str
    summary: Table | None
    details: Sequence[Table]
    figures: Sequence[Chart | HeatMap]
    problems: Sequence[str]


def chart_by_layer(
    name: str,
    title: str,
    y_label: str,
    lines: Iterable[tuple[int, str, int, Sequence[Tensor]]],
    *,
    log: bool = False,
) -> Chart:
    """A chart of means over heads by layer; lines are `(run, label, style, values per layer)`."""
    series = [
        Series(label, [(i, mean_over([value])) for i, value in enumerate(values)], run, style)
        for run, label, style, values in lines
    ]
    return Chart(name, title, "layer", y_label, series, log=log)


def table_of(name: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table | None:
    return Table(name, head, rows) if rows else None


def problems_of(runs: Sequence[Analyzed], name: str) -> list[str]:
    """What could not be measured, one line per reason, with the runs that have it."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if name in run.measured.problems:
            found.setdefault(run.measured.problems[name], []).append(run.name)
    return [f"{', '.join(names)}: {reason}" for reason, names in found.items()]


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _text(cell: Cell) -> str:
    if isinstance(cell, float):
        return "-" if math.isnan(cell) else f"{cell:.4g}"
    return str(cell)
