"""Attention maps of samples as figures with their numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diffmm.analysis.exhibits import Array, Exhibit, SoundExhibit, TextExhibit
from diffmm.analysis.figures import Cell, Figure
from diffmm.analysis.word_maps import WordMaps, WordsExhibit

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


@dataclass(frozen=True)
class WordFigure(Figure):
    """The attention maps of one word of a text, averaged over heads.

    Attributes:
        word: The word and its maps.
        is_upward: As in `MapFigure`.
    """

    word: WordMaps
    is_upward: bool = False

    def table(self) -> list[list[Cell]]:
        """The weights as CSV rows, with a header."""
        rows: list[list[Cell]] = [["layer", "map", self.y_label, self.x_label, "weight"]]
        for layer, view in self.word.layers.items():
            for name, weights in view.maps.items():
                for (row, column), weight in np.ndenumerate(weights):
                    rows.append([layer + 1, name, row, column, float(weight)])
        return rows

    def draw(self, axes: "Axes") -> None:
        """Draw a row of maps per layer, all of a layer with the same scale."""
        axes.set_axis_off()
        height = 1.0 / max(1, len(self.word.layers))
        for number, (layer, view) in enumerate(self.word.layers.items()):
            limit = max(float(np.abs(weights).max()) for weights in view.maps.values()) or 1.0
            width = 1.0 / len(view.maps)
            for place, (name, weights) in enumerate(view.maps.items()):
                bounds = (place * width, 1.0 - (number + 1) * height, 0.9 * width, 0.76 * height)
                inset = axes.inset_axes(bounds)
                inset.imshow(
                    weights,
                    cmap="PRGn_r",
                    vmin=-limit,
                    vmax=limit,
                    origin="lower" if self.is_upward else "upper",
                    aspect="auto" if self.is_upward else "equal",
                )
                inset.set_xticks([])
                inset.set_yticks([])
                inset.set_title(f"{name}, layer {layer + 1}, ±{limit:.2g}", fontsize=7)


def map_figures(
    exhibits: Sequence[Exhibit], run_names: Sequence[str]
) -> Iterator[MapFigure | WordFigure]:
    """All maps of some samples, with those of words after those of the whole text.

    Args:
        exhibits: Samples, whose views are named by the runs' numbers, from 1.
        run_names: Names of the runs.
    """
    titles = [n if len(n) <= LONGEST else f"…{n[1 - LONGEST :]}" for n in run_names]
    for sample, each in enumerate(exhibits, start=1):
        exhibit = each.whole if isinstance(each, WordsExhibit) else each
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
        if isinstance(each, WordsExhibit):
            for number, written in each.written.items():
                for place, word in enumerate(written.words, start=1):
                    yield WordFigure(
                        f"map_{sample}_of_run_{number}_word_{place}",
                        f"“{word.word}” in sample {sample}, {titles[int(number) - 1]}",
                        x_label,
                        y_label,
                        word,
                        is_sound,
                    )
