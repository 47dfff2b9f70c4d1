"""Quantization rounds as specified, and leaves the model as it was."""

import pytest
import torch
from constructed_maps import layer_of
from torch import nn

import diffmm
from diffmm.analysis.quantization import (
    MapErrorMeter,
    absmax,
    largest_logits,
    map_errors,
    quantization_effects,
    quantized_attention,
    quantized_linears,
)
from diffmm.layers.attention import ATTENTIONS
from diffmm.ops import AttentionMask


def text_model(attention="diff_v1"):
    ratio = {"signal_per_noise": 2} if attention == "diff_grouped" else {}
    backbone = diffmm.BackboneConfig(
        dim=32,
        depth=2,
        num_heads=4,
        num_kv_heads=2,
        attention=attention,
        rope="1d",
        init_std=0.3,
        **ratio,
    )
    return diffmm.TextModel(diffmm.models.TextConfig(40, 16, backbone)).eval()


def test_absmax():
    values = torch.tensor([-3.0, 0.0, 0.4, 1.6])
    assert absmax(values, 3, torch.tensor(3.0)).tolist() == [-3.0, 0.0, 0.0, 2.0]
    assert absmax(torch.zeros(2), 8, torch.zeros(())).tolist() == [0.0, 0.0]
    many = absmax(torch.randn(1000), 4, torch.tensor(5.0))
    assert len(many.unique()) <= 2**4 - 1
    for bits in (1, 17):
        with pytest.raises(ValueError, match=f"bits must be from 2 to 16, got {bits}"):
            absmax(values, bits, torch.tensor(1.0))


def test_the_step_is_that_of_visible_logits_of_both_maps():
    mask = AttentionMask(causal=True, key_padding=torch.tensor([[True, True, False]]))
    layer = layer_of([0.5, 0.25, 1e-9], [0.5, 0.0625, 1e-9], lam=0.0, mask=mask)
    assert float(largest_logits(layer, max_bytes=1)) == pytest.approx(2.7725887)  # log 16


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_many_bits_change_nothing_and_few_do(attention):
    model, tokens = text_model(attention), torch.randint(40, (2, 9))
    mask = AttentionMask(causal=True, key_padding=torch.arange(9) < torch.tensor([[9], [6]]))
    with torch.no_grad():
        exact = model(tokens, mask=mask)
        with quantized_attention(model, 16, max_bytes=1):
            close = model(tokens, mask=mask)
        with quantized_attention(model, 3):
            coarse = model(tokens, mask=mask)
        assert torch.equal(model(tokens, mask=mask), exact)
    torch.testing.assert_close(close[0], exact[0], rtol=1e-2, atol=1e-2)
    assert (coarse[0] - exact[0]).abs().max() > 10.0 * (close[0] - exact[0]).abs().max()
    assert not any("attend" in vars(part) for part in model.modules())


def test_the_model_is_restored_after_an_error():
    model = text_model()
    with pytest.raises(RuntimeError, match="boom"), quantized_attention(model, 8):
        raise RuntimeError("boom")
    with pytest.raises(RuntimeError, match="boom"), quantized_linears(model, 8):
        raise RuntimeError("boom")
    assert not any(vars(part).keys() & {"attend", "forward"} for part in model.modules())


def linear_in_a_block(weight):
    block = text_model().backbone.blocks[0]
    layer = block.attention.out_proj = nn.Linear(weight.shape[1], len(weight), bias=True)
    layer.weight.data = weight
    return block, layer


