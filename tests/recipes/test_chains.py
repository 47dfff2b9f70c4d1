"""Recipes that start from the weights of others: masked autoencoders and fine-tuned models."""

import pytest

from diffmm.recipes.catalog import find_recipe, recipe_names
from diffmm.recipes.mistakes import find_mistakes
from diffmm.recipes.settings import load

CHAINS = {
    "image/digits_mae_tiny": "image/digits_tiny",
    "image/imagenet_mae": "image/imagenet_vit_b",
    "audio/sound_events_mae_tiny": "audio/sound_events_tiny",
}
"""Each masked autoencoder, and the classifier that its encoder initializes."""

FINETUNED = {
    "image/imagenet_vit_s": "image/finetune",
    "audio/speech_commands": "audio/finetune",
}
"""Each classifier, and the recipe for a user's own data that its weights initialize."""


def built(name):
    found = find_mistakes({**load([find_recipe(name)]), "run_dir": "runs"})
    assert found.mistakes == []
    return found.model.model


def test_every_masked_autoencoder_starts_a_classifier():
    assert {name for name in recipe_names() if "_mae" in name} == set(CHAINS)


@pytest.mark.parametrize(("first", "then"), [*CHAINS.items(), *FINETUNED.items()])
def test_weights_of_one_fit_the_other(first, then, tmp_path):
    """Names and shapes of the weights, on the meta device, and the settings that give them
    meaning."""
    source, model = built(first), built(then)
    config = getattr(source.config, "encoder", source.config)
    weights = getattr(source, "encoder", source).state_dict()
    expected = model.state_dict()
    assert {n: w.shape for n, w in weights.items() if not n.startswith("head.")} == {
        n: w.shape for n, w in expected.items() if not n.startswith("head.")
    }
    assert (config.cls_token, config.num_reg_tokens) == (
        model.config.cls_token,
        model.config.num_reg_tokens,
    )
    for name in ("attention", "num_heads", "rope", "qk_norm", "norm", "feed_forward"):
        assert getattr(config.backbone, name) == getattr(model.config.backbone, name), name
    for name in ("patch_size", "patch_stride", "log_mel_mean", "log_mel_std", "sample_rate_hz"):
        assert getattr(config, name, None) == getattr(model.config, name, None), name
