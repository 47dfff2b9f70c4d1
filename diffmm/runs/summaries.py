"""Several runs side by side: the settings that differ, and what came of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from diffmm.recipes.catalog import header
from diffmm.recipes.references import UNKNOWN, resolve, walk
from diffmm.recipes.settings import load_file
from diffmm.runs.directories import CONFIG_NAME, saved_config
from diffmm.runs.metrics import Curve, read_curves

SMALLER_IS_BETTER = ("loss", "perplexity", "bits", "error")
"""In the names of metrics; of all others, larger values are better."""

SPEEDS = ("train/tokens_per_second", "train/samples_per_second")
"""What speed is logged as, the first one that there is."""

LEFT_OUT = ("init_args", "dict_kwargs")
"""Parts of a setting's place that a command line leaves out."""


class Best(NamedTuple):
    """The best and the last value of a metric."""

    value: float
    step: int
    last: float


@dataclass(frozen=True)
class Summary:
    """A run.

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
        """Tokens or samples per second, and the median of it, without the first value."""
        for name in SPEEDS:
            if curve := self.curves.get(name):
                return name.removeprefix("train/"), median(v for _, v in curve[1:] or curve)
        return None

    @property
    def steps(self) -> int:
        """How many steps it has logged."""
        return max((curve[-1][0] for curve in self.curves.values()), default=0)

    def best(self, metric: str) -> Best | None:
        """The best value of a metric, the first where there are equals."""
        curve = self.curves.get(metric)
        if not curve:
            return None
        better = min if is_smaller_better(metric, self.values) else max
        step, value = better(curve, key=lambda point: point[1])
        return Best(value, step, curve[-1][1])


def is_smaller_better(metric: str, values: dict[str, Any]) -> bool:
    """As the recipe's checkpoints say of the metric that they monitor; of others by their names."""
    trainer = values.get("trainer")
    for callback in (trainer.get("callbacks") if isinstance(trainer, dict) else None) or []:
        arguments = callback.get("init_args") if isinstance(callback, dict) else None
        if isinstance(arguments, dict) and arguments.get("monitor") == metric:
            return arguments.get("mode", "min") == "min"
    return any(word in metric for word in SMALLER_IS_BETTER)


def find_runs(paths: Sequence[str]) -> list[Path]:
    """Run directories, each once; a folder of runs stands for all in it.

    Raises:
        InputError: for what is neither.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if (path / CONFIG_NAME).is_file():
            found[path] = None
            continue
        inside = sorted(config.parent for config in path.glob(f"*/{CONFIG_NAME}"))
        if not inside:
            saved_config(path)
        found.update(dict.fromkeys(inside))
    return list(found)


def summarize(paths: Sequence[Path]) -> list[Summary]:
    """Read runs.

    Raises:
        InputError: for a config or a log that cannot be read.
    """
    names = short_names([str(path) for path in paths])
    return [_summary(path, name) for path, name in zip(paths, names, strict=True)]


def _summary(path: Path, name: str) -> Summary:
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
    """The leaves of a recipe by their names on a command line."""
    return {
        ".".join(str(part) for part in place if part not in LEFT_OUT): value
        for place, value in walk(values)
        if place[0] != "run_dir" and not (isinstance(value, dict | list) and value)
    }


def differing(runs: Sequence[Summary]) -> list[str]:
    """The settings that are not the same in all runs, in the order of the recipes.

    Where only a variable differs, what refers to it is not named again.
    """
    names = dict.fromkeys(name for run in runs for name in run.settings)

    def differs(name: str) -> bool:
        written = [repr(run.settings.get(name, UNKNOWN)) for run in runs]
        means = [repr(run.resolved.get(name, UNKNOWN)) for run in runs]
        return len(set(written)) > 1 and len(set(means)) > 1

    return [name for name in names if differs(name)]


def shown(run: Summary, setting: str) -> str:
    """A setting of a run in writing; a secret from the environment stays its name."""
    if setting not in run.settings:
        return "-"
    written = run.settings[setting]
    is_secret = isinstance(written, str) and "${oc." in written
    value = written if is_secret else run.resolved.get(setting, written)
    return "null" if value is None else str(value).lower() if value in (True, False) else str(value)


def metrics_of(runs: Sequence[Summary]) -> list[str]:
    """The validation metrics of any run."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    return sorted(name for name in names if name.startswith("val/"))


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the folders that all of them are in."""
    if len(names) == 1:
        return list(names)
    parts = [name.split("/") for name in names]
    common = 0
    while all(len(p) > common + 1 for p in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    return ["/".join(p[common:]) for p in parts]


def short_settings(settings: Sequence[str]) -> list[str]:
    """The last parts of settings' names, as many as tell them apart."""
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
    """What the recipe of a run says of itself, or nothing."""
    text = header(saved_config(run.path).read_text(encoding="utf-8"))
    return text.partition("\n")[0].removeprefix("#").strip()
