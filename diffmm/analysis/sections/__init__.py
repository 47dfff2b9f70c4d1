"""The sections of an analysis: its tables and figures, from the measurements of several runs."""

from collections.abc import Iterable, Sequence

from diffmm.analysis.figures import Cell, Chart, HeatMap
from diffmm.analysis.sections.cancellation import cancellation_section
from diffmm.analysis.sections.concentration import concentration_section
from diffmm.analysis.sections.gradients import gradient_section
from diffmm.analysis.sections.lambdas import lambda_section
from diffmm.analysis.sections.outliers import outlier_section
from diffmm.analysis.sections.quantization import quantization_section
from diffmm.analysis.sections.scores import score_section
from diffmm.analysis.sections.section import AnalysisSection, Analyzed, Table

__all__ = ["AnalysisSection", "Analyzed", "Table", "figures_of", "sections_of", "tables_of"]


def sections_of(runs: Sequence[Analyzed]) -> list[AnalysisSection]:
    """The sections of an analysis of some runs that have results or problems."""
    makers = (
        score_section,
        concentration_section,
        lambda_section,
        cancellation_section,
        outlier_section,
        quantization_section,
        gradient_section,
    )
    made = [make(runs) for make in makers]
    return [each for each in made if each.summary or each.figures or each.problems]


def figures_of(sections: Iterable[AnalysisSection]) -> list[Chart | HeatMap]:
    """All figures."""
    return [figure for section in sections for figure in section.figures]


def tables_of(sections: Iterable[AnalysisSection]) -> list[tuple[str, list[list[Cell]]]]:
    """All tables with their numbers, and the numbers of all figures, by the names of their
    files."""
    found: list[tuple[str, list[list[Cell]]]] = []
    for section in sections:
        for table in [section.summary, *section.details]:
            if table is not None:
                found.append((table.name, [list(table.head), *map(list, table.rows)]))
        found += [(f"figure_{figure.name}", figure.table()) for figure in section.figures]
    return found
