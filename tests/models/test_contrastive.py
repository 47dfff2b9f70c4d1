"""The contrastive model: its towers, what they share, its scale, and the checks of its config."""

import math

import pytest
import torch

from diffmm.models import (
    AudioConfig,
    AudioModel,
    BackboneConfig,
    ContrastiveConfig,
    ContrastiveModel,
    ImageConfig,
    ImageModel,
    TextTower,
    TextTowerConfig,
)
from diffmm.models.contrastive import ZeroShotClassifier
from diffmm.models.weights import load_model, load_weights, own_weights, save_model


def backbone(rope, **changes):
    return BackboneConfig(**{"dim": 32, "depth": 2, "num_heads": 4, "init_std": 0.1} | changes,
                          rope=rope)  # fmt: skip


def image(**changes):
    return ImageConfig(backbone=backbone("2d", **changes), image_size=8, patch_size=4)


def audio(**changes):
    return AudioConfig(
        backbone=backbone("2d", **changes),
        sample_rate_hz=4000,
        num_mels=8,
        window_seconds=0.064,
        hop_seconds=0.032,
        patch_size=(2, 4),
    )


def text(pool="eos", **changes):
    is_mean = pool == "mean"
    return TextTowerConfig(
        vocab_size=30,
        max_length=8,
        backbone=backbone("none", **changes),
        pool=pool,
        causal=not is_mean,
        eos_id=None if is_mean else 2,
    )


def config(towers=("image",), **changes):
    media = {"image": image(), "audio": audio()}
    given = {"text": text(), "embed_dim": 10, **{name: media[name] for name in towers}}
    return ContrastiveConfig(**given | changes)


TOKENS = torch.tensor([[4, 9, 2, 2, 2, 2], [1, 3, 8, 9, 4, 2], [5, 2, 2, 2, 2, 2]])
NUM_TOKENS = torch.tensor([3, 6, 2])
MEDIA = {"image": (3, 3, 8, 8), "audio": (3, 2000)}


@pytest.mark.parametrize("towers", [("image",), ("audio",), ("image", "audio")])
@pytest.mark.parametrize("shared_blocks", [0, 1, 2])
def test_each_modality_has_unit_embeddings_and_all_weights_have_gradients(towers, shared_blocks):
    model = ContrastiveModel(config(towers, shared_blocks=shared_blocks, init_bias=-10.0))
    total = 0.0
    for name in towers:
        media = torch.randn(MEDIA[name])
        found = model(TOKENS, NUM_TOKENS, media)
        for embeddings in (found.media, found.texts):
            assert embeddings.shape == (3, 10)
            torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
        assert torch.equal(found.media, getattr(model, f"encode_{name}")(media))
        assert torch.equal(found.texts, model.encode_text(TOKENS, NUM_TOKENS))
        total = total + (found.scale * found.media @ found.texts.T + found.bias).square().sum()
    total.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert found.scale.item() == pytest.approx(1 / 0.07)
    assert found.bias.item() == -10.0


@pytest.mark.parametrize("pool", ["eos", "mean"])
def test_the_switch_of_text_encoders(pool):
    """Causal with the end of the text, or bidirectional with the mean: the first token sees the
    last one, or does not."""
    model = ContrastiveModel(config(text=text(pool)))
    features = model.text.forward_features(TOKENS[1:2], NUM_TOKENS[1:2])
    features[0, 0].sum().backward(inputs=[model.text.embedding.weight])
    assert model.text.embedding.weight.grad[4].any() == (pool == "mean")


@pytest.mark.parametrize("shared_blocks", [0, 1, 2])
def test_shared_blocks_are_the_last_ones_and_are_saved_once(shared_blocks, tmp_path):
    model = ContrastiveModel(config(("image", "audio"), shared_blocks=shared_blocks)).eval()
    loaded = load_model(save_model(model, tmp_path / "model.safetensors"))
    for each in (model, loaded):
        first, *others = (tower.backbone.blocks for tower in each.towers.values())
        for blocks in others:
            same = [block is other for block, other in zip(blocks, first, strict=True)]
            assert same == [index >= 2 - shared_blocks for index in range(2)]
    names = [name for name in own_weights(model) if ".blocks." in name]
    assert {name.split(".")[0] for name in names if ".blocks.1." in name} == (
        {"image"} if shared_blocks else {"image", "audio", "text"}
    )
    num_blocks = len({name.split(".blocks.")[0] + name.split(".")[3] for name in names})
    assert num_blocks == 6 - 2 * shared_blocks
    for name, shape in MEDIA.items():
        media = torch.randn(shape)
        for found, expected in zip(
            loaded(TOKENS, NUM_TOKENS, media), model(TOKENS, NUM_TOKENS, media), strict=True
        ):
            assert found is expected is None or torch.equal(found, expected), name


def test_towers_of_other_depths_share_their_last_blocks():
    model = ContrastiveModel(config(text=text(depth=3), shared_blocks=2))
    assert model.text.backbone.blocks[1] is model.image.backbone.blocks[0]
    assert model.text.backbone.blocks[2] is model.image.backbone.blocks[1]
    assert model(TOKENS, NUM_TOKENS, torch.randn(3, 3, 8, 8)).texts.shape == (3, 10)


