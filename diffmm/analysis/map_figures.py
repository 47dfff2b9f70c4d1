"""Attention maps of samples as figures with their numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diffmm.analysis.exhibits import Array, Exhibit, SoundExhibit, TextExhibit
from diffmm.analysis.figures import Cell, Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST = 22
"""Maximum number of characters of a run's name in a title."""

FILE_NAMES = {"A": "a", "A₁": "a1", "A₂": "a2", "A₁ − λA₂": "difference"}


@dataclass(frozen=True)
class MapFigure(Figure):
    """One attention map, averaged over heads.

    Attributes:
        weights: `[rows, columns]`.
        names: Names of the rows and of the columns, such as the tokens of a text; None for numbers.
        limit: The size of weights that have the strongest color, the same for all maps of a model
            and sample.
        is_upward: Whether the first row is at the bottom.
    """

    weights: Array
    names: Sequence[str] | None
    limit: float
    is_upward: bool = False

    def table(self) -> list[list[Cell]]:
        """The weights as CSV rows, with a header."""
        rows, columns = ([*map(str, range(n))] for n in self.weights.shape)
        if self.names is not None:
            rows = columns = list(self.names)
        head: list[Cell] = [f"{self.y_label} \\ {self.x_label}", *columns]
        found = [head]
        for name, weights in zip(rows, self.weights.tolist(), strict=True):
            found.append([name, *weights])
        return found

    def draw(self, axes: "Axes") -> None:
        """Draw the weights, negative ones in another color."""
        from matplotlib.ticker import MaxNLocator

        image = axes.imshow(
            self.weights,
            cmap="PRGn_r",  # purple is positive, as on the pages
            vmin=-self.limit,
            vmax=self.limit,
            origin="lower" if self.is_upward else "upper",
            aspect="auto" if self.is_upward else "equal",  # time and frequency have no common unit
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        if len(self.weights) == 1:
            axes.set_yticks([])
        assert axes.figure is not None
        axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)


def map_figures(exhibits: Sequence[Exhibit], run_names: Sequence[str]) -> Iterator[MapFigure]:
    """All maps of some samples.

    Args:
        exhibits: Samples, whose views are named by the runs' numbers, from 1.
        run_names: Names of the runs.
    """
    titles = [n if len(n) <= LONGEST else f"…{n[1 - LONGEST :]}" for n in run_names]
    for sample, exhibit in enumerate(exhibits, start=1):
        is_text, is_sound = isinstance(exhibit, TextExhibit), isinstance(exhibit, SoundExhibit)
        x_label, y_label = "patch column", "patch row"
        if is_text:
            x_label, y_label = "key", "query"
        elif is_sound:
            x_label, y_label = "time", "frequency"
        for number, view in exhibit.views.items():
            # As on the pages: the first tokens of a text attend to few others, with large weights.
            limit = max(
                float(np.percentile(np.abs(weights), 99.0 if is_text else 100.0))
                for weights in view.maps.values()
            )
            for name, weights in view.maps.items():
                yield MapFigure(
                    f"map_{sample}_of_run_{number}_{FILE_NAMES[name]}",
                    f"{name} of sample {sample}, {titles[int(number) - 1]}",
                    x_label,
                    y_label,
                    weights,
                    exhibit.pieces if isinstance(exhibit, TextExhibit) else None,
                    limit or 1.0,
                    is_sound,
                )
