"""Differential models with the outputs of a softmax model, and gradients for all they have."""

import pytest
import torch
from torch import nn

import diffmm
from diffmm.interop.upcycle import merged, upcycle
from diffmm.models import TextConfig, TextModel
from diffmm.models.job import Job

TOKENS = torch.arange(24).view(2, 12) % 9
SHAPES = {
    "plain": {},
    "grouped keys": {"num_kv_heads": 2},
    "biases, norms": {"qkv_bias": True, "out_bias": True, "qk_norm": True, "num_kv_heads": 4},
    "wide heads": {"head_dim": 12, "num_kv_heads": 1},
    "other options": {"qk_norm": "layernorm", "attention_scale": 0.4, "window": 5, "norm_eps": 0.1},
    "gates": {"output_gate": "element", "num_kv_heads": 4},
    "softcap": {"attention_softcap": 5.0, "exclusive": True},
    "cosine": {"cosine_logits": True, "output_gate": "head"},
}
TARGETS = [("diff_v1", 1), ("diff_v2", 1), ("diff_grouped", 1), ("diff_grouped", 2)]
TARGETS += [("diff_grouped", 4), ("dex", 1)]


def softmax_model(**settings):
    settings = {"dim": 32, "depth": 2, "num_heads": 8, "rope": "1d", **settings}
    backbone = diffmm.BackboneConfig(attention="softmax", **settings)
    model = TextModel(TextConfig(9, 12, backbone)).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


CASES = [
    (shape, *target)
    for shape, settings in SHAPES.items()
    for target in TARGETS
    if 8 // settings.get("num_kv_heads", 8) % target[1] == 0  # see below for the others
    and (shape != "gates" or target[1] == 1)
    and (shape not in ("softcap", "cosine") or target[0] == "dex")
]


@pytest.mark.parametrize(("shape", "attention", "signal_per_noise"), CASES)
def test_the_outputs_are_the_same_and_everything_learns(shape, attention, signal_per_noise):
    settings = SHAPES[shape]
    model = softmax_model(**settings)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    twin = upcycle(model, attention, signal_per_noise=signal_per_noise)
    labels = {layer.label for layer in twin.backbone.attentions}
    assert (labels == {"softmax"}) == twin.config.backbone.dex == (attention == "dex")
    expected, found = model(TOKENS), twin(TOKENS)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    found.square().mean().backward()
    largest = {name: parameter.grad.abs().max() for name, parameter in twin.named_parameters()}
    assert all(size > 0.0 for size in largest.values()), largest
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_maps_separate():
    """Gradients of both queries point in opposite directions, that of the first is twice as
    large."""
    twin = upcycle(softmax_model(), "diff_v2")
    twin(TOKENS).square().mean().backward()
    layer = twin.backbone.attentions[1]
    signal, noise = layer.q_proj.weight.grad.unflatten(0, layer.q_shape).unbind(dim=1)
    assert torch.allclose(signal, -2.0 * noise, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
@pytest.mark.parametrize(
    "recipe", ["image/digits_tiny", "audio/sound_events_tiny", "image/digits_mae_tiny"]
)
def test_other_modalities(recipe, attention):
    model = diffmm.create_model(recipe, attention="softmax").eval()
    model.job = Job(recipe=recipe)
    twin = upcycle(model, attention)
    assert twin.job == model.job
    assert not twin.training
    inputs = torch.rand(2, 8000) if "audio" in recipe else torch.rand(2, 1, 8, 8)
    outputs = []
    for each in (model, twin):
        torch.manual_seed(0)  # masked patches
        found = each(inputs)
        outputs.append(found if isinstance(found, torch.Tensor) else found[0])
    assert torch.allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize("media", ["prefix", "cross_attention"])
@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
def test_captions(attention, media):
    recipe = "image_text/shapes_captions_tiny"
    model = diffmm.create_model(recipe, attention="softmax", media=media).eval()
    twin = upcycle(model, attention)
    assert twin.config.media == media
    inputs = torch.randint(256, (2, 7)), torch.randn(2, 3, 48, 48)
    assert torch.allclose(twin(*inputs), model(*inputs), atol=1e-5)


@pytest.mark.parametrize(
    "shape", ["plain", "grouped keys", "biases, norms", "wide heads", "cosine"]
)
def test_the_output_projection_takes_over_what_dex_has_learned(shape):
    twin = upcycle(softmax_model(**SHAPES[shape]), "dex")
    for layer in twin.backbone.attentions:
        nn.init.normal_(layer.head_projections.weight)
        nn.init.normal_(layer.head_projections.lambda_per_head)
    plain = merged(twin)
    assert not plain.config.backbone.dex
    assert not any("head_projections" in name for name in plain.state_dict())
    expected = twin(TOKENS)
    assert (plain(TOKENS) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_cannot_be_merged():
    with pytest.raises(ValueError, match=r"^backbone\.blocks\.0\.attention has no dex that"):
        merged(softmax_model())
    with pytest.raises(
        ValueError, match="has output_gate='element', which follows the projections"
    ):
        merged(upcycle(softmax_model(**SHAPES["gates"]), "dex"))


def test_seeds():
    model = softmax_model()
    first, again, other = (upcycle(model, "diff_v1", seed=seed) for seed in (0, 0, 1))
    weights = [each.backbone.attentions[0].v_proj.weight for each in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("settings", "attention", "message"),
    [
        ({"cosine_logits": True}, "diff_v2", "attention has cosine_logits, with which diff_v2"),
        ({"exclusive": True}, "diff_v1", "has exclusive, with which diff_v1 cannot"),
        ({"output_gate": "head", "num_kv_heads": 2}, "diff_grouped", "has output_gate"),
        ({}, "diff_grouped", "must divide the 1 query head.s. per key head .* got 4"),
        ({"attention_softcap": 5.0}, "diff_v2", "attention_softcap"),
        ({}, "softmax", "attention must be one of"),
    ],
)
def test_what_cannot_be_the_same(settings, attention, message):
    with pytest.raises(ValueError, match=message):
        upcycle(softmax_model(**settings), attention)


def test_other_models():
    with pytest.raises(ValueError, match="is DiffAttentionV2: only models with softmax"):
        upcycle(upcycle(softmax_model(), "diff_v2"), "diff_v1")
    for attention in ("dex", "diff_v2"):
        with pytest.raises(ValueError, match="already has dex: make it plain softmax first, with"):
            upcycle(upcycle(softmax_model(), "dex"), attention)
    with pytest.raises(ValueError, match="has no dex"):
        merged(upcycle(softmax_model(), "diff_v2"))
    with pytest.raises(ValueError, match="Linear has no description"):
        upcycle(nn.Linear(2, 2), "diff_v1")
