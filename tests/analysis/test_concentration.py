"""Measures of concentration have their analytic values."""

import math

import pytest
import torch
from constructed_maps import layer_of

import diffmm
from diffmm.analysis.concentration import MEASURES, ConcentrationMeter, concentration
from diffmm.analysis.map_blocks import visit_layers
from diffmm.ops import AttentionMask

TINY = 1e-300


def measured(*layers, **settings):
    meter = ConcentrationMeter(**settings)
    for layer in layers:
        meter.add(layer)
    (found,) = meter.layers()
    return {
        name: {measure: float(value) for measure, value in measures.items()}
        for name, measures in found.maps.items()
    }


def test_a_uniform_map():
    assert measured(layer_of([0.25] * 4), top_k=1)["A"] == pytest.approx(
        {
            "entropy": math.log(4),
            "top_share": 0.25,
            "hoyer": 0.0,
            "negative_share": 0.0,
            "first_share": 0.25,
        }
    )


def test_a_map_with_one_key():
    found = measured(layer_of([TINY, 1.0, TINY, TINY]))["A"]
    assert found == pytest.approx(
        {"entropy": 0.0, "top_share": 1.0, "hoyer": 1.0, "negative_share": 0.0, "first_share": 0.0},
        abs=1e-9,
    )


def test_both_maps_and_their_difference():
    found = measured(layer_of([0.5, 0.3, 0.2], [0.2, 0.2, 0.6], lam=0.5), top_k=1)
    # The difference is (0.4, 0.2, -0.1), in shares (4, 2, 1) / 7.
    assert list(found) == ["A1", "A2", "A1 - lam A2"]
    assert found["A2"]["top_share"] == pytest.approx(0.6)
    shares = [4 / 7, 2 / 7, 1 / 7]
    assert found["A1 - lam A2"] == pytest.approx(
        {
            "entropy": -sum(p * math.log(p) for p in shares),
            "top_share": 4 / 7,
            "hoyer": (math.sqrt(3) - 7 / math.sqrt(21)) / (math.sqrt(3) - 1),
            "negative_share": 1 / 7,
            "first_share": 4 / 7,
        }
    )


def test_equal_maps_that_cancel_do_not_count():
    cancelled = layer_of([0.25] * 4, [0.25] * 4, lam=1.0)
    assert all(math.isnan(value) for value in measured(cancelled)["A1 - lam A2"].values())
    other = layer_of([0.25] * 4, [0.25] * 4, lam=0.5)
    assert measured(cancelled, other)["A1 - lam A2"]["entropy"] == pytest.approx(math.log(4))


def test_a_query_with_a_single_key_has_no_hoyer_and_padding_does_not_count():
    mask = AttentionMask(causal=True, key_padding=torch.tensor([[True, True, False]]))
    found = measured(layer_of([0.2, 0.2, 0.6], mask=mask))["A"]
    # Query 0 sees itself, query 1 two equal keys, query 2 is padding.
    assert found["entropy"] == pytest.approx(math.log(2) / 2)
    assert found["hoyer"] == pytest.approx(0.0)
    assert found["first_share"] == pytest.approx(0.75)


def test_each_document_has_its_own_first_token():
    mask = AttentionMask(causal=True, document_ids=torch.tensor([[0, 1, 1]]))
    found = measured(layer_of([0.5, 0.25, 0.25], mask=mask))["A"]
    assert found["first_share"] == pytest.approx((1.0 + 1.0 + 0.5) / 3)


def test_blocks_and_batches_do_not_matter():
    model = diffmm.create_model("image/digits_tiny", attention="diff_v2").eval()
    images = torch.rand(4, 1, 8, 8)
    together = concentration(model, images)
    meter = ConcentrationMeter(max_bytes=1)
    for half in images.split(2):
        visit_layers(model, half, visit=meter.add)
    for one, other in zip(together, meter.layers(), strict=True):
        for name, measures in one.maps.items():
            assert tuple(measures) == MEASURES
            for measure, values in measures.items():
                torch.testing.assert_close(values, other.maps[name][measure], rtol=1e-4, atol=1e-6)


def test_no_top_is_refused():
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        ConcentrationMeter(top_k=0)
