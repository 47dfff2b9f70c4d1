"""Line charts as inline SVG, without scripts and with colors from the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 74, 30, 40
LABEL_HEIGHT = 17
MARKERS = (  # drawn around the origin, about 7 units wide
    "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0",
    "M-3-3h6v6h-6z",
    "M0-3.8L3.8 3h-7.6z",
    "M0-4L4 0L0 4L-4 0z",
    "M-1.2-3.6h2.4v2.4h2.4v2.4h-2.4v2.4h-2.4v-2.4h-2.4v-2.4h2.4z",
)
DASHES = ("1 4.5", "", "8 5", "12 4 2 4", "3 3")
NUM_COLORS = 5
"""Number of series colors in the style sheet: `--series-0` and so on."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Attributes:
        kind: CSS class of the curve's color and dashes (see `styles_of`).
        label: Label at the end of the curve.
        points: Points `(x, y)` in ascending order of x.
    """

    kind: str
    label: str
    points: Sequence[Point]
    number: int = 0
    """Index of the curve's marker."""


def styles_of(kinds: Sequence[str]) -> str:
    """CSS rules that give each kind of line a color and dashes, by its index."""
    rules = []
    for number, kind in enumerate(kinds):
        rules.append(f".{kind} {{ --c: var(--series-{number % NUM_COLORS}); }}\n")
        if dash := DASHES[number % len(DASHES)]:
            rules.append(f"svg .{kind} .line {{ stroke-dasharray: {dash}; }}\n")
    return "".join(rules)


def marker(number: int) -> str:
    """The SVG path of a marker."""
    return MARKERS[number % len(MARKERS)]


def line_chart(
    lines: Sequence[Line], *, title: str, x_label: str, markers: bool, skip: float = 0.1
) -> str:
    """Draw `lines` on common axes as an `<svg>` element.

    Args:
        lines: At least one line, each with at least one point.
        title: Title above the chart.
        x_label: Label of the x axis.
        markers: Whether to mark every point, with its values as a tooltip.
        skip: Initial fraction of the x axis that is ignored when scaling the y axis, because the
            high losses of the first steps would flatten the rest. There, lines may leave the chart
            at the top.
    """
    last = max(x for line in lines for x, _ in line.points) or 1.0
    tail = [y for line in lines for x, y in line.points if x >= skip * last]
    tail += [line.points[-1][1] for line in lines]
    y_ticks = ticks(min(tail), max(tail), 5)
    x_ticks = [tick for tick in ticks(0.0, last, 4) if tick <= last]
    low, high = y_ticks[0], y_ticks[-1]

    def place(point: Point) -> Point:
        x = LEFT + point[0] / last * (WIDTH - LEFT - RIGHT)
        y = TOP + (high - point[1]) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return x, max(y, -HEIGHT)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(_summary(lines, title))}">',
        f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>',
    ]
    for tick in y_ticks:
        y = place((0.0, tick))[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{y + 4:.1f}">{tick:g}</text>')
    for tick in x_ticks:
        x = place((tick, low))[0]
        parts.append(
            f'<text class="tick mid" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}">{tick:g}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick mid" x="{middle}" y="{HEIGHT - 4}">{escape(x_label)}</text>')
    box = (LEFT, TOP - 4, WIDTH - LEFT, HEIGHT - TOP - BOTTOM + 8)
    frame = 'x="{}" y="{}" width="{}" height="{}" viewBox="{} {} {} {}"'.format(*box, *box)
    heights = [place(line.points[-1])[1] for line in lines]
    ends = spread(heights, LABEL_HEIGHT, highest=HEIGHT - BOTTOM - 3)
    for line, label_y in zip(lines, ends, strict=True):
        placed = [place(point) for point in line.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        parts.append(f'<g class="{line.kind}">')
        # The inner <svg> clips the line.
        parts.append(f'<svg {frame}><path class="line" d="M{path}"/></svg>')
        if markers:
            for (x, y), (step, value) in zip(placed, line.points, strict=True):
                if y >= TOP - 4:
                    parts.append(
                        f'<path class="dot" transform="translate({x:.1f} {y:.1f})" '
                        f'd="{marker(line.number)}"><title>{escape(line.label)}, {x_label} '
                        f"{step:g}: {value:.3f}</title></path>"
                    )
        label_x = placed[-1][0] + 9
        parts.append(f'<text class="name" x="{label_x:.1f}" y="{label_y + 4.5:.1f}">')
        parts.append(f"{escape(line.label)}</text></g>")
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that enclose `[low, high]`."""
    scale = max(abs(low), abs(high))
    # Smaller spans are due to rounding.
    span = high - low
    if span <= 1e-9 * max(scale, 1e-3):
        span = scale if scale > 1e-9 else 1.0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def spread(heights: Sequence[float], gap: float, *, highest: float) -> list[float]:
    """Move labels at `heights` as little as possible so that they are `gap` apart and at most at
    `highest`."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    # Labels that touch form a cluster, which is centered on the mean of their original heights.
    clusters: list[list[int]] = []
    for i in order:
        clusters.append([i])
        while len(clusters) > 1 and (
            _start(clusters[-1], heights, gap) - _start(clusters[-2], heights, gap)
            < gap * len(clusters[-2])
        ):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    placed = [0.0] * len(heights)
    for cluster in clusters:
        for rank, i in enumerate(cluster):
            placed[i] = _start(cluster, heights, gap) + rank * gap
    for below, i in enumerate(reversed(order)):
        placed[i] = min(placed[i], highest - below * gap)
    return placed


def _start(cluster: Sequence[int], heights: Sequence[float], gap: float) -> float:
    """The height of the first label of a cluster."""
    return sum(heights[i] for i in cluster) / len(cluster) - gap * (len(cluster) - 1) / 2


def _summary(lines: Sequence[Line], title: str) -> str:
    ends = ", ".join(f"{line.label} ends at {line.points[-1][1]:.3f}" for line in lines)
    return f"{title}: {ends}"
