"""The section of gradients at the start."""

from collections.abc import Mapping, Sequence

import torch

from diffmm.analysis.figures import Cell, Chart, Series
from diffmm.analysis.initial_gradients import SOFTMAX, UNSCALED, V1, LayerGradients, ratios
from diffmm.analysis.measurements import GRADIENTS
from diffmm.analysis.row_means import mean_over
from diffmm.analysis.sections.section import AnalysisSection, Analyzed, Table, problems_of, table_of


def gradient_section(runs: Sequence[Analyzed]) -> AnalysisSection:
    """Gradients at the start."""
    compared = (
        ("v1 / softmax", V1, SOFTMAX),
        ("v1 without 1 - lambda_init / softmax", UNSCALED, SOFTMAX),
    )
    rows: list[list[Cell]] = []
    details: list[list[Cell]] = []
    series: list[Series] = []
    # Runs that differ in their attention alone have the same twins.
    groups: list[tuple[Mapping[str, list[LayerGradients]], list[str]]] = []
    for run in runs:
        if not run.measured.gradients:
            continue
        for twins, names in groups:
            if twins == run.measured.gradients:
                names.append(run.name)
                break
        else:
            groups.append((run.measured.gradients, [run.name]))
    for number, (gradients, names) in enumerate(groups):
        is_all = len(names) == len(runs) > 2
        name = f"all {len(names)} runs" if is_all else ", ".join(names)
        details += [
            [name, variant, layer.name, module, norm]
            for variant, layers in gradients.items()
            for layer in layers
            for module, norm in layer.norms.items()
        ]
        for style, (label, one, other) in enumerate(compared):
            norms = [layer.norms["block"] for layer in ratios(gradients[one], gradients[other])]
            mean = mean_over([torch.tensor(norms)])
            rows.append([name, label, norms[0], norms[-1], mean])
            label = f"{name}: {label}" if len(groups) > 1 else label
            series.append(Series(label, list(enumerate(norms)), number, style))
    chart = Chart(
        "gradients",
        "Gradient of each block at the start, relative to softmax",
        "layer",
        "ratio of norms",
        series,
    )
    return AnalysisSection(
        "Gradients at the start",
        "Norms of the gradients of each block in twins with new weights from one seed, relative to "
        "the twin with softmax attention: diff_v1, and diff_v1 without the factor "
        "1 − λ_init after its headwise norm.",
        table_of("gradients", ["run", "ratio", "first layer", "last layer", "mean"], rows),
        [Table("gradients_by_module", ["run", "twin", "layer", "module", "norm"], details)]
        if details
        else [],
        [chart] if series else [],
        problems_of(runs, GRADIENTS),
    )