def test_a_tower_takes_the_weights_of_a_model_of_its_kind(tmp_path):
    settings = {"backbone": backbone("2d"), "image_size": 8, "patch_size": 4}
    classifier = ImageModel(ImageConfig(**settings, num_classes=7))
    save_model(classifier, tmp_path)
    model = ContrastiveModel(config())
    head = model.image.head.weight.clone()
    skipped = load_weights(model.image, tmp_path, skip_head=True)
    assert skipped == ["head.weight"]
    assert torch.equal(model.image.head.weight, head)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.image.forward_features(images), classifier.forward_features(images))


@pytest.mark.parametrize("shared_blocks", [0, 1])
def test_a_model_takes_the_weights_of_a_tower_of_its_kind(shared_blocks, tmp_path):
    """Also blocks that are saved as those of another tower."""
    model = ContrastiveModel(config(shared_blocks=shared_blocks))
    save_model(model, tmp_path)
    found = TextTower(model.config.text)
    assert load_weights(found, tmp_path) == []
    assert torch.equal(found(TOKENS, NUM_TOKENS), model.text(TOKENS, NUM_TOKENS))
    settings = {"backbone": backbone("2d"), "image_size": 8, "patch_size": 4}
    classifier = ImageModel(ImageConfig(**settings, num_classes=7))
    load_weights(classifier, tmp_path, skip_head=True)
    images = torch.randn(2, 3, 8, 8)
    features = model.image.forward_features(images)
    assert torch.equal(classifier.forward_features(images), features)
    with pytest.raises(ValueError, match="whose towers are ImageModel, TextTower, not AudioModel"):
        load_weights(AudioModel(audio()), tmp_path)
    other = TextTower(text(norm="zero_centered_rmsnorm"))
    with pytest.raises(ValueError, match="has another architecture: norm 'rmsnorm', needed 'zero"):
        load_weights(other, tmp_path)


def test_weights_of_another_meaning_are_refused(tmp_path):
    save_model(ContrastiveModel(config()), tmp_path)
    other = ContrastiveModel(config(text=text(num_kv_heads=4, head_dim=8, qk_norm=False)))
    assert load_weights(other, tmp_path) == []
    other = ContrastiveModel(config(text=text(norm="zero_centered_rmsnorm")))
    with pytest.raises(ValueError, match="has another architecture: norm 'rmsnorm', needed 'zero"):
        load_weights(other, tmp_path)


def test_the_scale_is_limited():
    model = ContrastiveModel(config(max_scale=20.0))
    with torch.no_grad():
        model.logit_scale.fill_(5.0)
    model.limit_scale()
    assert model.scale.item() == pytest.approx(20.0)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(3.0))
    model.limit_scale()
    assert model.scale.item() == pytest.approx(3.0)


@pytest.mark.parametrize("init_bias", [None, -2.0])
def test_zero_shot_logits_are_scaled_similarities(init_bias):
    model = ContrastiveModel(config(("image", "audio"), init_bias=init_bias))
    classes = model.encode_text(TOKENS, NUM_TOKENS)
    for name, shape in MEDIA.items():
        classifier, media = ZeroShotClassifier(model, classes, name), torch.randn(shape)
        assert classifier.num_classes == 3
        found = model(TOKENS, NUM_TOKENS, media)
        expected = found.media @ found.texts.T / 0.07 + (init_bias or 0.0)
        torch.testing.assert_close(classifier(media), expected)
        assert classifier.input_fields == getattr(model, name).input_fields


def test_a_missing_tower_is_named():
    with pytest.raises(ValueError, match="no audio tower: it embeds images and texts"):
        ContrastiveModel(config())(TOKENS, NUM_TOKENS, torch.randn(3, 2000))
    with pytest.raises(ValueError, match="no image tower: it embeds sounds and texts"):
        ContrastiveModel(config(("audio",)))(TOKENS, NUM_TOKENS, torch.randn(3, 3, 8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "a contrastive model needs an image or an audio tower"),
        ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
        ({"init_temperature": 0.0}, "init_temperature must be positive, got 0.0"),
        ({"max_scale": 10.0}, r"max_scale must be at least 1 / init_temperature = 14.2857, got 10"),
        ({"shared_blocks": 3}, "shared_blocks must be between 0 and 2, .* got 3"),
        (
            {"shared_blocks": 1, "text": text(num_heads=2)},
            "needs blocks of equal settings, but num_heads is 4 in image and 2 in text",
        ),
        (
            {"shared_blocks": 1, "text": text(window=4)},
            "needs blocks of equal settings, but window is None in image and 4 in text",
        ),
        (
            {"text": TextTowerConfig(30, 8, backbone("none"), num_outputs=5)},
            "text.num_outputs must be embed_dim=10, or 0 for a new projection, got 5",
        ),
        (
            {"image": ImageConfig(backbone=backbone("2d"), image_size=8, patch_size=4,
                                  num_classes=7)},
            "image.num_classes must be embed_dim=10, or 0 for a new projection, got 7",
        ),
    ],
)  # fmt: skip
def test_the_config_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
