"""The section of the concentration of maps."""

from collections.abc import Sequence

from torch import Tensor

from diffmm.analysis.concentration import MEASURES, TOP_K
from diffmm.analysis.figures import Cell
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

MEASURE_LABELS = {
    "entropy": "entropy (nats)",
    "top_share": f"share of the top {TOP_K}",
    "hoyer": "Hoyer sparsity",
    "negative_share": "share of negative weight",
    "first_share": "share of the first token",
}


def concentration_section(runs: Sequence[Analyzed]) -> AnalysisSection:
    """Concentration of the maps."""
    rows: list[list[Cell]] = []
    details: list[list[Cell]] = []
    lines: dict[str, list[tuple[int, str, int, list[Tensor]]]] = {m: [] for m in MEASURES}
    for number, run in enumerate(runs):
        layers = run.measured.concentration
        names = list(dict.fromkeys(name for layer in layers for name in layer.maps))
        for style, name in enumerate(names):
            values = {m: [layer.maps[name][m] for layer in layers if name in layer.maps]
                      for m in MEASURES}  # fmt: skip
            rows.append([run.name, name, *(mean_over(values[m]) for m in MEASURES)])
            for measure in MEASURES:
                label = f"{run.name}: {name}" if len(runs) > 1 else name
                lines[measure].append((number, label, style, values[measure]))
        details += [
            [run.name, layer.name, name, head, *(float(measures[m][head]) for m in MEASURES)]
            for layer in layers
            for name, measures in layer.maps.items()
            for head in range(len(measures["entropy"]))
        ]
    head = [MEASURE_LABELS[m] for m in MEASURES]
    return AnalysisSection(
        "Concentration",
        "How unevenly a query attends: means over queries, heads and layers. Weights of "
        "A1 − λA2 have both signs; they count by their size, normalized to sum 1.",
        table_of("concentration", ["run", "map", *head], rows),
        [Table("concentration_by_head", ["run", "layer", "map", "head", *head], details)]
        if details
        else [],
        [
            chart_by_layer(
                f"concentration_{measure}",
                capitalized(MEASURE_LABELS[measure]),
                MEASURE_LABELS[measure],
                lines[measure],
            )
            for measure in MEASURES
            if lines[measure]
        ],
        problems_of(runs, MAPS),
    )
