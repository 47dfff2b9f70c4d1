"""The curves of a run, from the CSV files that it has logged to."""

import csv
import math
import re
from collections.abc import Iterable
from pathlib import Path

from diffmm.recipes.errors import InputError

Curve = list[tuple[int, float]]
"""`(steps made, value)`, in ascending order of steps."""


def read_curves(run: Path) -> dict[str, Curve]:
    """Every metric that a run has logged, by name, each step once.

    A run that was resumed has a CSV file for each of its starts. They are one curve: where a later
    start has made steps again, its values are the ones.

    Raises:
        InputError: for a file that is no CSV file in UTF-8, naming it.
    """
    curves: dict[str, dict[int, float]] = {}
    for file in sorted(run.rglob("metrics.csv"), key=_order):
        rows = list(_rows(file))
        first = min((step for step, _ in rows), default=0)
        for values in curves.values():
            for step in [step for step in values if step > first]:
                del values[step]
        for step, numbers in rows:
            for name, value in numbers.items():
                # Lightning counts from 0: the row of step 9 is of ten steps.
                curves.setdefault(name, {})[step + 1] = value
    return {name: sorted(values.items()) for name, values in curves.items() if values}


def _rows(file: Path) -> Iterable[tuple[int, dict[str, float]]]:
    """The step and the numbers of each row; a last line that is cut off is passed over."""
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            for row in csv.DictReader(opened):
                step = row.pop("step", None) or ""
                row.pop("epoch", None)
                row.pop(None, None)
                if step.isdigit():
                    numbers = {name: number(text) for name, text in row.items()}
                    yield int(step), {n: v for n, v in numbers.items() if v is not None}
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no CSV file in UTF-8: {error}") from error


def number(text: str | None) -> float | None:
    """A finite number in writing, or `None`."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _order(file: Path) -> list[tuple[int, str]]:
    """`version_10` comes after `version_9`."""
    parts = re.split(r"(\d+)", str(file))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
