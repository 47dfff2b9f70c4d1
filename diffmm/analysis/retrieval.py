"""Accuracy of retrieval over a grid, as a table and as a heat map."""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffmm.batch import TextBatch, answer_counts
from diffmm.models.modes import evaluating
from diffmm.models.text import TextModel
from diffmm.ops import AttentionMask

Batches = Callable[[float, int], Iterable[TextBatch]]
"""The batches of a cell of the grid: a function of the value of the axis and of the length."""


@dataclass(frozen=True)
class RetrievalGrid:
    """Counts of answers for each value of a setting and each length.

    Attributes:
        axis: Name of the setting, such as `"depth"`.
        values: Values of the setting.
        lengths: Lengths of the sequences, in tokens.
        num_exact: Number of exact answers, `[len(values), len(lengths)]`.
        num_answers: Number of answers, of the same shape.
    """

    axis: str
    values: Sequence[float]
    lengths: Sequence[int]
    num_exact: NDArray[np.int64]
    num_answers: NDArray[np.int64]

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Fraction of exact answers, `[len(values), len(lengths)]`."""
        return self.num_exact / self.num_answers

    def write_csv(self, path: Path) -> None:
        """Write one line per cell: the setting, the length, the counts and the accuracy."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([self.axis, "length", "num_exact", "num_answers", "accuracy"])
            for row, value in enumerate(self.values):
                for column, length in enumerate(self.lengths):
                    cell = row, column
                    counts = int(self.num_exact[cell]), int(self.num_answers[cell])
                    writer.writerow([value, length, *counts, round(self.accuracy[cell], 6)])

    def draw(self, path: Path, title: str = "") -> None:
        """Draw a heat map of the accuracy, from 0 to 1, in the format of the path's extension."""
        from matplotlib.figure import Figure

        size = 2.2 + 0.7 * len(self.lengths), 1.6 + 0.5 * len(self.values)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(self.accuracy, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(self.lengths)), [str(length) for length in self.lengths])
        axes.set_yticks(range(len(self.values)), [f"{value:g}" for value in self.values])
        axes.set_xlabel("length (tokens)")
        axes.set_ylabel(self.axis.replace("_", " "))
        axes.set_title(title)
        for (row, column), value in np.ndenumerate(self.accuracy):
            color = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
        figure.colorbar(image, ax=axes, label="accuracy")
        figure.savefig(path, dpi=150)


@torch.no_grad()
def measure_retrieval(
    model: TextModel,
    batches: Batches,
    *,
    axis: str,
    values: Sequence[float],
    lengths: Sequence[int],
) -> RetrievalGrid:
    """Measure the accuracy of a model's answers over a grid.

    An answer is exact if all of its tokens have the highest logits, given the answer's previous
    tokens (see `diffmm.batch.answer_counts`).

    Args:
        model: Causal text model; batches are moved to its device.
        batches: A function of a value and a length that returns the batches of this cell.
        axis: Name of the setting that has these values.
        values: Values of the setting.
        lengths: Lengths of the sequences in tokens, at most the model's `max_length`.

    Raises:
        ValueError: If the model is not causal, the grid is empty, a length exceeds `max_length`, or
            a cell has no answers.
    """
    if not isinstance(model, TextModel) or not model.config.causal:
        raise ValueError(f"retrieval needs a causal text model, got {type(model).__name__}")
    if not values or not lengths:
        raise ValueError(f"a grid needs values and lengths, got {values} and {lengths}")
    if max(lengths) > model.config.max_length:
        raise ValueError(
            f"length {max(lengths)} exceeds the model's max_length={model.config.max_length}: "
            f"choose shorter lengths, or train with a larger max_length"
        )
    device = next(model.parameters()).device
    counts = np.zeros((2, len(values), len(lengths)), np.int64)
    with evaluating(model):
        for row, value in enumerate(values):
            for column, length in enumerate(lengths):
                for batch in batches(value, length):
                    mask = AttentionMask(causal=True)
                    logits = model(batch["tokens"].to(device), mask=mask)
                    each = answer_counts(logits.argmax(dim=-1), batch["targets"].to(device))
                    counts[:, row, column] += [int(count.sum()) for count in each]
                if not counts[1, row, column]:
                    raise ValueError(f"{axis}={value:g} and length {length} have no answers")
    return RetrievalGrid(axis, values, lengths, counts[0], counts[1])
