"""Summaries of several runs: the settings that differ, and their metrics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from diffmm.recipes.catalog import header
from diffmm.recipes.importing import importing
from diffmm.recipes.references import UNKNOWN, resolve, walk
from diffmm.recipes.settings import load_file
from diffmm.runs.directories import CONFIG_NAME, saved_config
from diffmm.runs.metrics import Curve, read_curves
from diffmm.runs.records import read_record

SMALLER_IS_BETTER = ("loss", "perplexity", "bits", "error")
"""Parts of the names of metrics for which smaller values are better; for others, larger ones."""

SPEEDS = ("train/tokens_per_second", "train/samples_per_second")
"""Metrics of training speed; the first one that was logged is used."""

LEFT_OUT = ("init_args", "dict_kwargs")
"""Parts of a setting's path that are omitted on the command line."""


class Best(NamedTuple):
    """The best and the last value of a metric."""

    value: float
    step: int
    last: float
    last_step: int


@dataclass(frozen=True)
class Summary:
    """The settings and metrics of a run.

    Attributes:
        path: Directory of the run.
        name: Short name that distinguishes it from the other runs.
        values: Values of its recipe, unresolved.
        settings: Settings of its recipe, by dotted names, as written.
        resolved: Settings of its recipe, with references resolved.
        curves: Curves of all logged metrics.
        num_parameters: Number of parameters of its model; None if unknown.
    """

    path: Path
    name: str
    values: dict[str, Any]
    settings: dict[str, Any]
    resolved: dict[str, Any]
    curves: dict[str, Curve]
    num_parameters: int | None

    @property
    def speed(self) -> tuple[str, float] | None:
        """The name of the speed metric, and its median without the first value."""
        for name in SPEEDS:
            if curve := self.curves.get(name):
                return name.removeprefix("train/"), median(v for _, v in curve[1:] or curve)
        return None

    @property
    def steps(self) -> int:
        """Last logged step, counted from 1."""
        return max((curve[-1][0] for curve in self.curves.values()), default=0)

    def best(self, metric: str) -> Best | None:
        """The best value of a metric; the first one if several are equal."""
        curve = self.curves.get(metric)
        if not curve:
            return None
        better = min if is_smaller_better(metric, self.values) else max
        step, value = better(curve, key=lambda point: point[1])
        return Best(value, step, curve[-1][1], curve[-1][0])


def is_smaller_better(metric: str, values: dict[str, Any]) -> bool:
    """Whether smaller values of a metric are better.

    For the metric that the recipe's checkpoints monitor, this is their `mode`; for all others, the
    name decides (`SMALLER_IS_BETTER`).
    """
    trainer = values.get("trainer")
    for callback in (trainer.get("callbacks") if isinstance(trainer, dict) else None) or []:
        arguments = callback.get("init_args") if isinstance(callback, dict) else None
        if isinstance(arguments, dict) and arguments.get("monitor") == metric:
            return arguments.get("mode", "min") == "min"
    return any(word in metric for word in SMALLER_IS_BETTER)


def find_runs(paths: Sequence[str]) -> list[Path]:
    """Return run directories without duplicates; a folder of runs stands for all runs in it: those
    of a sweep in its order, others by name.

    Raises:
        InputError: If a path is neither.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if (path / CONFIG_NAME).is_file():
            found[path] = None
            continue
        inside = sorted(config.parent for config in path.glob(f"*/{CONFIG_NAME}"))
        if not inside:
            saved_config(path)
        in_order = list(read_record(path))
        inside.sort(key=lambda run: in_order.index(run.name) if run.name in in_order else math.inf)
        found.update(dict.fromkeys(inside))
    return list(found)


def summarize(paths: Sequence[Path]) -> list[Summary]:
    """Read runs.

    Raises:
        InputError: If a config or a log cannot be read.
    """
    names = short_names([str(path) for path in paths])
    return [_summary(path, name) for path, name in zip(paths, names, strict=True)]


def _summary(path: Path, name: str) -> Summary:
    with importing():
        from diffmm.recipes.mistakes import find_mistakes

    values = load_file(saved_config(path))
    resolved = resolve({**values, "run_dir": str(path)})[0]
    # Untrusted code of a run is not imported, in which case its size stays unknown.
    task: Any = find_mistakes({**values, "run_dir": str(path)}, trust=False).model
    model = getattr(task, "model", None)
    return Summary(
        path,
        name,
        values,
        settings_of(values),
        settings_of(resolved),
        read_curves(path),
        None if model is None else sum(p.numel() for p in model.parameters()),
    )


def settings_of(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe by their names on the command line."""
    return {
        ".".join(str(part) for part in place if part not in LEFT_OUT): value
        for place, value in walk(values)
        if place[0] != "run_dir" and not (isinstance(value, dict | list) and value)
    }


def differing(runs: Sequence[Summary]) -> list[str]:
    """The settings that differ between runs, in the order of the recipes.

    If only a variable differs, the settings that refer to it are not listed.
    """
    names = dict.fromkeys(name for run in runs for name in run.settings)

    def differs(name: str) -> bool:
        written = [repr(run.settings.get(name, UNKNOWN)) for run in runs]
        means = [repr(run.resolved.get(name, UNKNOWN)) for run in runs]
        return len(set(written)) > 1 and len(set(means)) > 1

    return [name for name in names if differs(name)]


def shown(run: Summary, setting: str) -> str:
    """A setting of a run as text; a secret from the environment is shown as its reference."""
    if setting not in run.settings:
        return "-"
    written = run.settings[setting]
    is_secret = isinstance(written, str) and "${oc." in written
    value = written if is_secret else run.resolved.get(setting, written)
    return "null" if value is None else str(value).lower() if value in (True, False) else str(value)


def metrics_of(runs: Sequence[Summary]) -> list[str]:
    """The names of all validation metrics of the runs."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    return sorted(name for name in names if name.startswith("val/"))


def short_names(names: Sequence[str]) -> list[str]:
    """Names without their common parent folders."""
    if len(names) == 1:
        return list(names)
    parts = [name.split("/") for name in names]
    common = 0
    while all(len(p) > common + 1 for p in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    return ["/".join(p[common:]) for p in parts]


def short_settings(settings: Sequence[str]) -> list[str]:
    """The shortest unique endings of the names of settings."""
    parts = [setting.split(".") for setting in settings]
    return [
        next(
            (
                ".".join(own[-length:])
                for length in range(1, len(own))
                if sum(other[-length:] == own[-length:] for other in parts) == 1
            ),
            ".".join(own),
        )
        for own in parts
    ]


def description_of(run: Summary) -> str:
    """The description in the header of a run's recipe; may be empty."""
    text = header(saved_config(run.path).read_text(encoding="utf-8"))
    return text.partition("\n")[0].removeprefix("#").strip()
