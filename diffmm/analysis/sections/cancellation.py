"""The section of what the second map cancels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffmm.analysis.cancellation import (
    LayerCancellation,
    shared_layers,
    specialization,
    variance_by_modality,
)
from diffmm.analysis.figures import Cell
from diffmm.analysis.measurements import MAPS
from diffmm.analysis.row_means import mean_over
from diffmm.analysis.sections.section import (
    AnalysisSection,
    Analyzed,
    chart_by_layer,
    problems_of,
    table_of,
)

HEAD = ["cancelled", "correlation", "variance by modality", "heads of a modality"]
WHOLE = "all"
"""What the layers of a model with a single part are called."""


def cancellation_section(runs: Sequence[Analyzed]) -> AnalysisSection:
    """What the second map cancels, by modality."""
    rows: list[list[Cell]] = []
    details: list[list[Cell]] = []
    by_layer: list[list[Cell]] = []
    lines: list[tuple[int, str, int, list[Tensor]]] = []
    for number, run in enumerate(runs):
        layers = run.measured.cancellation
        for style, (modality, own) in enumerate(by_modality(layers, run.measured.parts).items()):
            nan = [float("nan")] * 2
            rows.append([run.name, modality, *_means(own), *nan])
            label = modality if len(runs) == 1 else f"{run.name}: {modality}"
            means = [layer.cancelled.nanmean(dim=0) for layer in own]
            lines.append((number, label, style, means))
        shared = shared_layers(layers)
        if shared:
            every = [layer for parts in shared.values() for layer in parts]
            found = [_of_modality(parts) for parts in shared.values()]
            by_layer += [
                [run.name, name, float(variance.nanmean()), specialized]
                for name, (variance, specialized) in zip(shared, found, strict=True)
            ]
            variances = mean_over([variance for variance, _ in found])
            most = float(torch.tensor([specialized for _, specialized in found]).nanmean())
            label = f"{len(shared)} shared layer{'' if len(shared) == 1 else 's'}"
            rows.append([run.name, label, *_means(every), variances, most])
        for layer in layers:
            means = [values.nanmean(dim=0) for values in (layer.cancelled, layer.correlation)]
            details += [
                [run.name, layer.name, head, *(float(mean[head]) for mean in means)]
                for head in range(len(means[0]))
            ]
    tables = [
        table_of("cancellation_of_shared_layers", ["run", "layer", *HEAD[2:]], by_layer),
        table_of("cancellation_by_head", ["run", "layer", "head", *HEAD[:2]], details),
    ]
    chart = chart_by_layer(
        "cancellation", "Cancelled attention by layer", "share of the first map", lines
    )
    return AnalysisSection(
        "Cancellation",
        "The share of the first map's attention that λ times the second map takes away, and the "
        "correlation of the two maps. In layers that several modalities share: the share of the "
        "variance of what a head cancels that is between modalities, and how much heads have "
        "modalities of their own (0: all differ alike in every modality; 1: only so).",
        table_of("cancellation", ["run", "modality", *HEAD], rows),
        [table for table in tables if table is not None],
        [chart] if lines else [],
        problems_of(runs, MAPS),
    )


def by_modality(
    layers: Sequence[LayerCancellation], parts: Sequence[str]
) -> dict[str, list[LayerCancellation]]:
    """The layers by the part of the model that has run them; all together if it has no parts of
    these names."""
    found: dict[str, list[LayerCancellation]] = {}
    for layer in layers:
        part = layer.name.partition(".")[0]
        found.setdefault(part if part in parts else WHOLE, []).append(layer)
    return found


def _means(layers: Sequence[LayerCancellation]) -> list[float]:
    """The means of both measures over samples, heads and layers."""
    return [
        mean_over([getattr(layer, name).nanmean(dim=0) for layer in layers]) for name in HEAD[:2]
    ]


def _of_modality(parts: Sequence[LayerCancellation]) -> tuple[Tensor, float]:
    cancelled = [part.cancelled for part in parts]
    return variance_by_modality(cancelled), specialization(cancelled)
