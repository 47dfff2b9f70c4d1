"""What the second map cancels has its analytic values, and is told apart by modality."""

import math

import pytest
import torch
from constructed_maps import layer_of

import diffmm
from diffmm.analysis.attention_maps import attention_maps
from diffmm.analysis.cancellation import (
    CancellationMeter,
    LayerCancellation,
    cancellation,
    shared_layers,
    specialization,
    variance_by_modality,
)
from diffmm.analysis.map_blocks import visit_layers
from diffmm.analysis.measurements import Measurements, measure
from diffmm.analysis.sections import Analyzed
from diffmm.analysis.sections.cancellation import cancellation_section
from diffmm.batch import inputs_of
from diffmm.ops import AttentionMask

TINY = 1e-300


def measured(*layers):
    meter = CancellationMeter()
    for layer in layers:
        meter.add(layer)
    (found,) = meter.layers()
    return found.cancelled[:, 0].tolist(), found.correlation[:, 0].tolist()


def test_the_overlap_and_the_correlation_by_hand():
    # The smaller weights are 0.1, 0.1 and 0.2. Around their means of 1/3, the maps in thirtieths
    # are 5, -1, -4 and -4, -4, 8.
    cancelled, correlation = measured(layer_of([0.5, 0.3, 0.2], [0.2, 0.2, 0.6], lam=0.5))
    assert cancelled == pytest.approx([0.4])
    assert correlation == pytest.approx([-48 / math.sqrt(42 * 96)])


@pytest.mark.parametrize(("lam", "expected"), [(0.25, 0.25), (2.0, 1.0), (-0.5, 0.0)])
def test_equal_maps_cancel_up_to_lambda(lam, expected):
    cancelled, correlation = measured(layer_of([0.5, 0.3, 0.2], [0.5, 0.3, 0.2], lam=lam))
    assert cancelled == pytest.approx([expected])
    assert correlation == pytest.approx([1.0])


def test_maps_of_different_keys_cancel_nothing():
    cancelled, correlation = measured(layer_of([1.0, TINY], [TINY, 1.0], lam=0.9))
    assert cancelled == pytest.approx([0.0])
    assert correlation == pytest.approx([-1.0])


def test_samples_are_apart_and_batches_follow_each_other():
    first, second = [[0.5, 0.5], [0.9, 0.1]], [[0.5, 0.5], [0.1, 0.9]]
    cancelled, correlation = measured(
        layer_of(first, second, lam=1.0), layer_of([0.8, 0.2], [0.7, 0.3], lam=0.5)
    )
    assert cancelled == pytest.approx([1.0, 0.2, 0.5])
    assert math.isnan(correlation[0])  # constant maps have none
    assert correlation[1:] == pytest.approx([-1.0, 1.0])


def test_padding_does_not_count():
    mask = AttentionMask(causal=True, key_padding=torch.tensor([[True, True, False]]))
    cancelled, correlation = measured(
        layer_of([0.1, 0.3, 0.6], [0.3, 0.1, 0.6], lam=0.5, mask=mask)
    )
    # Query 0 has one key, and query 1 the maps (1, 3) / 4 and (3, 1) / 4.
    assert cancelled == pytest.approx([(0.5 + 0.25 + 0.125) / 2])
    assert correlation == pytest.approx([-1.0])


def test_softmax_attention_has_none():
    model = diffmm.create_model("image/digits_tiny", attention="softmax").eval()
    assert cancellation(model, torch.rand(2, 1, 8, 8)) == []


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
def test_blocks_do_not_matter(attention):
    model = diffmm.create_model("image/digits_tiny", attention=attention).eval()
    images = torch.rand(3, 1, 8, 8)
    maps = attention_maps(model, images)
    for max_bytes in (None, 1):
        for layer, found in zip(
            maps, cancellation(model, images, max_bytes=max_bytes), strict=True
        ):
            first, second = layer.components
            overlap = torch.minimum(first, layer.lam.unsqueeze(-1) * second).sum(-1).mean(-1)
            torch.testing.assert_close(found.cancelled.float(), overlap)
            both = torch.stack([first, second], dim=-2).flatten(0, 2)
            by_query = torch.stack([torch.corrcoef(rows)[0, 1] for rows in both])
            by_query = by_query.view(first.shape[:3]).mean(-1)
            torch.testing.assert_close(found.correlation.float(), by_query, rtol=1e-3, atol=1e-4)


