"""The section of quantization."""

import math
from collections.abc import Iterable, Sequence

from diffmm.analysis.figures import Cell, Chart, HeatMap, Series
from diffmm.analysis.measurements import EFFECTS
from diffmm.analysis.row_means import mean_over
from diffmm.analysis.sections.section import AnalysisSection, Analyzed, Table, problems_of, table_of


def quantization_section(runs: Sequence[Analyzed]) -> AnalysisSection:
    """Effects of quantization."""
    effects_of_all = [effect for run in runs for effect in run.measured.effects]
    metrics = list(dict.fromkeys(m for effect in effects_of_all for m in effect.metrics))
    rows: list[list[Cell]] = []
    details: list[list[Cell]] = []
    figures: list[Chart | HeatMap] = []
    lines: dict[str, list[Series]] = {metric: [] for metric in metrics}
    errors: list[Series] = []
    for number, run in enumerate(runs):
        layers, effects = run.measured.map_errors, run.measured.effects
        bits = sorted({bits for layer in layers for bits in layer.errors})
        of_maps = {b: mean_over([layer.errors[b] for layer in layers]) for b in bits}
        for effect in effects:
            is_logits = effect.method == "attention logits" and effect.bits is not None
            rows.append(
                [
                    run.name,
                    effect.method,
                    "-" if effect.bits is None else effect.bits,
                    *(effect.metrics.get(metric, math.nan) for metric in metrics),
                    of_maps.get(effect.bits or 0, math.nan) if is_logits else "-",
                    "-" if effect.outlier_columns is None else effect.outlier_columns,
                ]
            )
        whole = next((e.metrics for e in effects if e.bits is None), {})
        for metric in metrics:
            methods = list(dict.fromkeys(e.method for e in effects if e.bits is not None))
            lines[metric] += [
                Series(
                    f"{run.name}: {method}" if len(runs) > 1 else method,
                    _points(
                        (e.bits, e.metrics.get(metric, math.nan) - whole.get(metric, math.nan))
                        for e in effects
                        if e.method == method and e.bits is not None
                    ),
                    number,
                    style,
                )
                for style, method in enumerate(methods)
            ]
        if of_maps:
            errors.append(Series(run.name, _points(of_maps.items()), number))
        details += [
            [run.name, layer.name, head, b, float(value)]
            for layer in layers
            for b, values in layer.errors.items()
            for head, value in enumerate(values)
        ]
    figures += [
        Chart(
            f"quantization_{m}",
            f"Change of the {m} by quantization",
            "bits",
            f"{m}, quantized - unquantized",
            series,
        )
        for m, series in lines.items()
    ]
    if errors:
        figures.append(
            Chart(
                "quantization_maps",
                "Change of the maps by quantized logits",
                "bits",
                "sum of changes / sum of weights",
                errors,
                log=True,
            )
        )
    return AnalysisSection(
        "Quantization",
        "Absmax quantization of the attention logits, of the linear layers, and of the linear "
        "layers but for columns with an outlier above 6, as LLM.int8() does (Dettmers et al. "
        "2022): the metrics of the model on the data. Change of maps: sum of the changes of a "
        "query's weights, divided by the sum of their sizes.",
        table_of(
            "quantization",
            ["run", "quantized", "bits", *metrics, "change of maps", "columns apart"],
            rows,
        ),
        [Table("quantization_of_maps", ["run", "layer", "head", "bits", "change"], details)]
        if details
        else [],
        figures,
        problems_of(runs, EFFECTS),
    )


def _points(pairs: Iterable[tuple[int | None, float]]) -> list[tuple[float, float]]:
    return sorted((float(x), y) for x, y in pairs if x is not None)
