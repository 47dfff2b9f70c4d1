"""Metrics per class, as a table and as plain data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffmm.checks import shown_name

MAX_MATRIX = 12
"""With more classes, only the worst ones are shown."""
NUM_SHOWN = 10
MAX_NAME = 24


@dataclass(frozen=True)
class ClassReport:
    """A metric per class, and the confusion matrix.

    Attributes:
        measure: The metric: `"accuracy"` (fraction of the samples of a class that are predicted
            correctly) or `"average precision"`.
        class_names: Names of the classes.
        counts: Number of samples per class.
        values: Value per class, in [0, 1]; NaN for a class without samples.
        confusion: Confusion matrix: `confusion[i][j]` samples of class `i` were predicted as class
            `j`; `None` for multi-label data.
    """

    measure: str
    class_names: Sequence[str]
    counts: Sequence[int]
    values: Sequence[float]
    confusion: Sequence[Sequence[int]] | None = None

    @classmethod
    def of_confusion(cls, matrix: Tensor, class_names: Sequence[str]) -> "ClassReport":
        """Create a report from a confusion matrix `[C, C]`, true by predicted classes."""
        confusion = matrix.tolist()
        counts = [sum(row) for row in confusion]
        values = [
            row[number] / count if count else math.nan
            for number, (row, count) in enumerate(zip(confusion, counts, strict=True))
        ]
        return cls("accuracy", class_names, counts, values, confusion)

    @classmethod
    def of_average_precision(cls, table: Tensor, class_names: Sequence[str]) -> "ClassReport":
        """Create a report from `[2, C]`: average precision and positive samples per class."""
        values, counts = table.tolist()
        return cls("average precision", class_names, list(map(int, counts)), values)

    def data(self) -> dict[str, Any]:
        """The report as JSON-compatible data: a list of classes, and the confusion matrix."""
        key = self.measure.replace(" ", "_")
        classes = [
            {"class": name, "samples": count, key: None if math.isnan(value) else value}
            for name, count, value in self._rows()
        ]
        found: dict[str, Any] = {"classes": classes}
        if self.confusion is not None:
            found["confusion_matrix"] = [list(row) for row in self.confusion]
        return found

    def table(self) -> list[list[Any]]:
        """The report as CSV rows: a header and one row per class, with the confusion matrix."""
        header = ["class", "samples", self.measure.replace(" ", "_")]
        if self.confusion is not None:
            header += [f"predicted {name}" for name in self.class_names]
        rows = []
        for number, (name, count, value) in enumerate(self._rows()):
            counts = self.confusion[number] if self.confusion is not None else ()
            rows.append([name, count, "" if math.isnan(value) else value, *counts])
        return [header, *rows]

    def text(self) -> str:
        """The report as text: all classes if there are few, otherwise the worst classes and the
        most frequent confusions."""
        if len(self.class_names) <= MAX_MATRIX:
            return "\n".join(self._whole())
        return "\n".join([*self._worst(), *self._confusions()])

    def _rows(self) -> list[tuple[str, int, float]]:
        return list(zip(self.class_names, self.counts, self.values, strict=True))

    def _whole(self) -> list[str]:
        names = [_short(name) for name in self.class_names]
        header, rows = ["class", "samples", self.measure], []
        if self.confusion is not None:
            header = ["true class \\ predicted", *names, "samples", self.measure]
        for number, (_, count, value) in enumerate(self._rows()):
            counts = self.confusion[number] if self.confusion is not None else ()
            rows.append([names[number], *map(str, counts), str(count), _number(value)])
        return _aligned([header, *rows])

    def _worst(self) -> list[str]:
        known = [row for row in self._rows() if not math.isnan(row[2])]
        worst = sorted(known, key=lambda row: row[2])[:NUM_SHOWN]
        rows = [[_short(name), str(count), _number(value)] for name, count, value in worst]
        title = f"lowest {self.measure} of {len(self.class_names)} classes"
        return [f"{title}:", *_aligned([["class", "samples", self.measure], *rows])]

    def _confusions(self) -> list[str]:
        if self.confusion is None:
            return []
        found = [
            (count, true, predicted)
            for true, row in enumerate(self.confusion)
            for predicted, count in enumerate(row)
            if count and true != predicted
        ]
        found.sort(key=lambda entry: (-entry[0], entry[1:]))
        rows = [
            [
                _short(self.class_names[true]),
                _short(self.class_names[predicted]),
                str(count),
                _number(count / self.counts[true]),
            ]
            for count, true, predicted in found[:NUM_SHOWN]
        ]
        header = ["true class", "taken for", "samples", "share of the class"]
        return ["", "most frequent confusions:", *_aligned([header, *rows])] if rows else []


def _short(name: str) -> str:
    name = shown_name(name)
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Align columns, the first one to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
