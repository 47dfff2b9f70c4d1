"""The image model: timm's numbers, timm's argument names, any size."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from diffmm.models import BackboneConfig, ImageConfig, ImageModel
from diffmm.models.description import build, describe

ATTENTIONS = ["softmax", "diff_v1", "diff_v2"]


def config(**changes: Any) -> ImageConfig:
    backbone = changes.pop("backbone", {})
    backbone = {"dim": 32, "depth": 3, "num_heads": 4, "rope": "2d"} | backbone
    settings: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_classes": 5} | changes
    return ImageConfig(backbone=BackboneConfig(**backbone), **settings)


def vit_config(dim: int, depth: int, num_heads: int, **changes: Any) -> ImageConfig:
    """The settings with which this model is the original ViT."""
    backbone = BackboneConfig(
        dim=dim,
        depth=depth,
        num_heads=num_heads,
        attention="softmax",
        norm="layernorm",
        feed_forward="gelu",
        qkv_bias=True,
        out_bias=True,
        feed_forward_bias=True,
    )
    return ImageConfig(backbone=backbone, learned_positions=True, **changes)


def from_timm(weights: dict[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """timm's ViT weights with our names."""
    renamed = {
        "cls_token": weights["cls_token"][0],
        "positions.prefix": weights["pos_embed"][0, :1],
        "positions.grid": weights["pos_embed"][0, 1:].unflatten(0, grid),
    }
    for name, tensor in weights.items():
        if name in ("cls_token", "pos_embed"):
            continue
        for theirs, ours in (
            ("patch_embed", "patch_embedding"),
            ("blocks.", "backbone.blocks."),
            ("norm1", "attention_norm"),
            ("norm2", "feed_forward_norm"),
            ("attn.proj", "attention.out_proj"),
            ("mlp.fc1", "feed_forward.up_proj"),
            ("mlp.fc2", "feed_forward.down_proj"),
        ):
            name = name.replace(theirs, ours)
        name = f"backbone.{name}" if name.startswith("norm.") else name
        if "attn.qkv" in name:
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.{part}_proj")] = chunk
        else:
            renamed[name] = tensor
    return renamed


def test_parameter_count_of_vit_base() -> None:
    with torch.device("meta"):
        model = ImageModel(vit_config(768, 12, 12, image_size=224, num_classes=1000))
        theirs = timm.create_model("vit_base_patch16_224")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 86_567_656 == sum(parameter.numel() for parameter in theirs.parameters())


