"""Magnitudes of logits and hidden states equal those of whole tensors."""

import math

import pytest
import torch
from constructed_maps import layer_of
from scipy.stats import kurtosis

import diffmm
from diffmm.analysis.magnitudes import MagnitudeMeter
from diffmm.analysis.outliers import OutlierMeter, outliers
from diffmm.ops import AttentionMask


def test_statistics_of_parts_are_those_of_the_whole():
    values = torch.distributions.StudentT(5.0).sample((3001,)) + 7.0
    meter = MagnitudeMeter(num_top=5)
    for part in values.sort().values.split([1, 700, 2300]):
        meter.add(part)
    meter.add(values[:0])
    found = meter.result()
    assert found.count == 3001
    torch.testing.assert_close(found.top, values.abs().sort(descending=True).values[:5].double())
    assert found.median == pytest.approx(float(values.abs().median()), rel=2**-9)
    assert found.kurtosis == pytest.approx(kurtosis(values.double(), fisher=False), rel=1e-5)


def test_statistics_of_nothing_and_of_one_value():
    nothing = MagnitudeMeter().result()
    assert (nothing.count, len(nothing.top)) == (0, 0)
    assert math.isnan(nothing.median)
    meter = MagnitudeMeter()
    meter.add(torch.zeros(4))
    assert meter.result().median == 0.0
    assert math.isnan(meter.result().kurtosis)


def test_masked_logits_and_padding_do_not_count():
    mask = AttentionMask(causal=True, key_padding=torch.tensor([[True, True, False]]))
    meter = OutlierMeter()
    meter.add_logits(layer_of([0.5, 0.25, 1e-9], [0.125, 0.5, 1e-9], lam=0.0, mask=mask))
    found = meter.result().logits["layer"]
    # Query 0 sees key 0, query 1 keys 0 and 1, in both maps.
    assert found.count == 6
    assert found.top.tolist() == pytest.approx(
        [math.log(8)] * 2 + [math.log(4)] + [math.log(2)] * 3
    )


@pytest.mark.parametrize("attention", ["softmax", "diff_v1"])
def test_a_models_hidden_states_without_padding(attention):
    model = diffmm.create_model("text/stdlib_tiny", attention=attention).eval()
    tokens = torch.randint(256, (2, 9))
    real = torch.arange(9) < torch.tensor([[9], [6]])
    found = outliers(model, tokens, mask=AttentionMask(causal=True, key_padding=real), max_bytes=1)
    assert list(found.logits) == [f"{name}.attention" for name in found.hidden]
    *_, last = found.hidden.values()
    hidden = []
    model.backbone.norm.register_forward_pre_hook(lambda part, args: hidden.append(args[0]))
    with torch.no_grad():
        model(tokens, mask=AttentionMask(causal=True, key_padding=real))
    values = hidden[0][real]
    assert last.count == values.numel()
    assert float(last.top[0]) == pytest.approx(float(values.abs().max()))
    assert not any(part._forward_hooks for part in model.backbone.blocks)
