"""Which cells of the table are still to be run, as a function of those that exist.

For each task and variant:

1. *Tuning.* The grid of learning rates, with the tuning seeds. If the best rate is at an end of the
   grid, the grid is extended by a factor of 2, at most `MAX_EXTENSIONS` times.
2. *Equal tokens.* All seeds at the best rate.
3. *Equal time.* All seeds at the best rate, with as many steps as take the training time of the
   softmax model; the schedule has that length, too. A variant whose number of steps would differ by
   less than `SAME_TIME` uses its cells of equal tokens. The times
   of cells that shared the device with others are not used.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.quality.engine import Row
from benchmarks.quality.tasks import TASKS, Size
from benchmarks.quality.variants import SOFTMAX

MAX_EXTENSIONS = 3
SAME_TIME = 0.02
MOST_STEPS = 1.25
"""Largest number of steps of a cell of equal time, relative to one of equal tokens."""

Budget = Literal["tokens", "time"]


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        task, size, variant: What is trained.
        rate: Peak learning rate.
        seed: Seed of the model and of the data and their order.
        budget: Whether the number of steps is that of the task, or follows from the time.
        steps: Number of steps.
        compiled: Whether the model is compiled.
    """

    task: str
    size: Size
    variant: str
    rate: float
    seed: int
    budget: Budget
    steps: int
    compiled: bool

    def is_in(self, rows: Sequence[Row]) -> bool:
        """Whether the cell has been run. The steps of a cell of equal time are not compared, since
        they follow from measured times."""
        own = asdict(self)
        if self.budget == "time":
            del own["steps"]
        return any(all(row[name] == value for name, value in own.items()) for row in rows)


@dataclass(frozen=True)
class Settings:
    """What the table is made of.

    Attributes:
        seeds: Seeds of the results.
        tuning_seeds: Seeds with which rates are compared.
        rates: Grid of learning rates, if not the task's.
        size: Size of the models.
        compiled: Whether models are compiled.
        steps: Number of steps, if not the task's.
    """

    seeds: Sequence[int] = (0, 1, 2, 3)
    tuning_seeds: Sequence[int] = (0,)
    rates: Sequence[float] | None = None
    size: Size = "full"
    compiled: bool = False
    steps: int | None = None

    def num_steps(self, task: str) -> int:
        return self.steps or TASKS[task].steps[self.size]

    def grid(self, task: str) -> list[float]:
        return sorted(self.rates or TASKS[task].rates)

    def rows_of(self, rows: Sequence[Row], task: str, variant: str, budget: Budget) -> list[Row]:
        """The rows of these settings."""
        wanted: dict[str, Any] = {
            "task": task,
            "size": self.size,
            "variant": variant,
            "budget": budget,
            "compiled": self.compiled,
        }
        if budget == "tokens":
            wanted["steps"] = self.num_steps(task)
        return [row for row in rows if all(row[name] == value for name, value in wanted.items())]

    def cell(self, task: str, variant: str, rate: float, seed: int) -> Cell:
        """A cell of equal tokens."""
        steps = self.num_steps(task)
        return Cell(task, self.size, variant, rate, seed, "tokens", steps, self.compiled)


def value_of(row: Row) -> float:
    """The metric of a row, at the end or its mean over training; infinitely bad if training
    diverged."""
    spec = TASKS[row["task"]]
    value = float(row[spec.metric])
    if spec.over_training:
        value = statistics.fmean(point[spec.metric] for point in row["points"])
    return value if math.isfinite(value) else -spec.sign * math.inf


@dataclass(frozen=True)
class Tuned:
    """The state of tuning.

    Attributes:
        missing: Rates and seeds that are to be run first.
        best: The best rate, if none is missing.
        at_edge: Whether it is at an end of the rates that were tried.
    """

    missing: list[tuple[float, int]]
    best: float | None
    at_edge: bool


def tune(rows: Sequence[Row], settings: Settings, task: str, variant: str) -> Tuned:
    """Compare the rates that have been tried for a variant by their mean over the tuning seeds."""
    own = settings.rows_of(rows, task, variant, "tokens")
    tried = settings.grid(task)
    sign = TASKS[task].sign
    for extension in range(MAX_EXTENSIONS + 1):
        values = {
            rate: {row["seed"]: value_of(row) for row in own if row["rate"] == rate}
            for rate in tried
        }
        missing = [
            (rate, seed)
            for rate in tried
            for seed in settings.tuning_seeds
            if seed not in values[rate]
        ]
        if missing:
            return Tuned(missing, None, False)
        means = {
            rate: statistics.fmean(values[rate][seed] for seed in settings.tuning_seeds)
            for rate in tried
        }
        best = max(tried, key=lambda rate: sign * means[rate])
        at_edge = best in (tried[0], tried[-1])
        if not at_edge or extension == MAX_EXTENSIONS:
            return Tuned([], best, at_edge)
        tried = [best / 2, *tried] if best == tried[0] else [*tried, 2 * best]
    raise AssertionError


def results(
    rows: Sequence[Row], settings: Settings, task: str, variant: str, budget: Budget = "tokens"
) -> dict[int, Row]:
    """The rows of the best rate, by seed; none before the rate is tuned. For equal time, a variant
    that takes the time of softmax has the rows of equal tokens."""
    best = tune(rows, settings, task, variant).best
    if budget == "time" and steps_in_time(rows, settings, task, variant) == settings.num_steps(
        task
    ):
        budget = "tokens"
    own = settings.rows_of(rows, task, variant, budget)
    return {
        row["seed"]: row for row in own if row["rate"] == best and row["seed"] in settings.seeds
    }


def steps_in_time(rows: Sequence[Row], settings: Settings, task: str, variant: str) -> int | None:
    """Number of steps of a variant in the training time of softmax, from the median times of their
    steps; `None` before all seeds of both have been run, or if all of one shared the device."""
    pace = []
    for each in (SOFTMAX, variant):
        own = results(rows, settings, task, each)
        timed = [row["seconds_per_step"] for row in own.values() if row["timed"]]
        if set(own) != set(settings.seeds) or not timed:
            return None
        pace.append(statistics.median(timed))
    steps = settings.num_steps(task)
    if variant == SOFTMAX or not all(pace) or abs(pace[0] / pace[1] - 1) < SAME_TIME:
        return steps
    return max(1, round(steps * min(MOST_STEPS, pace[0] / pace[1])))


def pending(rows: Sequence[Row], settings: Settings, task: str, variant: str) -> list[Cell]:
    """The cells of a task and variant that can be run now; none if it is complete, or if equal time
    waits for the cells of softmax."""
    tuned = tune(rows, settings, task, variant)
    if tuned.best is None:
        return [settings.cell(task, variant, rate, seed) for rate, seed in tuned.missing]
    cells = [settings.cell(task, variant, tuned.best, seed) for seed in settings.seeds]
    missing = [cell for cell in cells if not cell.is_in(rows)]
    if missing:
        return missing
    steps = steps_in_time(rows, settings, task, variant)
    if steps is None or steps == settings.num_steps(task):
        return []
    cells = [
        Cell(task, settings.size, variant, tuned.best, seed, "time", steps, settings.compiled)
        for seed in settings.seeds
    ]
    return [cell for cell in cells if not cell.is_in(rows)]
