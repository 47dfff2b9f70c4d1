"""Figures are drawn, and their numbers are those of the data."""

import io
import math
import re
import warnings

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from diffmm.analysis.comparison import COLORS
from diffmm.analysis.figures import Chart, HeatMap, Series, png, svg

CHART = Chart(
    "chart",
    'λ & "more" <b>',
    "layer",
    "value",
    [
        Series("first", [(0, 1.0), (1, math.nan), (2, 3.0)], color=0),
        Series("second", [(0, 2.0), (2, 200.0)], color=1, style=1),
    ],
    log=True,
)
HEAT = HeatMap("heat", "Share", "head", "layer", [[0.1, 0.9], [0.5, math.nan]], ["0", "1"], "ab")


def color_of(name):
    return tuple(int(name[i : i + 2], 16) for i in (1, 3, 5))


@pytest.mark.parametrize("figure", [CHART, HEAT], ids=lambda figure: figure.name)
def test_pictures(figure):
    picture = np.asarray(Image.open(io.BytesIO(png(figure))).convert("RGB"))
    assert min(picture.shape[:2]) > 300
    for number in (0, 1):
        share = (picture == color_of(COLORS[number])).all(axis=-1).mean()
        assert (share > 1e-4) == (figure is CHART)


@pytest.mark.parametrize("value", [0.25, 0.75])
def test_limits_are_the_scale_of_a_heat_map(value):
    figure = HeatMap("h", "", "", "", [[value]], ["a"], ["b"], limits=(0.0, 1.0))
    pixels = np.asarray(Image.open(io.BytesIO(png(figure))).convert("RGB")).reshape(-1, 3)
    colors, counts = np.unique(pixels[(pixels != 255).any(axis=1)], axis=0, return_counts=True)
    expected = colormaps["viridis"](value, bytes=True)[:3]
    assert tuple(colors[counts.argmax()]) == expected


def test_svg_has_no_colors_of_its_own_nor_addresses():
    text = svg(CHART)
    assert text.startswith("<svg")
    assert "var(--run-0)" in text
    assert "var(--run-1)" in text
    assert "var(--ink)" in text
    assert not re.search(r"#[0-9a-f]{6}|http", text)
    assert 'aria-label="λ &amp; &quot;more&quot; &lt;b>"' in text
    assert "first" in text  # text stays text
    identifiers = re.findall(r'\bid="([^"]+)"', text + svg(HEAT))
    assert len(identifiers) == len(set(identifiers)) > 10
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(identifiers)
    assert svg(CHART) == text


@pytest.mark.parametrize("name", ["_base", "$x$", r"$\frac{$", "日", "é"])
@pytest.mark.parametrize("draw", [svg, png])
def test_names_appear_as_they_are(name, draw):
    lines = [Series(label, [(0, 1.0), (1, 2.0)], color=0) for label in (name, "second")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw(Chart("chart", f"title {name}", "layer", "value", lines))
    if draw is svg:
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
        assert {f"title {name}", name, "second"} <= set(texts)


def test_the_axis_is_logarithmic_for_wide_ranges_alone():
    near = Chart("near", "", "x", "y", [Series("a", [(0, 1.0), (1, 2.0)])], log=True)
    assert "10^{" not in svg(near)
    assert svg(near) == svg(Chart("near", "", "x", "y", near.series))
    assert svg(CHART) != svg(Chart("chart", CHART.title, "layer", "value", CHART.series))


def test_tables():
    assert CHART.table()[0] == ["series", "layer", "value"]
    assert CHART.table()[3:] == [["first", 2, 3.0], ["second", 0, 2.0], ["second", 2, 200.0]]
    assert HEAT.table()[:2] == [["layer \\ head", "a", "b"], ["0", 0.1, 0.9]]
