"""Calibration by position: its equation, and the model during and after it."""

import pytest
import torch

from diffmm.analysis.attention_maps import attention_maps
from diffmm.analysis.position_calibration import calibrate, calibrated, position_bias
from diffmm.models import BackboneConfig, TextConfig, TextModel
from diffmm.ops import AttentionMask

TOKENS = 9
ROWS = torch.tensor([6, 8])
CONTEXT = torch.tensor([0, 1, 2, 3, 4, 5, -1, -1, -1])


def text_model(attention="softmax", depth=2):
    backbone = BackboneConfig(32, depth, 4, num_kv_heads=2, rope="1d", attention=attention)
    return TextModel(TextConfig(40, 16, backbone)).eval()


def some_tokens(batch=2, length=TOKENS):
    return torch.randint(40, (batch, length))


def weights_of(*rows):
    return torch.tensor(rows)[None, None]  # one sample and head


def test_attention_beyond_the_bias_decides():
    """The beginning has most attention, but not more than its position explains."""
    weights = weights_of([0.5, 0.1, 0.2, 0.2])
    bias = torch.tensor([[[0.5, 0.05, 0.25, 0.2]]])
    documents = torch.tensor([0, 1, 2, -1])
    found = calibrate(weights, bias, documents, 0.05)
    alpha = torch.tensor([0.0, 1.0, -1.0]).softmax(0)
    torch.testing.assert_close(found[0, 0, 0, :3], 0.8 * alpha)
    assert found[0, 0, 0, 3] == weights[0, 0, 0, 3]
    sharp = calibrate(weights, bias, documents, 1e-4)
    torch.testing.assert_close(sharp, weights_of([0.0, 0.8, 0.0, 0.2]))
    flat = calibrate(weights, bias, documents, 1e6)
    torch.testing.assert_close(flat[0, 0, 0, :3], torch.full((3,), 0.8 / 3))


def test_documents_of_several_tokens_keep_their_inner_distribution():
    """Relevance is a mean per token: 0.35 - 0.3 and 0.1 - 0.15; the second sample has one
    document, which keeps its weights."""
    weights = weights_of([0.6, 0.1, 0.1, 0.2]).expand(2, 1, 1, 4)
    bias = torch.tensor([[[0.3, 0.3, 0.15, 0.2]]])
    documents = torch.tensor([[0, 0, 1, -1], [0, 0, 0, -1]])
    found = calibrate(weights, bias, documents, 0.1)
    alpha = torch.tensor([0.05, -0.05]).div(0.1).softmax(0)
    expected = torch.tensor([0.8 * alpha[0] * 6 / 7, 0.8 * alpha[0] / 7, 0.8 * alpha[1], 0.2])
    torch.testing.assert_close(found[0, 0, 0], expected)
    torch.testing.assert_close(found[1], weights[1])


def test_a_document_without_attention_gets_it_uniformly():
    weights = weights_of([0.0, 0.0, 0.8, 0.2])
    bias = torch.tensor([[[0.0, 0.0, 0.8, 0.0]]])
    found = calibrate(weights, bias, torch.tensor([0, 0, 1, -1]), 1.0)
    torch.testing.assert_close(found, weights_of([0.2, 0.2, 0.4, 0.2]))


def test_the_bias_is_the_mean_over_dummies():
    model, dummies = text_model(), [some_tokens(3), some_tokens(1)]
    bias = position_bias(model, dummies, rows=ROWS, max_bytes=1)
    torch.testing.assert_close(position_bias(model, dummies, rows=ROWS).layers, bias.layers)
    for layer in attention_maps(model, torch.cat(dummies)):
        expected = layer.combined[:, :, ROWS].mean(dim=0)
        torch.testing.assert_close(bias.layers[layer.name], expected)


def reference(model, tokens, bias, name, temperature):
    """Heads of the layer with calibrated rows, from its whole maps."""
    layer = model.get_submodule(name)
    inputs = []
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append((args[0], kwargs["rope"])), with_kwargs=True
    )
    before = attention_maps(model, tokens)
    handle.remove()
    ((x, rope),) = inputs
    v = layer.project(x, rope)[2].transpose(1, 2).repeat_interleave(2, dim=1)
    weights = next(each.combined for each in before if each.name == name).clone()
    own = bias.layers[name]
    weights[:, :, ROWS] = calibrate(weights[:, :, ROWS], own, CONTEXT, temperature)
    return layer.out_proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("max_bytes", [None, 1])
