"""The sections of an analysis: its tables and figures, from the measurements of several runs."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffmm.analysis.concentration import MEASURES, TOP_K
from diffmm.analysis.figures import Cell, Chart, HeatMap, Series
from diffmm.analysis.initial_gradients import (
    SOFTMAX,
    UNSCALED,
    V1,
    LayerGradients,
    ratios,
)
from diffmm.analysis.magnitudes import Magnitudes
from diffmm.analysis.measurements import EFFECTS, GRADIENTS, MAPS, SCORES, Measurements
from diffmm.analysis.row_means import mean_over

TOPS = (1, 2, 3, 10, 100)
"""Ranks of the largest magnitudes in the table, as in the paper's table 5."""

MEASURE_LABELS = {
    "entropy": "entropy (nats)",
    "top_share": f"share of the top {TOP_K}",
    "hoyer": "Hoyer sparsity",
    "negative_share": "share of negative weight",
    "first_share": "share of the first token",
}


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


def sections_of(runs: Sequence[Analyzed]) -> list[AnalysisSection]:
    """The sections of an analysis of some runs."""
    makers = (
        score_section,
        concentration_section,
        lambda_section,
        outlier_section,
        quantization_section,
        gradient_section,
    )
    return [make(runs) for make in makers]


def score_section(runs: Sequence[Analyzed]) -> AnalysisSection:
    """Attention scores."""
    scored = [(run, run.measured.scores) for run in runs if run.measured.scores is not None]
    rows: list[list[Cell]] = []
    details: list[list[Cell]] = []
    problems = _problems(runs, SCORES)
    heat_maps: list[HeatMap] = []
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
                )
            )
    names = ("share to answer", "share to noise", "queries left out", "lambda above 1")
    figures: list[Chart | HeatMap] = [
        _by_layer(
            "scores_answer",
            "Share to the answer",
            "share",
            [(runs.index(run), run.name, 0, [s.answer for s in x.layers]) for run, x in scored],
        ),
        _by_layer(
            "scores_noise",
            "Share to the noise",
            "share",
            [(runs.index(run), run.name, 0, [s.noise for s in x.layers]) for run, x in scored],
        ),
        *heat_maps,
    ]
    return AnalysisSection(
        "Attention scores",
        "Share of the attention to the tokens that hold the answer and to the noise around them, "
        "divided by 1 − λ, so that all shares of a query sum to 1; means over queries, heads and "
        "layers (Ye et al. 2025, table 3). Queries with |1 − λ| below 0.05 are left out.",
        _table(
            "scores",
            ["run", names[0], names[1], "signal to noise", *names[2:]],
            rows,
        ),
        [Table("scores_by_head", ["run", "layer", "head", *names], details)] if details else [],
        figures if scored else [],
        problems,
    )


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
        _table("concentration", ["run", "map", *head], rows),
        [Table("concentration_by_head", ["run", "layer", "map", "head", *head], details)]
        if details
        else [],
        [
            _by_layer(
                f"concentration_{measure}",
                _capitalized(MEASURE_LABELS[measure]),
                MEASURE_LABELS[measure],
                lines[measure],
            )
            for measure in MEASURES
            if lines[measure]
        ],
        _problems(runs, MAPS),
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
        figures.insert(0, _by_layer("lambda", "λ by layer", "mean λ", lines))
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
        _table("lambda", ["run", "layer", "mean", "min", "max", "share above 1"], rows),
        [Table("lambda_over_training", ["run", "layer", "step", "lambda"], curves)]
        if curves
        else [],
        figures,
        problems + _problems(runs, MAPS),
    )


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
        _table("outliers", ["run", "activation", *head], rows),
        [Table("outliers_by_layer", ["run", "activation", "layer", *head], details)]
        if details
        else [],
        [
            _by_layer(
                f"outliers_{what.replace(' ', '_')}",
                _capitalized(_titled(what)),
                "magnitude" if what.startswith("largest") else "kurtosis",
                each,
                log=True,
            )
            for what, each in lines.items()
        ],
        _problems(runs, MAPS),
    )


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
        for metric in metrics:
            methods = list(dict.fromkeys(e.method for e in effects if e.bits is not None))
            lines[metric] += [
                Series(
                    f"{run.name}: {method}" if len(runs) > 1 else method,
                    _points(
                        (e.bits, e.metrics.get(metric, math.nan))
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
        Chart(f"quantization_{m}", f"{m.capitalize()} after quantization", "bits", m, series)
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
        _table(
            "quantization",
            ["run", "quantized", "bits", *metrics, "change of maps", "columns apart"],
            rows,
        ),
        [Table("quantization_of_maps", ["run", "layer", "head", "bits", "change"], details)]
        if details
        else [],
        figures,
        _problems(runs, EFFECTS),
    )


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
        name = ", ".join(names)
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
        _table("gradients", ["run", "ratio", "first layer", "last layer", "mean"], rows),
        [Table("gradients_by_module", ["run", "twin", "layer", "module", "norm"], details)]
        if details
        else [],
        [chart] if series else [],
        _problems(runs, GRADIENTS),
    )


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


def _by_layer(
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


def _points(pairs: Iterable[tuple[int | None, float]]) -> list[tuple[float, float]]:
    return sorted((float(x), y) for x, y in pairs if x is not None)


def _ranks(top: Tensor) -> list[float]:
    return [float(top[rank - 1]) if rank <= len(top) else math.nan for rank in TOPS]


def _table(name: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table | None:
    return Table(name, head, rows) if rows else None


def _problems(runs: Sequence[Analyzed], name: str) -> list[str]:
    """What could not be measured, one line per reason, with the runs that have it."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if name in run.measured.problems:
            found.setdefault(run.measured.problems[name], []).append(run.name)
    return [f"{', '.join(names)}: {reason}" for reason, names in found.items()]


def _titled(what: str) -> str:
    kind, _, name = what.partition(" ")
    return f"{kind} magnitude of {name}" if kind == "largest" else f"{kind} of {name}"


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _text(cell: Cell) -> str:
    if isinstance(cell, float):
        return "-" if math.isnan(cell) else f"{cell:.4g}"
    return str(cell)
