"""Options of image and audio models that other implementations' models need: special tokens, pools,
heads, positions, spectrograms of clips of one length, parallel blocks."""

import math

import pytest
import torch
from torch.nn.functional import gelu

from diffmm.layers import DiffAttentionV1
from diffmm.layers.feed_forward import QuickGELU
from diffmm.layers.positions import normalized_coordinates
from diffmm.models import AudioConfig, AudioModel, Backbone, BackboneConfig, ImageConfig, ImageModel
from diffmm.models.description import build, describe
from diffmm.models.weights import load_weights, save_model
from diffmm.ops import AttentionMask
from diffmm.training.finetuning import FineTuneConfig, freeze

NEW = ("dist_token", "pool_prefix_tokens", "pool_heads", "pool_width", "pool_norm", "head_bias",
       "prefix_positions", "pre_norm")  # fmt: skip
NEW_OF_BACKBONES = ("final_norm", "parallel", "dual_lambda")


def backbone(**changes):
    return BackboneConfig(**{"dim": 32, "depth": 2, "num_heads": 4, "init_std": 0.2} | changes)


def image(rope="none", attention="softmax", **changes):
    of_backbone = {k: changes.pop(k) for k in ("norm", "feed_forward", "norm_eps") if k in changes}
    settings = {"image_size": (16, 24), "patch_size": 8, "num_classes": 3}
    settings |= {"learned_positions": True}
    blocks = backbone(rope=rope, attention=attention, **of_backbone)
    return ImageModel(ImageConfig(backbone=blocks, **settings | changes)).eval()


def audio(**changes):
    settings = {"sample_rate_hz": 16000, "num_mels": 16, "num_classes": 3, "patch_size": 8}
    return AudioModel(AudioConfig(backbone=backbone(rope="2d"), **settings | changes)).eval()


def test_every_option_is_off_by_default_and_may_be_absent_in_old_descriptions():
    for model, own in (
        (image(), ("patch_bias", "rope_coordinates", "ignore_remainder")),
        (audio(), ("spectrogram", "partial_patches")),
    ):
        description = describe(model)
        for name in (*NEW, *own):
            del description["config"][name]
        for name in NEW_OF_BACKBONES:
            del description["config"]["backbone"][name]
        assert build(description).config == model.config


def test_names_and_outputs_of_a_model_without_options_are_as_before():
    model = image(num_reg_tokens=2)
    names = {name for name in model.state_dict() if not name.startswith("backbone.blocks.")}
    assert names == {
        "cls_token", "reg_token", "positions.grid", "positions.prefix",
        "patch_embedding.proj.weight", "patch_embedding.proj.bias", "backbone.norm.weight",
        "head.weight", "head.bias",
    }  # fmt: skip
    block = {name.split(".", 3)[3] for name in model.state_dict() if ".blocks.1." in name}
    assert block == {
        *(f"attention.{part}_proj.weight" for part in ("q", "k", "v", "out")),
        *(f"feed_forward.{part}_proj.weight" for part in ("gate", "up", "down")),
        "attention_norm.weight", "feed_forward_norm.weight",
    }  # fmt: skip
    x = torch.randn(2, 3, 16, 24)
    patches = model.patch_embedding(x) + model.positions.grid.flatten(0, 1)
    prefix = torch.cat([model.cls_token, model.reg_token]) + model.positions.prefix
    tokens = torch.cat([prefix.expand(2, -1, -1), patches], dim=1)
    for each in model.backbone.blocks:
        normed = each.attention_norm(tokens)
        tokens = tokens + each.attention(normed, mask=AttentionMask())
        tokens = tokens + each.feed_forward(each.feed_forward_norm(tokens))
    features = model.backbone.norm(tokens)
    assert torch.equal(model(x), model.head(features[:, 0]))
    assert torch.equal(model.forward_features(x), features)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "cls_dist"}, "pool='cls_dist' needs cls_token=True and dist_token=True"),
        ({"head": "distilled"}, "head='distilled' needs pool='cls_dist', got pool='cls'"),
        ({"pool_prefix_tokens": True}, "pool_prefix_tokens=True is not used by pool='cls'"),
        ({"pool_heads": 2}, "pool_heads must be at least 1 and is for pool='map' only, got 2 with"),
        ({"pool": "map", "pool_heads": 5}, "pool_heads must divide the backbone's dim 32, got 5"),
        ({"pool": "map", "pool_width": 0}, "pool_width must be at least 1 and is for pool='map'"),
        ({"rope": "2d", "learned_positions": False, "prefix_positions": False}, "prefix_positions"),
        (
            {"head_bias": False, "head": "distilled", "pool": "cls_dist", "dist_token": True},
            "head_bias=False is for head='linear', got head='distilled'",
        ),
        ({"rope_coordinates": "normalized"}, "rope_coordinates='normalized' is not used by"),
        (
            {"rope": "2d", "rope_coordinates": "normalized", "rope_image_size": 16},
            "rope_image_size=16 is not used by rope_coordinates='normalized'",
        ),
        ({"rope_coordinates": "polar"}, "rope_coordinates must be one of 'patches', 'normalized'"),
    ],
)
def test_options_of_images_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        image(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spectrogram": "kaldy"}, "spectrogram must be one of .*; did you mean 'kaldi'?"),
        ({"spectrogram": "kaldi"}, "spectrogram='kaldi' needs clip_seconds"),
        ({"spectrogram": "kaldi", "clip_seconds": 0.01}, "clips of 160 samples are shorter than"),
        (
            {"spectrogram": "whisper", "clip_seconds": 1.0, "sample_rate_hz": 8000},
            "mel bands up to 8000 Hz, which needs sample_rate_hz of at least 16000, got 8000",
        ),
        (
            {"spectrogram": "kaldi", "clip_seconds": 0.05, "partial_patches": False},
            "clip_seconds=0.05 has 3 frames, fewer than a patch of 8",
        ),
    ],
)
def test_options_of_audio_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        audio(**changes)


