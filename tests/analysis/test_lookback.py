"""Lookback ratios have their analytic values, and find the answers that they should."""

import pytest
import torch

from diffmm.analysis.attention_maps import attention_maps
from diffmm.analysis.contexts import ContextBatch, wrong_samples
from diffmm.analysis.lookback import LookbackRatios, detect, lookback_lens, lookback_ratios
from diffmm.batch import IGNORE_INDEX
from diffmm.models import BackboneConfig, TextConfig, TextModel


def text_model(attention="softmax", causal=True):
    backbone = BackboneConfig(32, 2, 4, rope="1d", attention=attention)
    return TextModel(TextConfig(40, 16, backbone, causal=causal)).eval()


def marks(*rows):
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


CONTEXT, QUERIES = marks("xxxx....", ".xx....."), marks("....x..x", "......x.")


def test_uniform_attention_has_a_ratio_of_one_half():
    """The mean weights on the context and on new tokens are equal, however many there are."""
    model = text_model()
    for layer in model.backbone.attentions:
        torch.nn.init.zeros_(layer.q_proj.weight)
    ratios = lookback_ratios(model, torch.randint(40, (2, 8)), context=CONTEXT, queries=QUERIES)
    torch.testing.assert_close(ratios.values, torch.full((2, 8), 0.5).double())
    assert ratios.names[:2] == [f"backbone.blocks.0.attention A head {head}" for head in range(2)]
    assert ratios.names[-1] == "backbone.blocks.1.attention A head 3"


@pytest.mark.parametrize("max_bytes", [None, 1])
@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2"])
def test_ratios_are_those_of_the_maps(attention, max_bytes):
    """Of both maps in differential attention. In sample 1, token 0 is neither context nor new."""
    model, tokens = text_model(attention), torch.randint(40, (2, 8))
    found = lookback_ratios(model, tokens, context=CONTEXT, queries=QUERIES, max_bytes=max_bytes)
    expected = []
    for layer in attention_maps(model, tokens):
        for a in layer.components:
            rows = []
            for old, new in (
                (a[0, :, 4, :4].mean(-1), a[0, :, 4, 4:5].mean(-1)),
                (a[0, :, 7, :4].mean(-1), a[0, :, 7, 4:8].mean(-1)),
                (a[1, :, 6, 1:3].mean(-1), a[1, :, 6, 3:7].mean(-1)),
            ):
                rows.append(old / (old + new))
            expected.append(torch.stack([(rows[0] + rows[1]) / 2, rows[2]]))
    torch.testing.assert_close(
        found.values, torch.cat(expected, dim=1).double(), atol=1e-5, rtol=1e-4
    )
    maps = {name.split()[1] for name in found.names}
    assert maps == ({"A"} if attention == "softmax" else {"A1", "A2"})
    assert len(found.names) == found.values.shape[1]


def ratios_of(values):
    return LookbackRatios(torch.as_tensor(values, dtype=torch.float64)[:, None], ["head"])


def test_a_feature_that_tells_wrong_from_right_has_an_auroc_of_one():
    wrong = torch.arange(40) % 2 == 0
    found = detect(ratios_of(torch.where(wrong, 0.2, 0.8)), wrong, num_folds=4)
    assert found.auroc == 1.0
    assert len(found.folds) == 4
    # Less attention to the context means wrong.
    chance = found.detector.predict_proba([[0.2], [0.8]])[:, 1]
    assert chance[0] > 0.5 > chance[1]


def test_a_feature_that_says_nothing_has_an_auroc_of_one_half():
    torch.manual_seed(0)
    wrong = torch.rand(4000) < 0.3
    ratios = ratios_of(torch.rand(4000))
    found = detect(ratios, wrong)
    assert found.auroc == pytest.approx(0.5, abs=0.05)
    assert detect(ratios, wrong).folds == found.folds
    assert detect(ratios, wrong, seed=1).folds != found.folds


def test_wrong_samples_and_the_lens_of_a_model():
    model = text_model("diff_v2")
    torch.manual_seed(1)
    tokens = torch.randint(40, (24, 8))
    targets = torch.full_like(tokens, IGNORE_INDEX)
    with torch.no_grad():
        targets[:, 5:7] = model(tokens).argmax(dim=-1)[:, 5:7]
    targets[::3, 6] = (targets[::3, 6] + 1) % 40
    context = torch.arange(8).expand(24, -1) < 4
    batch = ContextBatch(tokens, targets, context)
    wrong = wrong_samples(model, batch)
    assert wrong.tolist() == [index % 3 == 0 for index in range(24)]
    halves = [
        ContextBatch(*(x[part] for x in vars(batch).values()))
        for part in (slice(12), slice(12, 24))
    ]
    found = lookback_lens(model, halves, num_folds=2, seed=3)
    ratios = lookback_ratios(model, tokens, context=context, queries=batch.is_target)
    again = detect(ratios, wrong, num_folds=2, seed=3)
    assert found.folds == pytest.approx(again.folds)
    assert found.names == ratios.names


def test_refusals():
    model, tokens = text_model(), torch.randint(40, (2, 8))
    with pytest.raises(ValueError, match=r"context must be booleans .*\(2, 8\), got \(2, 7\)"):
        lookback_ratios(model, tokens, context=CONTEXT[:, 1:], queries=QUERIES)
    with pytest.raises(ValueError, match="queries must be booleans .*int64"):
        lookback_ratios(model, tokens, context=CONTEXT, queries=QUERIES.long())
    with pytest.raises(ValueError, match="queries marks no token of sample 1"):
        lookback_ratios(model, tokens, context=CONTEXT, queries=marks("....x...", "........"))
    with pytest.raises(ValueError, match="sees no token after the context"):
        lookback_ratios(model, tokens, context=CONTEXT, queries=marks("...x....", "......x."))
    with pytest.raises(ValueError, match="sees no token of the context"):
        lookback_ratios(model, tokens, context=CONTEXT, queries=marks("....x...", "x......."))
    with pytest.raises(ValueError, match="causal text model, got causal=False"):
        lookback_ratios(text_model(causal=False), tokens, context=CONTEXT, queries=QUERIES)
    wrong = torch.arange(8) < 3
    with pytest.raises(ValueError, match="3 of 8 samples are wrong, but each of 5 folds"):
        detect(ratios_of(torch.rand(8)), wrong)
    with pytest.raises(ValueError, match="2 of 8 samples are right, but each of 5 folds"):
        detect(ratios_of(torch.rand(8)), torch.arange(8) < 6)
    with pytest.raises(ValueError, match="num_folds must be at least 2, got 1"):
        detect(ratios_of(torch.rand(8)), wrong, num_folds=1)
    with pytest.raises(ValueError, match=r"wrong has shape \(7,\), but there are 8 samples"):
        detect(ratios_of(torch.rand(8)), wrong[1:])
    with pytest.raises(ValueError, match="batches is empty"):
        lookback_lens(model, [])
