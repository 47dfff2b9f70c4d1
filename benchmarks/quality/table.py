"""The table: paired differences to softmax with intervals, as text, CSV and a picture."""

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.quality.engine import Row
from benchmarks.quality.plan import Budget, Settings, results, tune, value_of
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.variants import ALL, SOFTMAX
from diffmm.runs.seeds import half_width

BUDGETS: tuple[Budget, ...] = ("tokens", "time")


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        task, variant, budget: What was trained.
        rate: The best learning rate.
        at_edge: Whether it is at an end of the rates that were tried.
        values: What is compared, for each seed; accuracy in percent.
        differences: Those of the seeds that softmax has, too, minus those of softmax.
        parameters: Number of parameters.
        steps: Number of steps.
        seconds: Median training time, of the runs that had the device to themselves if there are
            any.
        parts: Means over seeds of the metrics of the modalities alone, if any, in percent.
    """

    task: str
    variant: str
    budget: Budget
    rate: float
    at_edge: bool
    values: dict[int, float]
    differences: dict[int, float]
    parameters: int
    steps: int
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def mean_difference(self) -> float | None:
        """Mean paired difference; `None` for softmax and without common seeds."""
        if self.variant == SOFTMAX or not self.differences:
            return None
        return statistics.fmean(self.differences.values())

    @property
    def half_width(self) -> float | None:
        """Half the width of the 95 % interval of the mean difference, by Student's t; `None` for
        fewer than two seeds."""
        return half_width(list(self.differences.values())) if self.variant != SOFTMAX else None

    @property
    def verdict(self) -> str:
        """Whether the interval excludes 0, and on which side."""
        mean, half = self.mean_difference, self.half_width
        if mean is None or half is None or not math.isfinite(mean):
            return ""
        if abs(mean) <= half:
            return "no clear difference"
        return "better" if TASKS[self.task].sign * mean > 0 else "worse"


def lines(rows: Sequence[Row], settings: Settings) -> list[Line]:
    """The lines of all tasks and variants that have results, in the order of their definition."""
    found = []
    for task, spec in TASKS.items():
        unit = spec.unit
        for budget in BUDGETS:
            softmax = results(rows, settings, task, SOFTMAX)
            for variant in ALL:
                own = results(rows, settings, task, variant, budget)
                tuned = tune(rows, settings, task, variant)
                if not own or tuned.best is None or (budget == "time" and variant == SOFTMAX):
                    continue
                values = {seed: unit * value_of(row) for seed, row in sorted(own.items())}
                differences = {
                    seed: value - unit * value_of(softmax[seed])
                    for seed, value in values.items()
                    if seed in softmax
                }
                some = next(iter(own.values()))
                timed = [row for row in own.values() if row["timed"]] or list(own.values())
                seconds = statistics.median(row["seconds_per_step"] * row["steps"] for row in timed)
                parts = {
                    name: statistics.fmean(unit * row[name] for row in own.values())
                    for name in spec.parts
                }
                line = Line(
                    task,
                    variant,
                    budget,
                    tuned.best,
                    tuned.at_edge,
                    values,
                    differences,
                    some["parameters"],
                    some["steps"],
                    seconds,
                    parts,
                )
                found.append(line)
    return found


def markdown(found: Sequence[Line], notes: Sequence[str] = ()) -> str:
    """A table in Markdown per task and budget, and what it means."""
    text = [
        "# Attention variants at equal parameters",
        "",
        "Differences are means over seeds of the variant minus softmax with the same seed, with a "
        "95 % interval (Student's t). Every variant has the best learning rate of the same grid. "
        "Loss is in nats per token (lower is better); accuracy and recall are in percent (higher "
        "is better). At equal time, the number of steps is that which takes the training time of "
        "softmax.",
        *(f"\n{note}" for note in notes),
    ]
    for task in dict.fromkeys(line.task for line in found):
        spec = TASKS[task]
        for budget in BUDGETS:
            own = [line for line in found if (line.task, line.budget) == (task, budget)]
            if not own:
                continue
            if budget == "time":  # at which softmax has the same line
                own = [x for x in found if (x.task, x.variant) == (task, SOFTMAX)] + own
            text += [
                "",
                f"## {task}: {spec.title} at equal {budget}",
                "",
                "| variant | rate | mean | seeds | difference | verdict | parameters | steps "
                f"| seconds |{''.join(f' {name} |' for name in spec.parts)}",
                "|---|---|---|---|---|---|---|---|---|" + "---|" * len(spec.parts),
                *(_row(line, spec.num_shown) for line in own),
            ]
    if any(line.at_edge for line in found):
        text += ["", "\\* The best rate is at an end of all rates that were tried."]
    return "\n".join(text) + "\n"


def _row(line: Line, digits: int) -> str:
    seeds = " ".join(f"{value:.{digits}f}" for value in line.values.values())
    cells = [
        line.variant,
        f"{line.rate:g}{'*' if line.at_edge else ''}",
        f"{line.mean:.{digits}f}",
        seeds,
        _difference(line, digits),
        line.verdict,
        f"{line.parameters:,}",
        f"{line.steps:,}",
        f"{line.seconds:.1f}",
        *(f"{value:.{digits}f}" for value in line.parts.values()),
    ]
    return f"| {' | '.join(cells)} |"


def _difference(line: Line, digits: int) -> str:
    if line.mean_difference is None:
        return ""
    half = "" if line.half_width is None else f" ± {line.half_width:.{digits}f}"
    return f"{line.mean_difference:+.{digits}f}{half}"


def write_csv(found: Sequence[Line], path: Path) -> None:
    """Write one line per seed."""
    names = ("task", "metric", "budget", "variant", "rate", "at_edge", "seed", "value")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "difference", "parameters", "steps", "seconds"])
        for line in found:
            for seed, value in line.values.items():
                shown = round(value, 6)
                gap = "" if seed not in line.differences else round(line.differences[seed], 6)
                first = (line.task, TASKS[line.task].title, line.budget, line.variant)
                last = (line.parameters, line.steps, round(line.seconds, 3))
                writer.writerow([*first, line.rate, line.at_edge, seed, shown, gap, *last])


def draw(found: Sequence[Line], path: Path) -> None:
    """Draw the differences to softmax with their intervals, one panel per task; better is right.
    Those of a single seed have no interval and are not drawn.

    Raises:
        SystemExit: If there is no difference to draw.
    """
    from matplotlib.figure import Figure

    shown = [line for line in found if line.half_width is not None]
    tasks = list(dict.fromkeys(line.task for line in shown))
    if not tasks:
        raise SystemExit("nothing to draw: run two seeds of softmax and of another variant")
    columns = min(3, len(tasks))
    num_rows = -(-len(tasks) // columns)
    height = 1.2 + 0.28 * len({line.variant for line in shown})
    figure = Figure(figsize=(4.6 * columns, height * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for panel, task in zip(panels, tasks, strict=False):
        sign = TASKS[task].sign
        variants = [
            name for name in ALL if any((li.task, li.variant) == (task, name) for li in shown)
        ]
        for budget, shift, color in (("tokens", -0.15, "C0"), ("time", 0.15, "C1")):
            own = [line for line in shown if (line.task, line.budget) == (task, budget)]
            panel.errorbar(
                [sign * (line.mean_difference or 0.0) for line in own],
                [variants.index(line.variant) + shift for line in own],
                xerr=[line.half_width or 0.0 for line in own],
                fmt="o",
                markersize=4,
                capsize=2,
                color=color,
                label=f"equal {budget}",
            )
            for line in own:
                place = variants.index(line.variant) + shift
                gaps = [sign * gap for gap in line.differences.values()]
                panel.scatter(gaps, [place] * len(gaps), s=6, color=color, alpha=0.4)
        panel.axvline(0, color="gray", linewidth=1)
        panel.set_yticks(range(len(variants)), variants)
        panel.invert_yaxis()
        unit = "nats" if TASKS[task].metric == "loss" else "percentage points"
        panel.set_xlabel(f"better than softmax by ({unit})")
        panel.set_title(task)
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
