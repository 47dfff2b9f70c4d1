"""Attention scores have their analytic values, also where lambda reaches 1."""

import math

import pytest
import torch
from constructed_maps import layer_of

import diffmm
from diffmm.analysis.attention_maps import attention_maps
from diffmm.analysis.attention_scores import ScoreMeter, Spans, attention_scores
from diffmm.ops import AttentionMask


def marks(*rows):
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


def scores(layer, spans, **settings):
    meter = ScoreMeter(**settings)
    meter.add(layer, spans)
    return meter.scores()


SPANS = Spans(evidence=marks(".x.."), queries=marks("..xx"))


def test_softmax_attention():
    found = scores(layer_of([0.1, 0.4, 0.2, 0.3]), SPANS)
    assert found.answer == pytest.approx(0.4)
    assert found.noise == pytest.approx(0.6)
    assert found.signal_to_noise == pytest.approx(2 / 3)
    assert (found.left_out, found.above_one) == (0.0, 0.0)


def test_differential_attention_is_divided_by_one_less_lambda():
    layer = layer_of([0.1, 0.4, 0.2, 0.3], [0.2, 0.1, 0.3, 0.4], lam=0.5)
    # The difference is (0, 0.35, 0.05, 0.1) and sums to 0.5.
    found = scores(layer, SPANS)
    assert found.answer == pytest.approx(0.7)
    assert found.noise == pytest.approx(0.3)
    added = layer_of([0.1, 0.4, 0.2, 0.3], [0.2, 0.1, 0.3, 0.4], lam=-0.5)
    assert scores(added, SPANS).answer == pytest.approx(0.45 / 1.5)


def test_context_and_special_tokens():
    layer = layer_of([0.1, 0.4, 0.2, 0.3])
    evidence, queries = SPANS.evidence, SPANS.queries
    special = Spans(evidence, queries, special=marks("x..."))
    assert scores(layer, special).noise == pytest.approx(0.5)
    context = Spans(evidence, queries, context=marks("xxx."))
    assert scores(layer, context).noise == pytest.approx(0.3)
    assert scores(layer, context).answer == pytest.approx(0.4)
    nothing = scores(layer, Spans(evidence, queries, context=marks(".x..")))
    assert nothing.signal_to_noise == math.inf


def test_queries_near_lambda_one_are_left_out_and_reported():
    maps = [0.1, 0.4, 0.2, 0.3], [0.2, 0.1, 0.3, 0.4]
    lam = torch.tensor([0.0, 0.0, 0.98, 0.5])
    found = scores(layer_of(*maps, lam=lam), SPANS)
    assert found.answer == pytest.approx(0.7)  # of the query with lambda 0.5
    assert found.left_out == pytest.approx(0.5)
    none = scores(layer_of(*maps, lam=1.0), SPANS)
    assert math.isnan(none.answer)
    assert none.left_out == 1.0


def test_each_query_of_a_sample_alone():
    """The queries are numbered within each sample, wherever they are, over blocks and batches."""
    maps = [0.1, 0.4, 0.2, 0.3], [0.2, 0.1, 0.3, 0.4]
    lam = torch.tensor([0.0, 0.5, 0.98, 0.5])
    evidence = marks(".x..")
    meter = ScoreMeter(max_bytes=1)
    meter.add(layer_of(*maps, lam=lam), Spans(evidence, marks("xx..")))  # 0.4, 0.7
    meter.add(layer_of(*maps, lam=lam), Spans(evidence, marks(".xxx")))  # 0.7, left out, 0.7
    found = meter.scores().queries
    assert [query.answer for query in found] == pytest.approx([(0.4 + 0.7) / 2, 0.7, 0.7])
    assert [query.noise for query in found] == pytest.approx([(0.6 + 0.3) / 2, 0.3, 0.3])
    first = scores(layer_of(*maps, lam=1.0), SPANS)
    assert first.queries == []


def test_padding_asks_nothing():
    maps = [0.2, 0.6, 0.2], [0.6, 0.2, 0.2]
    lam = torch.tensor([0.0, 0.0, 0.5])
    mask = AttentionMask(key_padding=marks("xx."))
    found = scores(layer_of(*maps, lam=lam, mask=mask), Spans(marks(".x."), marks(".xx")))
    assert found.answer == pytest.approx(0.75)  # of the query with lambda 0
    assert found.left_out == 0.0


def test_lambda_above_one_still_sums_to_one_and_is_reported():
    layer = layer_of([0.1, 0.4, 0.2, 0.3], [0.2, 0.1, 0.3, 0.4], lam=torch.tensor([0, 0, 1.5, 0]))
    found = scores(layer, Spans(SPANS.evidence, marks("..x.")))
    assert found.answer + found.noise == pytest.approx(1.0)
    assert found.answer == pytest.approx((0.4 - 1.5 * 0.1) / -0.5)
    assert found.above_one == 1.0
    negative = scores(layer_of([0.2, 0.8], [0.9, 0.1], lam=0.5), Spans(marks(".x"), marks("xx")))
    assert negative.noise < 0.0
    assert math.isnan(negative.signal_to_noise)


def test_layers_and_heads_equal_those_of_the_maps():
    backbone = diffmm.BackboneConfig(
        dim=32, depth=2, num_heads=4, attention="diff_v2", rope="1d", init_std=0.3
    )
    model = diffmm.TextModel(diffmm.models.TextConfig(40, 16, backbone)).eval()
    mask = AttentionMask(causal=True, key_padding=marks("xxxxxx", "..xxxx"))
    spans = Spans(marks(".x....", "...x.."), marks("...xxx", "....xx"))
    tokens = torch.randint(40, (2, 6))
    found = attention_scores(model, tokens, spans=spans, mask=mask, max_bytes=1)
    for layer, maps in zip(found.layers, attention_maps(model, tokens, mask=mask), strict=True):
        shares = maps.combined / (1.0 - maps.lam).unsqueeze(-1)
        answer = torch.stack([shares[0, :, 3:, 1].sum(1), shares[1, :, 4:, 3].sum(1)]).sum(0) / 5
        torch.testing.assert_close(layer.answer.float(), answer)
        torch.testing.assert_close(layer.answer + layer.noise, torch.ones(4).double())
    mean = torch.cat([layer.answer for layer in found.layers]).mean()
    assert found.answer == pytest.approx(float(mean))


def test_spans_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="evidence must be .* booleans, got .1, 4. torch.int64"):
        Spans(torch.zeros(1, 4).long(), SPANS.queries)
    with pytest.raises(ValueError, match=r"queries has shape \(1, 3\), but evidence has \(1, 4\)"):
        Spans(SPANS.evidence, marks("..x"))
    with pytest.raises(ValueError, match="queries marks no token"):
        Spans(SPANS.evidence, marks("...."))
    with pytest.raises(ValueError, match="sample 1 has queries, but no evidence"):
        Spans(marks(".x", ".."), marks("x.", "x."))
    with pytest.raises(ValueError, match=r"evidence has shape \(1, 4\), but layer has 2 queries"):
        scores(layer_of([0.5, 0.5]), SPANS)
