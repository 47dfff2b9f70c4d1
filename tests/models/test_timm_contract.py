"""timm's interface: the methods that its tools use, compared with timm's own vision transformer."""

import pytest
import torch
from timm.data import resolve_data_config
from timm.layers import AttentionPoolLatent, resample_patch_embed
from timm.models import VisionTransformer, group_parameters
from timm.models._features import FeatureGetterNet
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from diffmm.layers.patch import resample_patches
from diffmm.layers.pool import AttentionPool
from diffmm.models import AudioConfig, AudioModel, BackboneConfig, ImageConfig, ImageModel
from diffmm.training import OptimizerConfig
from diffmm.training.optimizer import parameter_groups

ATTENTIONS = ("softmax", "diff_v1", "diff_v2")


def image(attention="diff_v2", **changes):
    backbone = BackboneConfig(32, 3, 4, attention=attention, rope="2d", qkv_bias=True)
    settings = {"image_size": 16, "patch_size": 4, "num_classes": 5, "learned_positions": True}
    settings |= {"num_reg_tokens": 2}
    return ImageModel(ImageConfig(backbone=backbone, **{**settings, **changes})).eval()


def audio(**changes):
    backbone = BackboneConfig(32, 3, 4, rope="2d")
    return AudioModel(
        AudioConfig(backbone=backbone, sample_rate_hz=8000, num_mels=32, num_classes=5, **changes)
    ).eval()


def theirs():
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=5, reg_tokens=2
    ).eval()


def test_names_and_sizes_are_timms():
    ours, other = image(), theirs()
    for name in ("num_classes", "num_features", "embed_dim", "head_hidden_size", "global_pool"):
        assert getattr(ours, name) == getattr(other, name), name
    assert ours.get_classifier() is ours.head
    assert [(f["num_chs"], f["reduction"]) for f in ours.feature_info] == [
        (f["num_chs"], f["reduction"]) for f in other.feature_info
    ]
    for info in ours.feature_info:
        ours.get_submodule(info["module"])
    ours.set_grad_checkpointing()
    assert ours.backbone.activation_checkpointing
    ours.set_grad_checkpointing(False)
    assert not ours.backbone.activation_checkpointing


def test_data_config_follows_the_model():
    model = image(in_channels=1)
    assert model.default_cfg is model.pretrained_cfg
    assert resolve_data_config(model=model)["input_size"] == (1, 16, 16)
    model.set_input_size(img_size=(24, 32))
    assert resolve_data_config(model=model)["input_size"] == (1, 24, 32)
    model.reset_classifier(9)
    assert model.pretrained_cfg["num_classes"] == 9
    first = model.get_submodule(model.pretrained_cfg["first_conv"])
    assert first.weight.shape[1] == 1
    assert model.get_submodule(model.pretrained_cfg["classifier"]).out_features == 9
    assert audio().pretrained_cfg["sample_rate_hz"] == 8000


@pytest.mark.parametrize("make", [*(lambda a=a: image(a) for a in ATTENTIONS), audio])
def test_weight_decay_is_the_same_by_timms_groups(make):
    model = make()
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    timms = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    ours = {
        id(p)
        for group in parameter_groups(model, OptimizerConfig(1e-3))
        if group["weight_decay"]
        for p in group["params"]
    }
    assert timms == ours


@pytest.mark.parametrize("make", [*(lambda a=a: image(a, pool="map") for a in ATTENTIONS), audio])
def test_layer_decay_is_the_same_by_timms_groups(make):
    model = make()
    timms = {
        id(p): group["lr_scale"]
        for group in param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.7)
        for p in group["params"]
    }
    config = OptimizerConfig(1.0, layer_decay=0.7)
    ours = {
        id(p): group["lr"] for group in parameter_groups(model, config) for p in group["params"]
    }
    assert timms.keys() == ours.keys()
    for name, parameter in model.named_parameters():
        assert timms[id(parameter)] == pytest.approx(ours[id(parameter)]), name


def test_every_parameter_is_in_a_group():
    model = image()
    for coarse, count in ((False, 5), (True, 3)):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=False)
        assert sum(len(names) for names in groups.values()) == len(list(model.parameters()))
        assert len(groups) == count