def test_the_last_layer_is_calibrated_and_the_model_is_unchanged_afterwards(max_bytes):
    model, tokens = text_model(), some_tokens()
    bias = position_bias(model, [some_tokens(4)], rows=ROWS)
    name = "backbone.blocks.1.attention"
    settings = {"documents": CONTEXT, "temperature": 0.02, "max_bytes": max_bytes}
    outputs = []
    with torch.no_grad():
        before = model(tokens)
        expected = reference(model, tokens, bias, name, 0.02)
        handle = model.get_submodule(name).register_forward_hook(
            lambda layer, args, out: outputs.append(out)
        )
        with calibrated(model, bias, **settings):
            during = model(tokens)
        handle.remove()
        torch.testing.assert_close(outputs[0], expected)
        others = [row for row in range(TOKENS) if row not in ROWS]
        torch.testing.assert_close(during[:, others], before[:, others])
        assert (during[:, ROWS] - before[:, ROWS]).abs().max() > 1e-4
        assert torch.equal(model(tokens), before)
    assert "attend" not in vars(model.get_submodule(name))


def test_the_model_is_unchanged_after_an_error_and_layers_can_be_chosen():
    model, tokens = text_model(depth=3), some_tokens()
    bias = position_bias(model, [some_tokens()], rows=ROWS)

    def replaced():
        return [n for n, part in model.named_modules() if "attend" in vars(part)]

    def inside(**settings):
        with calibrated(model, bias, documents=CONTEXT, temperature=1.0, **settings):
            names = replaced()
            with pytest.raises(ValueError, match="the bias is of 9 tokens, got 8 queries"):
                model(tokens[:, :8])
        return names

    assert len(inside(num_layers=3)) == 3
    assert inside() == ["backbone.blocks.1.attention", "backbone.blocks.2.attention"]
    assert replaced() == []


def test_refusals():
    model = text_model()
    bias = position_bias(model, [some_tokens()], rows=ROWS)
    with pytest.raises(ValueError, match="needs softmax attention, but .*DiffAttentionV2"):
        position_bias(text_model("diff_v2"), [some_tokens()], rows=ROWS)
    with pytest.raises(ValueError, match="contains no attention layer"):
        position_bias(torch.nn.Linear(2, 2), [some_tokens()], rows=ROWS)
    with pytest.raises(ValueError, match="dummies is empty"):
        position_bias(model, [], rows=ROWS)
    with pytest.raises(ValueError, match="one length, got 9 and 8"):
        position_bias(model, [some_tokens(), some_tokens(length=8)], rows=ROWS)
    for rows in ([9], [-1], []):
        with pytest.raises(ValueError, match="rows must be queries in 0:9"):
            position_bias(model, [some_tokens()], rows=torch.tensor(rows))

    def enter(other=model, **changes):
        settings = {"documents": CONTEXT, "temperature": 1.0, **changes}
        with calibrated(other, bias, **settings):
            other(some_tokens(), mask=AttentionMask(causal=True, window=3))

    with pytest.raises(ValueError, match="needs the mask AttentionMask.*window=3"):
        enter()
    with pytest.raises(ValueError, match=r"num_layers must be in \[1, 2\], got 3"):
        enter(num_layers=3)
    with pytest.raises(ValueError, match="temperature must be positive, got 0.0"):
        enter(temperature=0.0)
    with pytest.raises(ValueError, match="measure the bias of this model"):
        enter(text_model(depth=1))
    with pytest.raises(ValueError, match="every sample needs one"):
        enter(documents=torch.full((2, 9), -1))
    with pytest.raises(ValueError, match="query 6 does not see all documents.* 7"):
        enter(documents=torch.tensor([0] * 8 + [-1]))
    with pytest.raises(ValueError, match="documents must be from 0"):
        enter(documents=CONTEXT - 1)