def test_same_numbers_as_timm() -> None:
    theirs = VisionTransformer(
        img_size=(16, 24), patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=7
    ).eval()
    for parameter in theirs.parameters():  # timm initializes biases to zero
        torch.nn.init.normal_(parameter, std=0.2)
    ours = ImageModel(vit_config(32, 2, 4, image_size=(16, 24), patch_size=8, num_classes=7)).eval()
    ours.load_state_dict(from_timm(theirs.state_dict(), (2, 3)))
    images = torch.randn(3, 3, 16, 24)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ours.forward_features(images), theirs.forward_features(images), rtol=1e-4, atol=1e-5
    )
    for indices in (None, 1, [0], [-1, 0]):
        final, taken = ours.forward_intermediates(images, indices, norm=True)
        final_theirs, taken_theirs = theirs.forward_intermediates(images, indices, norm=True)
        torch.testing.assert_close(final, final_theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(taken, taken_theirs, rtol=1e-4, atol=1e-5)
    # Also at another size.
    theirs.set_input_size((32, 16))
    ours.set_input_size((32, 16))
    images = torch.randn(2, 3, 32, 16)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_every_parameter_learns(attention: str, pool: str) -> None:
    model = ImageModel(
        config(
            backbone={"attention": attention}, learned_positions=True, num_reg_tokens=2, pool=pool
        )
    )
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_shapes() -> None:
    images = torch.randn(2, 1, 16, 24)
    model = ImageModel(
        config(image_size=(16, 24), patch_size=(4, 8), in_channels=1, num_reg_tokens=3)
    )
    assert (model.num_features, model.num_prefix_tokens, model.num_classes) == (32, 4, 5)
    assert model.num_patches(images) == 12
    features = model.forward_features(images)
    assert features.shape == (2, 16, 32)
    assert model.forward_head(features).shape == (2, 5)
    assert model.forward_head(features, pre_logits=True).shape == (2, 32)
    final, taken = model.forward_intermediates(images)
    assert final.shape == (2, 16, 32)
    assert [tuple(x.shape) for x in taken] == [(2, 32, 4, 3)] * 3
    taken = model.forward_intermediates(images, 2, output_fmt="NLC", intermediates_only=True)
    assert [tuple(x.shape) for x in taken] == [(2, 12, 32)] * 2
    (last,) = model.forward_intermediates(
        images, [2], norm=True, output_fmt="NLC", intermediates_only=True
    )
    torch.testing.assert_close(last, features[:, 4:])


def test_pooling() -> None:
    images = torch.randn(2, 3, 16, 16)
    model = ImageModel(config(num_reg_tokens=2, num_classes=0))
    features = model.forward_features(images)
    torch.testing.assert_close(model(images), features[:, 0])
    model.reset_classifier(0, "mean")
    torch.testing.assert_close(model(images), features[:, 3:].mean(dim=1))
    bare = ImageModel(config(cls_token=False, pool="mean", num_classes=0))
    assert bare.num_prefix_tokens == 0
    assert bare(images).shape == (2, 32)


def test_reset_classifier() -> None:
    model = ImageModel(config()).eval().bfloat16()
    model.reset_classifier(9)
    images = torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)
    assert model(images).shape == (2, 9)
    assert model.num_classes == model.config.num_classes == 9
    assert not model.head.training
    model.reset_classifier(0)
    assert model(images).shape == (2, 32)
    with pytest.raises(ValueError, match=r"pool must be one of .* got 'sum'"):
        model.reset_classifier(3, "sum")


def test_rope_sees_places_and_special_tokens_have_none() -> None:
    model = ImageModel(config(cls_token=False, pool="mean", num_classes=0)).eval()
    images = torch.randn(1, 3, 16, 16)
    features = model.forward_features(images)
    # Without positions, attention could not distinguish transposed patches.
    moved = model.forward_features(images.roll(4, dims=3))
    grid = features.unflatten(1, (4, 4)).roll(1, dims=2).flatten(1, 2)
    assert (moved - grid).abs().max() > 1e-3
    model = ImageModel(config(num_reg_tokens=1))
    embedded = model.embed(images)
    full = model.with_prefix(embedded, torch.randn(2, 32))
    assert full.positions[:2].tolist() == [[0, 0], [0, 0]]
    assert full.positions[2:].equal(embedded.positions)
    assert embedded.positions.min() == 1


@pytest.mark.parametrize("learned", [True, False])
def test_another_size(learned: bool) -> None:
    model = ImageModel(config(learned_positions=learned)).eval()
    images = torch.randn(2, 3, 16, 16)
    at_16 = model(images)
    model.set_input_size((24, 32))
    assert model(torch.randn(2, 3, 24, 32)).shape == (2, 5)
    assert model.config.image_size == (24, 32)
    # The description is complete: the model can be recreated in its current form.
    twin = build(describe(model)).eval()
    twin.load_state_dict(model.state_dict())
    wide = torch.randn(2, 3, 24, 32)
    torch.testing.assert_close(twin(wide), model(wide), rtol=0, atol=0)
    positions = model.embed(wide).positions
    assert 0.5 < positions.min() < 1
    assert 4 < positions.max() < 4.5
    if not learned:  # rotary coordinates are restored
        model.set_input_size(16)
        torch.testing.assert_close(model(images), at_16, rtol=0, atol=0)


