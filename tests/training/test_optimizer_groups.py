"""Weight decay and learning rates of parameter groups."""

import pytest
import torch

from diffmm.models import TextConfig, TextModel
from diffmm.training import OptimizerConfig
from diffmm.training.optimizer import layer_of, make_optimizer, parameter_groups

EXEMPT = (
    "norm", "bias", "lambda_", "embedding.weight", "positions", "cls_token", "reg_token",
    "mask_token", "logit_scale", "branch.scale",
)  # fmt: skip


def models(make, attention, **changes):
    changes = {"layer_scale": 1e-2, "qkv_bias": True, "qk_norm": True, **changes}
    return {
        "text": make.text(attention, **changes),
        "image": make.image(attention, **changes),
        "audio": make.audio(attention, **changes),
        "autoencoder": make.autoencoder(attention, **changes),
    }


def by_name(model, config):
    """The group of each trainable parameter, by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    return found


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2"])
@pytest.mark.parametrize("kind", ["text", "image", "audio", "autoencoder"])
def test_matrices_decay_and_nothing_else(kind, attention, make):
    model = models(make, attention)[kind]
    groups = by_name(model, OptimizerConfig(1e-3, weight_decay=0.3))
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        # A patch embedding is a convolution; an nn.Embedding is a table.
        table = name == "embedding.weight"
        exempt = any(word in name for word in EXEMPT if word != "embedding.weight") or table
        assert groups[name]["weight_decay"] == (0.0 if exempt else 0.3), name
        assert exempt or parameter.ndim >= 2, name
        assert groups[name]["lr"] == 1e-3


def test_scales_of_cosines_and_projections_of_heads_do_not_decay(make):
    model = make.image("softmax", cosine_logits=True, dex=True)
    groups = by_name(model, OptimizerConfig(1e-3, weight_decay=0.3))
    exempt = [name for name in groups if name.endswith("logit_scale") or "head_projections" in name]
    assert len(exempt) == 6
    assert all(groups[name]["weight_decay"] == 0.0 for name in exempt)


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2"])
def test_lambda_learns_at_its_own_rate(attention, make):
    config = OptimizerConfig(1e-3, lambda_learning_rate=5e-3)
    for model in models(make, attention).values():
        for name, group in by_name(model, config).items():
            assert group["lr"] == (5e-3 if "lambda_" in name else 1e-3), name
            assert (group["name"] == "lambda") == ("lambda_" in name)


def test_tied_embeddings_are_embeddings(make):
    config = make.text().config
    model = TextModel(TextConfig(config.vocab_size, 32, config.backbone, tie_embeddings=True))
    head_first = torch.nn.Module()
    head_first.head, head_first.embedding = torch.nn.Linear(4, 9), torch.nn.Embedding(9, 4)
    head_first.head.weight = head_first.embedding.weight
    for tied, name in ((model, "embedding.weight"), (head_first, "head.weight")):
        groups = by_name(tied, OptimizerConfig(1e-3))
        assert len({"embedding.weight", "head.weight"} & groups.keys()) == 1
        assert groups[name]["weight_decay"] == 0.0


@pytest.mark.parametrize("kind", ["text", "image", "audio"])
def test_layers_learn_slower_the_lower_they_are(kind, make):
    model = models(make, "diff_v1")[kind]
    config = OptimizerConfig(1e-2, lambda_learning_rate=1.0, layer_decay=0.5)
    rates = {name: group["lr"] for name, group in by_name(model, config).items()}
    assert rates["head.weight"] == rates["backbone.norm.weight"] == 1e-2
    assert rates["backbone.blocks.1.attention.q_proj.weight"] == 0.5e-2
    assert rates["backbone.blocks.0.feed_forward.up_proj.weight"] == 0.25e-2
    assert rates["backbone.blocks.1.attention.lambda_q1"] == 0.5
    before = {name for name in rates if not name.startswith(("backbone.", "head."))}
    assert before
    assert {rates[name] for name in before} == {0.125e-2}


def test_layers_of_deep_models():
    assert layer_of("backbone.blocks.11.attention.norm.weight", 12) == 12
    assert layer_of("backbone.norm.weight", 12) == layer_of("head.bias", 12) == 13
    assert layer_of("positions.grid", 12) == 0


def test_frozen_parameters_are_left_out(make):
    model = make.image()
    model.backbone.requires_grad_(False)
    assert not any(name.startswith("backbone.") for name in by_name(model, OptimizerConfig(1e-3)))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="ImageModel has no trainable parameter"):
        parameter_groups(model, OptimizerConfig(1e-3))


def test_layer_decay_needs_one_backbone(make):
    with pytest.raises(ValueError, match="MaskedAutoencoder has none: drop layer_decay"):
        parameter_groups(make.autoencoder(), OptimizerConfig(1e-3, layer_decay=0.7))


def test_the_optimizer_takes_the_settings(make):
    config = OptimizerConfig(2e-3, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6)
    optimizer = make_optimizer(make.image(), config)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.8, 0.99), 1e-6)
        assert group["fused"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive and at most 1000, got 0.0"),
        (
            {"lambda_learning_rate": -1.0},
            "lambda_learning_rate must be positive and at most 1000, got -1.0",
        ),
        ({"eps": 0.0}, "eps must be positive"),
        ({"weight_decay": -0.1}, r"weight_decay must be in \[0, 1000\], got -0.1"),
        ({"learning_rate": 1e15}, r"must be positive and at most 1000, got 1000000000000000.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        ({"layer_decay": 1.5}, r"layer_decay must be in \(0, 1\], got 1.5"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**{"learning_rate": 1e-3, **settings})
