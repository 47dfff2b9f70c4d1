"""The report is complete and self-contained, and its numbers are correct."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from diffmm.analysis.charts import Line, line_chart, spread, ticks
from diffmm.analysis.exhibits import image_exhibit, sound_exhibit, text_exhibit
from diffmm.analysis.report import Section, render_report
from diffmm.analysis.results import RunResult, table
from diffmm.models import (
    AudioConfig,
    AudioModel,
    BackboneConfig,
    ImageConfig,
    ImageModel,
    TextConfig,
    TextModel,
)

ATTENTIONS = ("softmax", "diff_v1", "diff_v2")
VOID = {"meta", "img", "br"}


def backbone(attention: str, rope: str) -> BackboneConfig:
    return BackboneConfig(dim=32, depth=2, num_heads=4, attention=attention, rope=rope)


def result(modality: str, metric_name: str, number: int, attention: str) -> RunResult:
    curve = [(10.0 * step, 2.0 / step + 0.1 * number) for step in range(1, 9)]
    return RunResult(
        modality=modality,
        attention=attention,
        recipe=f"{modality}/tiny",
        num_parameters=123_456 + number,
        learning_rate=0.004,
        num_steps=80,
        loss=1.2345 + number,
        metric_name=metric_name,
        metric=0.9123 - 0.01 * number,
        seconds=20.5 + number,
        train_curve=curve,
        val_curve=curve[3::4],
    )


@pytest.fixture(scope="module")
def exhibits():
    torch.manual_seed(0)
    text, image, audio = {}, {}, {}
    for attention in ATTENTIONS:
        text[attention] = TextModel(TextConfig(128, 16, backbone(attention, "1d")))
        image[attention] = ImageModel(
            ImageConfig(
                backbone=backbone(attention, "2d"),
                num_classes=2,
                image_size=8,
                patch_size=2,
                in_channels=1,
                num_reg_tokens=1,
            )
        )
        audio[attention] = AudioModel(
            AudioConfig(
                backbone=backbone(attention, "2d"),
                num_classes=2,
                sample_rate_hz=8000,
                num_mels=20,
                patch_size=8,
                cls_token=False,
                pool="mean",
            )
        )
    tokens = torch.tensor(list(b"if a<b:"))
    return {
        "text": text_exhibit(text, tokens, 10, [chr(i) for i in range(128)]),
        "image": image_exhibit(image, torch.rand(1, 8, 8), 1, ["cat", "<dog>"]),
        "audio": sound_exhibit(audio, torch.randn(3000), 0, ["tone", "click"]),
    }


@pytest.fixture(scope="module")
def sections(exhibits):
    return [
        Section(
            title=modality.title(),
            task="Learn & predict.",
            results=[result(modality, metric, i, a) for i, a in enumerate(ATTENTIONS)],
            exhibits=[exhibits[modality]],
            maps_caption="Rows look at columns.",
        )
        for modality, metric in (
            ("text", "bits per byte"),
            ("image", "accuracy"),
            ("audio", "accuracy"),
        )
    ]


@pytest.fixture(scope="module")
def page(sections):
    return render_report(sections, facts="torch 2.11, seed 0")


class Reader(HTMLParser):
    """Checks that tags are balanced, and collects the elements that the tests need."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_the_page_loads_nothing(page):
    tags = read(page).tags
    assert not re.search(r"https?://|@import|url\(", page)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    sources = [attrs["src"] for _, attrs in tags if "src" in attrs]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_links_stay_in_the_page(page):
    tags = read(page).tags
    ids = {attrs["id"] for _, attrs in tags if "id" in attrs}
    links = [attrs["href"] for _, attrs in tags if "href" in attrs]
    assert len(links) == 4
    assert all(link.removeprefix("#") in ids for link in links)


def test_the_page_has_every_number_and_says_what_it_is_worth(page, sections):
    text = read(page).text
    for section in sections:
        for run in section.results:
            for number in (
                f"{run.num_parameters:,}",
                f"{run.loss:.4f}",
                run.metric_text,
                f"{run.seconds:.1f}",
            ):
                assert number in text
    assert "One seed" in text
    assert "0.12 to 0.12 million parameters".replace(" ", "") in re.sub(r"\s", "", text)
    assert "torch 2.11, seed 0" in text
    assert "prefers-color-scheme: dark" in text