def test_linear_layers_multiply_integers_but_for_outliers():
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.25, 0.75, -3.0]])
    block, layer = linear_in_a_block(weight)
    x = torch.tensor([[0.1, 20.0, 0.3], [0.2, 1.0, -0.4]])
    with quantized_linears(block, 8, threshold=6.0) as count:
        found = layer(x)
    # Column 1 is apart. Steps are 0.3 and 0.4 (tokens), 1 and 3 (outputs), all divided by 127.
    tokens = torch.tensor([[42.0, 127.0], [64.0, -127.0]]) * torch.tensor([[0.3], [0.4]]) / 127
    outputs = torch.tensor([[127.0, 64.0], [11.0, -127.0]]) * torch.tensor([[1.0], [3.0]]) / 127
    expected = tokens @ outputs.T + x[:, 1:2] @ weight[:, 1:2].T + layer.bias
    torch.testing.assert_close(found, expected)
    assert (count.outliers, count.total, count.share) == (1, 3, pytest.approx(1 / 3))
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias)


def test_a_decomposition_saves_what_an_outlier_spoils():
    torch.manual_seed(1)
    block, layer = linear_in_a_block(torch.randn(8, 16))
    x = torch.randn(5, 16)
    x[:, 3] *= 100.0
    errors = []
    for threshold in (None, 6.0):
        with quantized_linears(block, 8, threshold=threshold):
            errors.append(float((layer(x) - (x @ layer.weight.T + layer.bias)).abs().mean()))
    assert errors[1] < 0.1 * errors[0]


def test_fewer_bits_make_larger_errors_of_maps():
    errors = map_errors(text_model("diff_v2"), torch.randint(40, (2, 9)), max_bytes=1)
    assert len(errors) == 2
    for layer in errors:
        assert (layer.errors[4] > layer.errors[6]).all()
        assert (layer.errors[6] > layer.errors[8]).all()
    # Two bits round the logits (0, 0.4, 1) to (0, 0, 1); lambda 0.5 takes from all keys alike.
    logits, uniform = torch.tensor([0.0, 0.4, 1.0]), [1.0] * 3
    meter = MapErrorMeter(bits=(2,))
    meter.add(layer_of(logits.exp(), uniform, lam=0.5))
    exact, rounded = logits.softmax(0), torch.tensor([0.0, 0.0, 1.0]).softmax(0)
    change = (rounded - exact).abs().sum() / (exact - 0.5 / 3).abs().sum()
    assert float(meter.layers()[0].errors[2]) == pytest.approx(float(change), rel=1e-5)
    exact = MapErrorMeter(bits=(2,))
    exact.add(layer_of([0.25, 1.0, 4.0]))  # logits -x, 0, x are exact with three values
    assert float(exact.layers()[0].errors[2]) == pytest.approx(0.0, abs=1e-9)


def test_effects_of_all_methods():
    model, tokens = text_model("softmax"), torch.randint(40, (4, 16))

    def evaluate():
        with torch.no_grad():
            losses = model(tokens[:, :-1], targets=tokens[:, 1:])
        return {"loss": float(losses.total)}

    effects = quantization_effects(model, evaluate, bits=(8, 3), threshold=2.5)
    assert [(effect.method, effect.bits) for effect in effects] == [
        ("nothing", None),
        *(
            (method, bits)
            for method in ("attention logits", "linear layers", "linear layers but outliers")
            for bits in (8, 3)
        ),
    ]
    assert len({effect.metrics["loss"] for effect in effects}) == 7
    assert 0.0 < effects[-1].outlier_columns < 1.0
    assert effects[1].outlier_columns is None
    assert evaluate() == effects[0].metrics


@pytest.mark.parametrize(
    ("quantized", "message"),
    [
        (lambda: quantized_attention(nn.Linear(2, 2), 8), "Linear contains no attention layer"),
        (lambda: quantized_attention(text_model(), 1), "bits must be from 2 to 16, got 1"),
        (lambda: quantized_linears(nn.Linear(2, 2)), "Linear has no linear layers in blocks"),
        (lambda: quantized_linears(text_model(), 40), "bits must be from 2 to 16, got 40"),
        (
            lambda: quantized_linears(text_model(), threshold=-1.0),
            "threshold must be at least 0, got -1.0",
        ),
    ],
)
def test_what_cannot_be_quantized_is_refused(quantized, message):
    with pytest.raises(ValueError, match=message), quantized():
        pass
