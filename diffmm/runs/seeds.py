"""Runs that differ only in their seeds: the mean and the spread of their metrics, and the paired
differences between two groups with the same seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy import stats

from diffmm.runs.summaries import Best, Summary, differing, metrics_of, short_settings, shown

SEED_NAMES = ("seed", "seed_everything")
"""Last parts of the names of settings that are seeds."""

PARTS: dict[str, Callable[[Best], float]] = {
    "best": lambda best: best.value,
    "last": lambda best: best.last,
}
"""The values of a metric that are summarized."""


@dataclass(frozen=True)
class Group:
    """Runs of equal settings with different seeds.

    Attributes:
        name: The settings in which the groups differ, such as `attention=softmax`.
        runs: The runs by their seeds.
    """

    name: str
    runs: dict[tuple[str, ...], Summary]


def is_seed(setting: str) -> bool:
    """Whether a setting is a seed, by its name."""
    return setting.rpartition(".")[2] in SEED_NAMES


def groups_of(runs: Sequence[Summary], most_settings: int) -> list[Group]:
    """Group runs by all settings except their seeds; empty if no group has several runs.

    Args:
        runs: The runs.
        most_settings: Maximum number of settings in the name of a group.
    """
    names = differing(runs)
    seeds = [name for name in names if is_seed(name)]
    others = [name for name in names if not is_seed(name)]
    short = short_settings(others)
    found: dict[tuple[str, ...], Group] = {}
    for run in runs:
        values = tuple(shown(run, name) for name in others)
        label = ", ".join(
            f"{name}={value}"
            for name, value in list(zip(short, values, strict=True))[:most_settings]
        )
        group = found.setdefault(values, Group(label or "all runs", {}))
        group.runs[tuple(shown(run, name) for name in seeds)] = run
    return list(found.values()) if any(len(group.runs) > 1 for group in found.values()) else []


def mean_rows(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table of each group's means and standard deviations."""
    metrics = _metrics(groups)
    rows = []
    for group in groups:
        row = [group.name, str(len(group.runs))]
        for metric in metrics:
            bests = [best for run in group.runs.values() if (best := run.best(metric))]
            row += [_spread([part(best) for best in bests], ".4g") for part in PARTS.values()]
        rows.append(row)
    return ["mean ± std of", "seeds", *_parts(metrics)], rows


def difference_rows(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table of the differences to the first group, seed by seed: their
    mean over the seeds that both groups have, at least two, and half of its 95 % interval."""
    metrics = _metrics(groups)
    base, *others = groups
    rows = []
    for group in others:
        shared = [seed for seed in base.runs if seed in group.runs]
        if len(shared) < 2:
            continue
        row = [group.name, str(len(shared))]
        for metric in metrics:
            pairs = [(group.runs[s].best(metric), base.runs[s].best(metric)) for s in shared]
            for part in PARTS.values():
                found = [part(ours) - part(theirs) for ours, theirs in pairs if ours and theirs]
                row.append(_interval(found))
        rows.append(row)
    return [f"minus {base.name} (± 95 %)", "pairs", *_parts(metrics)], rows


def half_width(differences: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of a mean by Student's t, `t * s / sqrt(n)`; `None` for
    fewer than two differences, or if one is not finite."""
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return None
    quantile = float(stats.t.ppf(0.975, len(differences) - 1))
    return quantile * stdev(differences) / math.sqrt(len(differences))


def _metrics(groups: Sequence[Group]) -> list[str]:
    return metrics_of([run for group in groups for run in group.runs.values()])


def _parts(metrics: Sequence[str]) -> list[str]:
    return [f"{metric} {part}" for metric in metrics for part in PARTS]


def _spread(values: Sequence[float], form: str) -> str:
    """The mean and the sample standard deviation as text."""
    if not values:
        return "-"
    text = format(mean(values), form)
    return f"{text} ± {stdev(values):.2g}" if len(values) > 1 else text


def _interval(differences: Sequence[float]) -> str:
    """The mean difference and half of its interval as text."""
    if not differences:
        return "-"
    text, half = format(mean(differences), "+.3g"), half_width(differences)
    return text if half is None else f"{text} ± {half:.2g}"