@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("return_prefix_tokens", [False, True])
@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("intermediates_only", [False, True])
def test_intermediates_come_as_timms_do(
    output_fmt, return_prefix_tokens, output_dict, intermediates_only
):
    options = {
        "indices": [0, 1],
        "output_fmt": output_fmt,
        "return_prefix_tokens": return_prefix_tokens,
        "output_dict": output_dict,
        "intermediates_only": intermediates_only,
    }
    images = torch.randn(2, 3, 16, 16)
    ours, other = (model.forward_intermediates(images, **options) for model in (image(), theirs()))

    def shape(value):
        if isinstance(value, torch.Tensor):
            return value.shape
        if isinstance(value, dict):
            return {key: shape(item) for key, item in value.items()}
        return type(value)(shape(item) for item in value)

    assert shape(ours) == shape(other)


def test_stopping_early_runs_only_the_blocks_wanted():
    model, images, seen = image(), torch.randn(2, 3, 16, 16), []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda *_: seen.append(1))
    final, (taken,) = model.forward_intermediates(images, [1], stop_early=True, norm=True)
    assert len(seen) == 2
    _, (whole,) = model.forward_intermediates(images, [1], norm=True)
    torch.testing.assert_close(taken, whole)
    patches = final[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(taken, patches)


@pytest.mark.parametrize("make", [image, audio])
def test_features_only(make):
    model = make()
    inputs = torch.randn(2, 3, 16, 16) if make is image else 0.1 * torch.randn(2, 8000)
    expected = model.forward_intermediates(
        inputs, indices=[0, 1], output_fmt="NCHW", intermediates_only=True
    )
    features = FeatureGetterNet(model, out_indices=[0, 1])
    assert len(model.backbone.blocks) == model.config.backbone.depth == 2
    assert isinstance(model.head, torch.nn.Identity)
    for ours, whole in zip(features(inputs), expected, strict=True):
        torch.testing.assert_close(ours, whole)
    assert features.feature_info.channels() == [32, 32]


@pytest.mark.parametrize(("name", "same"), [("token", "cls"), ("avg", "mean")])
def test_pools_by_timms_names(name, same):
    torch.manual_seed(1)
    first = image(pool=name)
    torch.manual_seed(1)
    second = image(pool=same)
    assert first.config == second.config
    assert first.global_pool == name
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(first(images), second(images))


def test_attention_pooling_is_timms():
    timms = AttentionPoolLatent(32, num_heads=4, mlp_ratio=4.0, norm_layer=torch.nn.LayerNorm)
    ours = AttentionPool(32, 4, 128, init_std=0.02)
    for parameter in timms.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(timms.state_dict())
    ours.norm.eps = timms.norm.eps
    x = torch.randn(3, 7, 32)
    torch.testing.assert_close(ours(x), timms(x), rtol=1e-4, atol=1e-5)
    padding = torch.tensor([[True] * 5 + [False] * 2] * 3)
    torch.testing.assert_close(ours(x, padding), ours(x[:, :5]))


def test_attention_pooling_of_models():
    model = image(pool="map")
    assert model.global_pool == "map"
    images = torch.randn(2, 3, 16, 16)
    assert model(images).shape == (2, 5)
    model.reset_classifier(0, "avg")
    assert model.pooling is None
    model.reset_classifier(3, "map")
    assert model(images).shape == (2, 3)
    model(images).sum().backward()
    sound = audio(pool="map", cls_token=False)
    clip = 0.1 * torch.randn(1, 4000)
    padded = torch.nn.functional.pad(clip, (0, 3000))
    alone, in_a_batch = sound(clip), sound(padded, torch.tensor([4000]))
    torch.testing.assert_close(in_a_batch, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new", [(8, 8), (2, 2), (6, 3)])
def test_patches_are_resampled_as_timm_does(new):
    weight = torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(
        resample_patches(weight, new), resample_patch_embed(weight, list(new)), rtol=1e-3, atol=1e-4
    )
    assert resample_patches(weight, (4, 4)) is weight


def test_another_patch_size_keeps_what_the_model_sees():
    model = image()
    images = torch.randn(2, 3, 16, 16)
    before = model(images)
    model.set_input_size(img_size=32, patch_size=8)
    assert model.config.grid == (4, 4)
    large = torch.nn.functional.interpolate(images, 32, mode="bicubic", antialias=True)
    torch.testing.assert_close(model(large), before, rtol=1e-2, atol=1e-2)
    model.set_input_size(patch_size=4)
    assert model.config.grid == (8, 8)
    assert model(large).shape == before.shape
    with pytest.raises(ValueError, match="is not a multiple of patch_size 5x5"):
        model.set_input_size(patch_size=5)
    assert model(large).shape == before.shape  # unchanged