def test_options_of_the_backbone_are_checked():
    with pytest.raises(ValueError, match="parallel=True has one residual branch: post_norm=True"):
        backbone(parallel=True, post_norm=True)
    with pytest.raises(ValueError, match="qkv_bias must be one of .*, got 'kv'"):
        backbone(qkv_bias="kv")
    with pytest.raises(ValueError, match="dual_lambda=True is not used by attention 'softmax'"):
        backbone(attention="softmax", dual_lambda=True)


def test_pools_of_special_tokens():
    x = torch.randn(2, 3, 16, 24)
    model = image(dist_token=True, pool="cls_dist", num_reg_tokens=1)
    features = model.forward_features(x)
    assert features.shape == (2, 9, 32)
    mean = (features[:, 0] + features[:, 1]) / 2
    torch.testing.assert_close(model(x), model.head(mean))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), mean)
    model = image(dist_token=True, pool="cls_dist", head="distilled")
    features = model.forward_features(x)
    logits = (model.head.cls(features[:, 0]) + model.head.dist(features[:, 1])) / 2
    torch.testing.assert_close(model(x), logits)
    assert model.forward_head(features, pre_logits=True).shape == (2, 32)
    model.reset_classifier(0)
    assert model(x).shape == (2, 32)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)


def test_pools_with_and_without_special_tokens():
    x = torch.randn(2, 3, 16, 24)
    for pool, first in (("mean", 2), ("map", 0)):
        for given in (None, True, False):
            model = image(pool=pool, num_reg_tokens=1, pool_prefix_tokens=given, pool_norm=True)
            start = first if given is None else 2 * (not given)
            tokens = model.forward_features(x)[:, start:]
            pooled = tokens.mean(1) if pool == "mean" else model.pooling(tokens)
            torch.testing.assert_close(model(x), model.head(model.pool_norm(pooled)))


def test_padding_does_not_change_a_mean_over_all_tokens():
    model = audio(pool="mean", pool_prefix_tokens=True)
    features, real = torch.randn(1, 6, 32), torch.tensor([[True, True, False, False, False]])
    found = model.forward_head(features, pre_logits=True, key_padding=real)
    torch.testing.assert_close(found, features[:, :3].mean(1))


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "quick_gelu", "swiglu"])
def test_the_attention_pool_has_the_activation_and_eps_of_the_blocks(kind):
    model = image(pool="map", feed_forward=kind, norm="layernorm", norm_eps=1e-2, pool_width=7)
    assert model.pooling.norm.eps == 1e-2
    assert model.pooling.mlp["fc1"].out_features == 7
    x = torch.linspace(-3, 3, 7)
    plain = {"gelu_tanh": gelu(x, approximate="tanh"), "quick_gelu": x * (1.702 * x).sigmoid()}
    torch.testing.assert_close(model.pooling.activation(x), plain.get(kind, gelu(x)))


def test_positions_and_norm_before_the_blocks():
    x = torch.randn(2, 3, 16, 24)
    model = image(prefix_positions=False, pre_norm=True, patch_bias=False)
    assert model.positions.prefix is None
    assert model.patch_embedding.proj.bias is None
    tokens = model.patch_embedding(x) + model.positions.grid.flatten(0, 1)
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), tokens], dim=1)
    truth = model.backbone(model.pre_norm(tokens), mask=AttentionMask())
    torch.testing.assert_close(model.forward_features(x), truth)
    model.set_input_size(patch_size=4)
    assert model.patch_embedding.proj.bias is None
    assert model(x).shape == (2, 3)


def test_pixels_that_no_patch_covers_are_ignored():
    with pytest.raises(ValueError, match="image_size 19x26 is not a multiple of patch_size 8x8"):
        image(image_size=(19, 26))
    model = image(image_size=(19, 26), ignore_remainder=True)
    assert model.config.grid == (2, 3)
    x = torch.randn(1, 3, 19, 26)
    other = torch.cat([x[:, :, :16], torch.randn(1, 3, 3, 26)], dim=2)
    other[..., 24:] = 7.0
    assert torch.equal(model(x), model(other))
    assert torch.equal(model.patchify(x), image().patchify(x[:, :, :16, :24]))
    assert model.num_patches(x) == model.patchify(x).shape[1] == 6