def test_variance_by_modality_by_hand():
    images, sounds = torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([[4.0, 3.0]] * 3)
    # Head 0: means 1 and 4, variances 1 and 0. Head 1: no variance within.
    found = variance_by_modality([images, sounds])
    assert found.tolist() == pytest.approx([2.25 / (2.25 + 0.5), 1.0])
    assert variance_by_modality([images, images]).tolist()[0] == 0.0
    # More samples of one modality change nothing.
    torch.testing.assert_close(variance_by_modality([images.repeat(5, 1), sounds]), found)


def test_specialization_by_hand():
    base = torch.tensor([[0.1, 0.4, 0.2]])
    assert specialization([base, base + 0.3]) == pytest.approx(0.0)
    assert specialization([torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])]) == 1.0
    # Means (0, 0) and (0, 1): a quarter is the modality's, a quarter the head's of 3/4 in all.
    found = specialization([torch.zeros(2, 2), torch.tensor([[0.0, 2.0], [0.0, 0.0]])])
    assert found == pytest.approx(1 / 3)


def shared_model(shared_blocks, attention="diff_v2"):
    return diffmm.create_model(
        "multimodal/shapes_and_sounds_tiny", attention=attention, shared_blocks=shared_blocks
    ).eval()


def batches():
    texts = {"tokens": torch.full((3, 9), 256), "num_tokens": torch.tensor([4, 9, 6])}
    texts["tokens"][:, :3] = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    sounds = {"waveforms": torch.rand(3, 8000) - 0.5, "num_samples": torch.tensor([8000] * 3)}
    return [{"images": torch.randn(3, 3, 32, 32), **texts}, {**sounds, **texts}]


def test_shared_layers_are_told_apart_by_what_runs_them():
    """The maps of a tower in the whole model are those of the tower alone."""
    model, found = shared_model(2), CancellationMeter()
    images, sounds = batches()
    for batch in (images, sounds):
        visit_layers(model, *inputs_of(model, batch), visit=found.add)
    layers = {layer.name: layer for layer in found.layers()}
    names = [
        f"{p}.backbone.blocks.{i}.attention" for p in ("image", "text", "audio") for i in range(4)
    ]
    assert list(layers) == names
    for part, batch in (("image", images), ("audio", sounds)):
        tower = model.towers[part]
        for alone in cancellation(tower, *inputs_of(tower, batch)):
            torch.testing.assert_close(layers[f"{part}.{alone.name}"].cancelled, alone.cancelled)
    assert len(layers[names[4]].cancelled) == 6  # the texts of both
    shared = shared_layers(list(layers.values()))
    assert {name: len(parts) for name, parts in shared.items()} == {
        f"image.backbone.blocks.{i}.attention": 3 for i in (2, 3)
    }


@pytest.mark.parametrize("shared_blocks", [0, 2])
def test_the_section_has_a_row_per_modality(shared_blocks):
    found = measure(shared_model(shared_blocks), batches(), spans=lambda batch: None)
    section = cancellation_section([Analyzed("run", found)])
    rows = {row[1]: row[2:] for row in section.summary.rows}
    assert list(rows) == ["image", "text", "audio", *["2 shared layers"] * (shared_blocks > 0)]
    images = [layer.cancelled for layer in found.cancellation if layer.name.startswith("image")]
    assert rows["image"][0] == pytest.approx(float(torch.stack(images).mean()))
    for modality in ("image", "text", "audio"):
        assert 0.0 < rows[modality][0] < 1.0
        assert math.isnan(rows[modality][2])
    assert [table.name for table in section.details] == [
        *["cancellation_of_shared_layers"] * (shared_blocks > 0),
        "cancellation_by_head",
    ]
    assert len(section.details[-1].rows) == 3 * 4 * 4
    if shared_blocks:
        assert all(0.0 < number < 1.0 for number in rows["2 shared layers"][2:])
    (chart,) = section.figures
    assert [series.label for series in chart.series] == ["image", "text", "audio"]


def test_the_section_of_a_model_without_towers():
    layer = LayerCancellation(
        "backbone.0", "backbone.0", torch.tensor([[0.25]]), torch.tensor([[1.0]])
    )
    section = cancellation_section([Analyzed("run", Measurements(cancellation=[layer]))])
    assert section.summary.texts() == [["run", "all", "0.25", "1", "-", "-"]]
    assert cancellation_section([Analyzed("softmax", Measurements())]).summary is None