def test_every_map_is_drawn_and_names_are_escaped(page):
    reader = read(page)
    pictures = [attrs for tag, attrs in reader.tags if tag == "img"]
    # A text has 1 + 3 + 3 maps; an image and a sound have maps over the picture, and the picture.
    assert len(pictures) == 7 + 2 * (1 + 2 * 7)
    assert "<dog>" not in page
    assert "<dog>" in reader.text
    assert "A₁ − λA₂" in reader.text
    assert "λ = 0." in reader.text


@pytest.mark.parametrize("modality", ["text", "image", "audio"])
def test_views_read_the_last_layer(exhibits, modality):
    exhibit = exhibits[modality]
    shape = {"text": (7, 7), "image": (4, 4), "audio": (2, 5)}[modality]
    for attention, view in exhibit.views.items():
        assert 0.0 < view.probability <= 1.0
        *components, combined = view.maps.values()
        assert combined.shape == shape
        assert len(components) == (0 if attention == "softmax" else 2)
        assert (view.lam is None) == (attention == "softmax")
        if components and modality == "text":
            first, second = components
            np.testing.assert_allclose(first.sum(-1), 1.0, rtol=1e-5)
            if attention == "diff_v1":  # one lambda for all heads and tokens
                np.testing.assert_allclose(combined, first - view.lam * second, atol=1e-6)
        elif modality == "audio":  # no special tokens, so that all weight is on patches
            left = 0.0 if view.lam is None else view.lam
            np.testing.assert_allclose(combined.sum(), 1.0 - left, rtol=1e-4)


def test_a_sound_is_upright_and_cut_to_what_patches_see(exhibits):
    # 38 frames in patches of 8, and 20 bands, of which 16 are visible.
    assert exhibits["audio"].spectrogram.shape == (16, 40)


def test_chart_draws_every_line_with_its_points():
    lines = [
        Line(kind, kind, [(1.0, 9.0), (50.0, 1.0), (100.0, 0.5 + i)])
        for i, kind in enumerate(ATTENTIONS)
    ]
    chart = line_chart(lines, title="Loss", x_label="step", markers=True)
    assert [chart.count(f'<g class="{kind}">') for kind in ATTENTIONS] == [1, 1, 1]
    assert "softmax, step 50: 1.000" in chart
    assert "diff_v2 ends at 2.500" in chart
    # The first point is above the chart: it does not change the scale, and has no marker.
    assert ">10<" not in chart
    assert "step 1:" not in chart


def test_a_chart_of_one_point():
    lines = [Line("softmax", "softmax", [(2.0, 1.5)])]
    assert "step 2: 1.500" in line_chart(lines, title="", x_label="step", markers=True)


@given(st.floats(-1e6, 1e6), st.floats(0.0, 1e6))
@example(0.0, 5e-324)
@example(1e6, 1e-9)
@example(2e-3, 1e-12)
def test_ticks_enclose_what_they_measure(low, span):
    high = low + span
    found = ticks(low, high, 5)
    tolerance = 1e-6 * max(abs(low), abs(high), 1.0)
    assert found[0] <= low + tolerance
    assert found[-1] >= high - tolerance
    assert 2 <= len(found) <= 9


@given(st.lists(st.floats(0.0, 200.0), min_size=1, max_size=4))
def test_labels_do_not_touch_and_keep_their_order(heights):
    placed = spread(heights, 17.0, highest=200.0)
    assert max(placed) <= 200.0
    for i, first in enumerate(placed):
        for j, second in enumerate(placed[:i]):
            assert abs(first - second) >= 17.0 - 1e-6
            assert (first - second) * (heights[i] - heights[j]) >= 0.0


def test_labels_stay_where_they_are_if_there_is_room():
    assert spread([10.0, 90.0, 50.0], 17.0, highest=200.0) == [10.0, 90.0, 50.0]


def test_the_printed_table_lines_up():
    runs = [
        result("text", "bits per byte", 0, "softmax"),
        result("image", "accuracy", 1, "diff_v1"),
    ]
    lines = table(runs)
    header, rule, first, second = lines.splitlines()
    assert len({len(header), len(rule), len(first), len(second)}) == 1
    assert first.split() == [
        "text",
        "softmax",
        "123,456",
        "0.004",
        "1.2345",
        "0.912",
        "bits",
        "20.5",
    ]
    assert second.split() == ["image", "diff_v1", "123,457", "0.004", "2.2345", "90.2%", "21.5"]
