"""The curves of a run, read from the CSV files that it has logged."""

import csv
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from diffmm.recipes.errors import InputError
from diffmm.runs.directories import CONFIG_NAME

LOG_NAME = "metrics.csv"
"""File name of the logs of Lightning's `CSVLogger`."""

Curve = list[tuple[int, float]]
"""Pairs `(completed steps, value)`, in ascending order of steps."""


def read_curves(run: Path) -> dict[str, Curve]:
    """Return the curve of every metric that a run has logged, by name.

    A resumed run has one CSV file per start. They are joined to one curve: if a later start has
    repeated steps, its values replace the earlier ones. Runs in folders inside this one are not
    read: `runs/x/base` has its own curves beside `runs/x/base/lr3`.

    Raises:
        InputError: If a file is not a CSV file in UTF-8; the message names it.
    """
    curves: dict[str, dict[int, float]] = {}
    for file in sorted(_own_files(run), key=_order):
        rows = list(_rows(file))
        first = min((step for step, _ in rows), default=0)
        for values in curves.values():
            for step in [step for step in values if step > first]:
                del values[step]
        for step, numbers in rows:
            for name, value in numbers.items():
                # Lightning counts from 0: the row of step 9 is logged after ten steps.
                curves.setdefault(name, {})[step + 1] = value
    return {name: sorted(values.items()) for name, values in curves.items() if values}


def _own_files(run: Path) -> Iterator[Path]:
    """The CSV files of a run, without those of runs in folders inside its own."""
    for folder, inside, files in os.walk(run):
        inside[:] = [name for name in inside if not Path(folder, name, CONFIG_NAME).is_file()]
        if LOG_NAME in files:
            yield Path(folder, LOG_NAME)


def _rows(file: Path) -> Iterable[tuple[int, dict[str, float]]]:
    """The step and the numbers of each row; an incomplete last line is skipped."""
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
        raise InputError(f"{file} is not a CSV file in UTF-8: {error}") from error


def number(text: str | None) -> float | None:
    """Parse a finite number; `None` for any other text."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _order(file: Path) -> list[tuple[int, str]]:
    """A sort key by which `version_10` comes after `version_9`."""
    parts = re.split(r"(\d+)", str(file))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