def test_the_same_size_changes_nothing() -> None:
    model = ImageModel(config(learned_positions=True)).eval()
    images, before = torch.randn(2, 3, 16, 16), model.state_dict()
    logits, parameter = model(images), model.positions.grid
    model.set_input_size(16)
    assert model.positions.grid is parameter  # an optimizer that holds it still trains it
    torch.testing.assert_close(model(images), logits, rtol=0, atol=0)
    assert model.resample_weights(before)["positions.grid"].equal(before["positions.grid"])


def test_weights_of_another_size_load() -> None:
    model = ImageModel(config(learned_positions=True))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    larger = ImageModel(config(learned_positions=True, image_size=32))
    larger.load_state_dict(larger.resample_weights(weights))
    model.set_input_size(32)
    torch.testing.assert_close(larger.positions.grid, model.positions.grid)
    # Other mismatches are left for the loader to report.
    strange = {"positions.grid": torch.zeros(4, 4, 7)}
    assert larger.resample_weights(strange) is strange


def test_frozen_positions_stay_frozen() -> None:
    model = ImageModel(config(learned_positions=True)).requires_grad_(False)
    model.set_input_size(32)
    assert not model.positions.grid.requires_grad


def test_bfloat16_and_autocast() -> None:
    model = ImageModel(config(learned_positions=True)).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images).float(), expected, rtol=0.1, atol=0.05)
    logits = model.bfloat16()(images.bfloat16())
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.05)


def test_compiled() -> None:
    model = ImageModel(config(backbone={"depth": 1}, num_reg_tokens=1, pool="mean")).eval()
    images = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, r"image_size 18x18 is not a multiple of patch_size 4x4"),
        ({"image_size": (16, 18)}, r"image_size 16x18 is not a multiple of patch_size 4x4"),
        ({"rope_image_size": 10}, r"rope_image_size 10x10 is not a multiple of patch_size 4x4"),
        ({"patch_size": 0}, r"patch_size must be at least 1, got 0"),
        ({"in_channels": 0}, r"in_channels must be at least 1, got 0"),
        ({"num_classes": -1}, r"num_classes must be at least 0, got -1"),
        (
            {"pool": "max"},
            r"pool must be one of 'cls', 'token', 'cls_dist', 'mean', 'avg', 'map', got 'max'",
        ),
        ({"cls_token": False}, r"pool='cls' needs cls_token=True: set it, or use pool='mean'"),
        ({"backbone": {"rope": "1d"}}, r"tokens have 2d positions.*rope is '1d'"),
        ({"backbone": {"rope": "none"}}, r"tokens have no positions.*learned_positions=True"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_rope_size_needs_rope() -> None:
    with pytest.raises(ValueError, match=r"rope_image_size is not used .* rope 'none'"):
        replace(vit_config(32, 1, 4, image_size=16, patch_size=4), rope_image_size=16)


def test_model_refuses() -> None:
    model = ImageModel(config())
    with pytest.raises(ValueError, match=r"are 16x20, but the model takes 16x16.*\(16, 20\)\)"):
        model(torch.randn(2, 3, 16, 20))
    with pytest.raises(
        ValueError, match=r"images must be \[B, 3, H, W\], got shape \(2, 1, 16, 16"
    ):
        model(torch.randn(2, 1, 16, 16))
    with pytest.raises(ValueError, match=r"block 3 does not exist: the backbone has 3 blocks"):
        model.forward_intermediates(torch.randn(2, 3, 16, 16), [3])
    with pytest.raises(
        ValueError, match=r"indices must be between 1 and the number of blocks 3, got 4"
    ):
        model.forward_intermediates(torch.randn(2, 3, 16, 16), 4)
    with pytest.raises(ValueError, match=r"output_fmt must be one of .*'NHWC'"):
        model.forward_intermediates(torch.randn(2, 3, 16, 16), output_fmt="NHWC")
    with pytest.raises(ValueError, match=r"image_size 15x15 is not a multiple of patch_size 4x4"):
        model.set_input_size(15)
