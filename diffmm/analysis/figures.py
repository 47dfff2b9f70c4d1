"""Figures as data: drawn by matplotlib as PNG or SVG, and written as CSV.

In SVG, colors are CSS variables, so that a page shows them in its light and its dark theme.
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffmm.analysis.comparison import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, RULE = "#1d1c1a", "#e4e0d8"
STYLES = ("-", "--", ":", "-.")
WIDTH, HEIGHT = 5.4, 3.3
"""Size of a figure in inches."""

DPI = 160
ROW_HEIGHT = 0.17
"""Height of a row of the legend in inches."""

LEGEND_CHARACTERS = 84
"""Characters of all columns of a legend."""

MOST_NUMBERS = 400
"""Maximum number of cells of a heat map that have their values printed."""

DECADE = 10.0

Cell = str | int | float


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: Label in the legend.
        points: Points `(x, y)` in ascending order of x; points that are not finite are left out.
        color: Index of the color, usually that of the run.
        style: Index of the line style, usually that of the map or method.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    style: int = 0


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        name: Name of its files, without an ending.
        title: Title.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
    """

    name: str
    title: str
    x_label: str
    y_label: str

    def table(self) -> list[list[Cell]]:
        """The numbers as CSV rows, with a header."""
        raise NotImplementedError

    def draw(self, axes: "Axes") -> None:
        """Draw the figure, except its title and labels."""
        raise NotImplementedError


@dataclass(frozen=True)
class Chart(Figure):
    """Lines on common axes.

    Attributes:
        series: The lines.
        log: Whether the y axis is logarithmic if the values span more than a factor of `DECADE`.
        whole: Whether x are whole numbers, such as layers.
    """

    series: Sequence[Series]
    log: bool = False
    whole: bool = True

    @property
    def legend_columns(self) -> int:
        """Number of columns of the legend below the plot."""
        longest = max((len(series.label) for series in self.series), default=0)
        return max(1, min(4, LEGEND_CHARACTERS // (longest + 8)))

    @property
    def legend_rows(self) -> int:
        """Number of rows of the legend; 0 if there is none."""
        return -(-len(self.series) // self.legend_columns) if len(self.series) > 1 else 0

    def table(self) -> list[list[Cell]]:
        """The numbers as CSV rows, with a header."""
        rows: list[list[Cell]] = [["series", self.x_label, self.y_label]]
        return rows + [[series.label, x, y] for series in self.series for x, y in series.points]

    def draw(self, axes: "Axes") -> None:
        """Draw the lines."""
        from matplotlib.ticker import MaxNLocator

        for series in self.series:
            points = [(x, y) for x, y in series.points if math.isfinite(y)]
            color = COLORS[series.color % len(COLORS)]
            marker = "o" if len(points) <= 40 else ""
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                STYLES[series.style % len(STYLES)] + marker,
                color=color,
                label=series.label,
                linewidth=1.6,
                markersize=3.5,
            )
        sizes = [y for series in self.series for _, y in series.points if 0.0 < y < math.inf]
        if self.log and sizes and max(sizes) > DECADE * min(sizes):
            axes.set_yscale("log")
        if self.whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        if len(self.series) > 1:
            assert axes.figure is not None
            # Given one by one: a legend leaves out labels that start with "_".
            axes.figure.legend(
                axes.lines,
                [series.label for series in self.series],
                loc="outside lower left",
                frameon=False,
                fontsize=8,
                ncols=self.legend_columns,
                handlelength=3.5,  # dashes are told apart
            )


@dataclass(frozen=True)
class HeatMap(Figure):
    """Numbers of layers and heads, or of other rows and columns, as colors.

    Attributes:
        values: Rows of numbers; NaN leaves a cell empty.
        rows: Names of the rows.
        columns: Names of the columns.
        limits: The values of the first and the last color, so that several heat maps have one
            scale; the smallest and the largest value by default.
    """

    values: Sequence[Sequence[float]]
    rows: Sequence[str]
    columns: Sequence[str]
    limits: tuple[float, float] | None = None

    def table(self) -> list[list[Cell]]:
        """The numbers as CSV rows, with a header."""
        head: list[Cell] = [f"{self.y_label} \\ {self.x_label}", *self.columns]
        rows: list[list[Cell]] = [[n, *v] for n, v in zip(self.rows, self.values, strict=True)]
        return [head, *rows]

    def draw(self, axes: "Axes") -> None:
        """Draw the cells, with their values if there are few."""
        low, high = self.limits or (None, None)
        image = axes.imshow(self.values, cmap="viridis", aspect="auto", vmin=low, vmax=high)
        axes.set_xticks(range(len(self.columns)), self.columns)
        axes.set_yticks(range(len(self.rows)), self.rows)
        axes.tick_params(length=0)
        if len(self.rows) * len(self.columns) <= MOST_NUMBERS and len(self.columns) <= 16:
            low, high = image.get_clim()
            for i, row in enumerate(self.values):
                for j, value in enumerate(row):
                    if math.isfinite(value):
                        is_dark = value < (low + high) / 2
                        axes.text(
                            j, i, f"{value:.2f}", ha="center", va="center", fontsize=7,
                            color="#fffffe" if is_dark else "#010101",
                        )  # fmt: skip
        assert axes.figure is not None
        axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)


def png(figure: Figure) -> bytes:
    """Draw a figure as PNG on white."""
    return _drawn(figure, "png", dpi=DPI)


def svg(figure: Figure) -> str:
    """Draw a figure as an `<svg>` element without a background, whose ink is the page's and whose
    colors are its variables `--run-0` and so on."""
    text = _drawn(figure, "svg", transparent=True, metadata={"Date": None}).decode()
    text = text[text.index("<svg") :]
    # In a page, namespaces are implied; the rest names matplotlib.
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    # Identifiers are unique within a page.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{figure.name}-", text)
    text = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", text, count=1)
    label = f'class="figure" role="img" aria-label="{_attribute(figure.title)}"'
    text = text.replace("<svg", f"<svg {label}", 1)
    for number, color in enumerate(COLORS):
        text = text.replace(color, f"var(--run-{number})")
    return text.replace(INK, "var(--ink)").replace(RULE, "var(--rule)")


def _drawn(figure: Figure, form: str, **settings: Any) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": figure.name,
        "font.family": "sans-serif",
        "font.size": 9,
        "text.parse_math": False,  # names of runs are no formulas
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
    }
    with rc_context(style):
        legend_rows = figure.legend_rows if isinstance(figure, Chart) else 0
        height = HEIGHT + ROW_HEIGHT * legend_rows
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        axes = canvas.add_subplot()
        axes.set_title(figure.title)
        axes.set_xlabel(figure.x_label)
        axes.set_ylabel(figure.y_label)
        figure.draw(axes)
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            # A page has the fonts of its browser; in a PNG, such a character is a box.
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
            canvas.savefig(buffer, format=form, **settings)
    return buffer.getvalue()


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
