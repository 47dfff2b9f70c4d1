"""Masked autoencoding: masked patches are not seen, and padding is not counted."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffmm.models import (
    AudioConfig,
    BackboneConfig,
    ImageConfig,
    ImageModel,
    MaskedAutoencoder,
    MaskedAutoencoderConfig,
)
from diffmm.models.description import build, describe
from diffmm.ops import AttentionMask

ATTENTIONS = ["softmax", "diff_v1", "diff_v2"]
CLIP = 8000


def backbone(rope: str = "2d", **changes: Any) -> BackboneConfig:
    return BackboneConfig(**({"dim": 32, "depth": 2, "num_heads": 4, "rope": rope} | changes))


def image_config(**changes: Any) -> ImageConfig:
    settings: dict[str, Any] = {"image_size": 16, "patch_size": 4, "backbone": backbone()}
    return ImageConfig(**(settings | changes))


def audio_config(**changes: Any) -> AudioConfig:
    settings: dict[str, Any] = {
        "sample_rate_hz": 8000,
        "num_mels": 32,
        "patch_size": 8,
        "backbone": backbone(),
        "clip_seconds": 1.0,
        "num_reg_tokens": 1,
    }
    return AudioConfig(**(settings | changes))


def autoencoder(encoder: ImageConfig | AudioConfig, **changes: Any) -> MaskedAutoencoder:
    settings: dict[str, Any] = {"decoder": backbone(dim=16, depth=1, num_heads=2)} | changes
    return MaskedAutoencoder(MaskedAutoencoderConfig(encoder=encoder, **settings))


def inputs_of(model: MaskedAutoencoder) -> tuple[Tensor, ...]:
    if isinstance(model.encoder, ImageModel):
        return (torch.randn(2, 3, 16, 16),)
    return torch.randn(2, CLIP), torch.tensor([5000, CLIP])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("rope", ["none", "2d"])
@pytest.mark.parametrize("encoder", [image_config(), audio_config()], ids=["image", "audio"])
def test_every_parameter_learns(
    encoder: ImageConfig | AudioConfig, rope: str, attention: str
) -> None:
    model = autoencoder(
        replace(encoder, backbone=backbone(attention=attention)),
        decoder=backbone(rope, dim=16, num_heads=2, attention=attention),
    )
    loss, prediction, mask = model(*inputs_of(model))
    shape = (2, model.encoder.num_patches(*inputs_of(model)))
    assert mask.shape == shape
    assert prediction.shape[:2] == shape
    assert loss.dtype == torch.float32
    assert 0.5 < loss.item() < 2.0  # targets have a variance of one
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.75, 0.9, 0.99])
def test_how_many_are_hidden(ratio: float) -> None:
    mask = autoencoder(image_config(), mask_ratio=ratio)(torch.randn(3, 3, 16, 16)).mask
    hidden = {0.5: 8, 0.7: 11, 0.75: 12, 0.9: 14, 0.99: 15}[ratio]
    assert mask.sum(dim=1).tolist() == [hidden] * 3


def test_the_least_noise_stays_visible() -> None:
    model = autoencoder(image_config())
    noise = torch.rand(2, 16)
    images = torch.randn(2, 3, 16, 16)
    prediction = model(images, noise=noise)
    assert prediction.mask.equal(noise.argsort(dim=1).argsort(dim=1) >= 4)
    again = model(images, noise=noise)
    assert again.loss.equal(prediction.loss)
    torch.manual_seed(3)
    first = model(images).mask
    torch.manual_seed(3)
    assert model(images).mask.equal(first)
    assert not model(images).mask.equal(first)


def test_hidden_patches_are_not_seen() -> None:
    """No prediction has a gradient to masked patches, and the loss is on them only."""
    model = autoencoder(image_config(), normalize_targets=False)
    images, noise = torch.randn(1, 3, 16, 16, requires_grad=True), torch.rand(1, 16)
    loss, prediction, mask = model(images, noise=noise)
    (seen,) = torch.autograd.grad(prediction.square().sum(), images, retain_graph=True)
    by_patch = model.encoder.patchify(seen).abs().sum(dim=-1)
    assert (by_patch[mask] == 0).all()
    assert (by_patch[~mask] > 0).all()
    (to_prediction,) = torch.autograd.grad(loss, prediction)
    by_patch = to_prediction.abs().sum(dim=-1)
    assert (by_patch[mask] > 0).all()
    assert (by_patch[~mask] == 0).all()
    expected = (prediction - model.encoder.patchify(images)).square().mean(dim=-1)[mask].mean()
    torch.testing.assert_close(loss, expected)


def test_each_visible_patch_keeps_its_place() -> None:
    """With all but one patch visible, the prediction is that of an unshuffled decoder."""
    model = autoencoder(image_config(), mask_ratio=1 / 16).eval()
    images, noise = torch.randn(1, 3, 16, 16), torch.rand(1, 16)
    noise[0, 5] = 1.0
    prediction = model(images, noise=noise)
    assert prediction.mask.nonzero().tolist() == [[0, 5]]
    # The order of visible patches does not matter: another noise with the same mask.
    reordered = model(images, noise=torch.cat([noise[:, :5].flip(1), noise[:, 5:]], dim=1))
    torch.testing.assert_close(reordered.prediction, prediction.prediction, rtol=1e-4, atol=1e-5)
    embedded = model.encoder.embed(images)
    keep = [patch for patch in range(16) if patch != 5]
    visible = embedded._replace(tokens=embedded.tokens[:, keep], positions=embedded.positions[keep])
    features = model.decoder_embedding(model.encoder.encode(visible)[0])
    tokens = torch.cat([features[:, :6], model.mask_token.expand(1, 1, -1), features[:, 6:]], dim=1)
    full = model.encoder.with_prefix(embedded._replace(tokens=tokens[:, 1:]), tokens[:, :1])
    decoded = model.decoder(full.tokens, mask=AttentionMask(), positions=full.positions)
    torch.testing.assert_close(
        model.decoder_head(decoded[:, 1:]), prediction.prediction, rtol=1e-4, atol=1e-5
    )


def test_targets_are_normalized_patches() -> None:
    model = autoencoder(image_config())
    images = 3.0 + 5.0 * torch.randn(2, 3, 16, 16)
    targets = model.targets(images)
    torch.testing.assert_close(targets.mean(dim=-1), torch.zeros(2, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(targets.square().mean(dim=-1), torch.ones(2, 16))
    assert model.targets(torch.ones(1, 3, 16, 16)).isfinite().all()


@pytest.mark.parametrize("rope", ["none", "2d"])
def test_padding_is_neither_seen_nor_predicted(rope: str) -> None:
    model = autoencoder(audio_config(), decoder=backbone(rope, dim=16, num_heads=2)).eval()
    clips, lengths = torch.randn(2, CLIP), torch.tensor([3000, CLIP])
    noise = torch.rand(2, model.encoder.num_patches(clips))
    padding = model.encoder.key_padding(clips, lengths)
    num_real = int(padding[0].sum())
    padded = model(clips, lengths, noise=noise)
    alone = model(clips[:1, :3000], noise=noise[:1, :num_real])
    assert not padded.mask[~padding].any()
    assert padded.mask[:1, :num_real].equal(alone.mask)
    torch.testing.assert_close(
        padded.prediction[:1, :num_real], alone.prediction, rtol=1e-4, atol=1e-5
    )
    # The loss is a mean over the masked patches of all clips.
    other = model(clips[1:], noise=noise[1:])
    counts = [alone.mask.sum(), other.mask.sum()]
    expected = (alone.loss * counts[0] + other.loss * counts[1]) / sum(counts)
    torch.testing.assert_close(padded.loss, expected, rtol=1e-4, atol=1e-5)


def test_nothing_to_predict_is_no_loss() -> None:
    model = autoencoder(audio_config(num_mels=8))
    loss, _, mask = model(torch.randn(1, 80))
    assert mask.shape == (1, 1)
    assert not mask.any()
    assert loss.item() == 0.0


def test_the_encoder_fine_tunes() -> None:
    model = autoencoder(image_config(learned_positions=True))
    weights = model.encoder.state_dict()
    classifier = ImageModel(image_config(learned_positions=True, num_classes=3))
    missing, unexpected = classifier.load_state_dict(weights, strict=False)
    assert sorted(missing) == ["head.bias", "head.weight"]
    assert not unexpected
    bare = ImageModel(image_config(learned_positions=True))
    bare.load_state_dict(weights)


def test_it_learns() -> None:
    """Images that repeat one patch can be reconstructed from any one of them."""
    model = autoencoder(image_config(), normalize_targets=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        images = torch.randn(16, 3, 1, 1).expand(-1, -1, 16, 16)
        loss = model(images).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


@pytest.mark.parametrize("encoder", [image_config(), audio_config()], ids=["image", "audio"])
def test_description(encoder: ImageConfig | AudioConfig) -> None:
    model = autoencoder(encoder).eval()
    twin = build(describe(model)).eval()
    assert twin.config == model.config
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    inputs = inputs_of(model)
    noise = torch.rand(2, model.encoder.num_patches(*inputs))
    assert twin(*inputs, noise=noise).loss.equal(model(*inputs, noise=noise).loss)


def test_autocast_and_bfloat16() -> None:
    model = autoencoder(image_config())
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    expected = model(images, noise=noise).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, noise=noise).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    loss = model.bfloat16()(images.bfloat16(), noise=noise).loss
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("encoder", "changes", "message"),
    [
        (image_config(), {"mask_ratio": 1.0}, r"mask_ratio must be between 0 and 1, got 1.0"),
        (image_config(num_classes=3), {}, r"set its num_classes to 0, got 3"),
        (
            audio_config(patch_stride=4),
            {},
            r"masking needs patches that do not overlap.*without patch_stride",
        ),
        (
            audio_config(stem="frame", patch_size=None, backbone=backbone("1d")),
            {},
            r"masking needs patches that do not overlap",
        ),
        (image_config(), {"decoder": backbone("1d")}, r"rope must be 'none' or '2d', got '1d'"),
        (
            audio_config(clip_seconds=None),
            {"decoder": backbone("none")},
            r"learned positions need the encoder's clip_seconds",
        ),
    ],
)
def test_config_refuses(
    encoder: ImageConfig | AudioConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        autoencoder(encoder, **changes)


def test_noise_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"noise has shape \(2, 9\), but there are 16 patches"):
        autoencoder(image_config())(torch.randn(2, 3, 16, 16), noise=torch.rand(2, 9))


@pytest.mark.parametrize("percent", [10, 29, 57, 60, 70, 80, 90])
def test_counts_are_exact_at_every_length(percent: int) -> None:
    """Rounding must not mask one patch less in one clip than in another."""
    model = autoencoder(image_config(), mask_ratio=percent / 100)
    lengths = torch.arange(1, 1025)
    padding = torch.arange(1024) < lengths[:, None]
    _, num_visible = model._order(torch.rand(1024, 1024), padding)
    exact = [max(1, n - n * percent // 100) for n in lengths.tolist()]
    assert num_visible.flatten().tolist() == exact


def test_counts_agree_where_binary_fractions_do_not() -> None:
    """`100 * 0.29` is just below 29, so that one more patch would be both visible and predicted."""
    model = autoencoder(image_config(image_size=20, patch_size=2), mask_ratio=0.29)
    images = torch.randn(1, 3, 20, 20, requires_grad=True)
    _, prediction, mask = model(images)
    assert mask.sum() == 29
    (seen,) = torch.autograd.grad(prediction.square().sum(), images)
    assert (model.encoder.patchify(seen)[mask] == 0).all()
