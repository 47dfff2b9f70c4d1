"""Attention maps as figures: their numbers, names and orientation."""

import io

import numpy as np
from PIL import Image

from diffmm.analysis.exhibits import ImageExhibit, SoundExhibit, TextExhibit, View
from diffmm.analysis.figures import png
from diffmm.analysis.map_figures import map_figures

WEIGHTS = np.array([[0.5, 0.0], [-0.25, 0.75]])


def test_figures_of_all_maps():
    soft, pair = View({"A": WEIGHTS}, None), View({"A₁": WEIGHTS, "A₂": 2.0 * WEIGHTS}, 0.5)
    text = TextExhibit(None, {"1": soft}, ["a", "b"])
    image = ImageExhibit("cat", {"1": soft, "2": pair}, np.zeros((4, 4)))
    found = list(map_figures([text, image], ["first", "second"]))
    assert [figure.name for figure in found] == [
        "map_1_of_run_1_a", "map_2_of_run_1_a", "map_2_of_run_2_a1", "map_2_of_run_2_a2"
    ]  # fmt: skip
    assert found[3].title == "A₂ of sample 2, second"
    assert [figure.limit for figure in found[1:]] == [0.75, 1.5, 1.5]
    assert 0.74 < found[0].limit < 0.75  # the 99th percentile
    assert found[0].table() == [["query \\ key", "a", "b"], ["a", 0.5, 0.0], ["b", -0.25, 0.75]]
    assert found[1].table()[1] == ["0", 0.5, 0.0]
    nothing = ImageExhibit("cat", {"1": View({"A": 0.0 * WEIGHTS}, None)}, np.zeros((4, 4)))
    assert next(map_figures([nothing], ["a"])).limit == 1.0
    assert next(map_figures([text], ["long/" * 9])).title.endswith("…" + ("long/" * 9)[-21:])


def test_signs_have_colors_and_sounds_their_lowest_band_below():
    def corner(exhibit):
        (figure,) = map_figures([exhibit], ["a"])
        pixels = np.asarray(Image.open(io.BytesIO(png(figure))).convert("RGB")).astype(int)
        purple = (pixels[..., 0] - pixels[..., 1] > 60) & (pixels[..., 2] - pixels[..., 1] > 40)
        rows = purple[:, : pixels.shape[1] * 3 // 4].any(axis=1).nonzero()[0]
        return rows.mean() / len(pixels)

    weights = np.array([[0.9, 0.9], [-0.9, -0.9]])
    views = {"1": View({"A": weights}, None)}
    assert corner(ImageExhibit("a", views, np.zeros((2, 2)))) < 0.45
    assert corner(SoundExhibit("a", views, np.zeros((2, 2)), 1.0)) > 0.5