def test_normalized_coordinates_do_not_depend_on_the_size():
    at = normalized_coordinates((2, 4))
    assert at.shape == (8, 2)
    torch.testing.assert_close(at[0], torch.tensor([-0.5, -0.75]) * 2 * math.pi)
    torch.testing.assert_close(at[-1], -at[0])
    torch.testing.assert_close(
        normalized_coordinates((3,)), torch.tensor([-1, 0, 1]) * 4 / 3 * math.pi
    )
    changes = {"rope": "2d", "learned_positions": False, "rope_coordinates": "normalized"}
    model = image(attention="diff_v1", **changes)
    model.set_input_size((32, 24))
    assert model.config.rope_image_size is None
    assert model(torch.randn(1, 3, 32, 24)).shape == (1, 3)


def test_weights_with_other_coordinates_are_refused(tmp_path):
    changes = {"rope": "2d", "learned_positions": False}
    file = save_model(image(**changes), tmp_path / "model.safetensors")
    other = image(rope_coordinates="normalized", **changes)
    with pytest.raises(ValueError, match="rope_coordinates 'patches', needed 'normalized'"):
        load_weights(other, file)
    load_weights(image(**changes), file)


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2"])
def test_parallel_blocks(attention):
    config = backbone(attention=attention, parallel=True, layer_scale=0.5, final_norm=False)
    model = Backbone(config)
    x = torch.randn(2, 7, 32)
    mask = AttentionMask(causal=True)
    truth = x
    for block in model.blocks:
        y = block.attention_norm(truth)
        both = block.attention(y, mask=mask) + block.feed_forward(y)
        truth = truth + block.attention_branch.scale * both
    torch.testing.assert_close(model(x, mask=mask), truth)
    cache = model.new_cache(2, 7)
    steps = [model(x[:, i : i + 1], mask=AttentionMask(causal=True), cache=cache) for i in range(7)]
    torch.testing.assert_close(torch.cat(steps, 1), truth)


def test_a_bias_of_queries_and_values_only():
    layer = backbone(qkv_bias="qv").make_attention(0)
    assert layer.k_proj.bias is None
    assert layer.q_proj.bias is not None
    assert layer.v_proj.bias is not None


def test_lambda_of_two_numbers():
    layer = DiffAttentionV1(24, num_heads=4, layer_index=3, dual_lambda=True)
    assert layer.lam(torch.empty(0)).item() == pytest.approx(layer.lambda_init)
    with torch.no_grad():
        layer.lambda_a.fill_(0.3)
        layer.lambda_b.fill_(-0.2)
    truth = math.exp(0.3) - math.exp(-0.2) + layer.lambda_init
    assert layer.lam(torch.empty(0)).item() == pytest.approx(truth)
    assert "lambda_q1" not in dict(layer.named_parameters())
    assert layer.bfloat16().lambda_a.dtype == torch.float32
    layer.float()(torch.randn(1, 5, 24), mask=AttentionMask()).square().sum().backward()
    assert layer.lambda_a.grad.abs().item() > 0


def test_quick_gelu():
    x = torch.linspace(-4, 4, 9)
    torch.testing.assert_close(QuickGELU.activate(x), x / (1 + (-1.702 * x).exp()))


@pytest.mark.parametrize("spectrogram", ["kaldi", "whisper"])
def test_a_clip_is_padded_to_the_same_features_whatever_its_batch(spectrogram):
    model = audio(spectrogram=spectrogram, clip_seconds=0.4, partial_patches=False)
    short = torch.randn(1, 3000) * 0.1
    batch = torch.cat([short, torch.ones(1, 900)], dim=1).repeat(2, 1)
    found = model(batch, torch.tensor([3000, 3900]))
    torch.testing.assert_close(found[:1], model(short))
    assert not torch.allclose(found[1:], found[:1], atol=1e-3)
    frames = model.spectrogram.clip_frames
    assert model.num_patches(short) == model.num_patches(batch) == ((frames - 8) // 8 + 1) * 2
    assert model.key_padding(batch, torch.tensor([3000, 3900])).all()
    with pytest.raises(ValueError, match="clips of 0.5 s are longer than clip_seconds=0.4"):
        model(torch.zeros(1, 8000))
    model.set_input_size(0.5)
    assert model.spectrogram.clip_samples == 8000
    assert model(torch.zeros(1, 8000)).shape == (1, 3)


def test_freezing_keeps_the_norm_after_the_pool_trainable():
    model = image(pool="mean", pool_norm=True)
    freeze(model, FineTuneConfig(freeze=1))
    assert model.pool_norm.weight.requires_grad
    assert not model.cls_token.requires_grad
