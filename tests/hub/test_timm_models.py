"""Image models of the recipes, created by timm."""

from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2

import diffmm
from datamodules import ImageData
from datamodules.image import CIFAR10, ImageFolder, ImageTransform
from diffmm.hub.timm_models import RECIPES
from diffmm.models import ImageModel
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.references import resolve
from diffmm.recipes.settings import load_file

SMALL = "diffmm_vit_small_patch16_224"


def small(**settings):
    return timm.create_model(SMALL, **{"depth": 2, "img_size": 32, "num_classes": 5, **settings})


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_of_timm_is_that_of_its_recipe(name):
    assert name in timm.list_models("diffmm_*")
    with torch.device("meta"):
        ours, theirs = diffmm.create_model(RECIPES[name]), timm.create_model(name)
    assert isinstance(theirs, ImageModel)
    size = ours.config.image_size
    assert theirs.config == replace(ours.config, image_size=(size, size))
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.input_size == resolve_model_data_config(theirs)["input_size"]
    assert cfg.num_classes == ours.num_classes
    assert name.endswith(f"_patch{ours.config.patch_size}_{size}")
    assert cfg.input_size == (3, size, size)
    data = resolve(load_file(find_recipe(RECIPES[name])))[0]["data"]["init_args"]
    source = {"CIFAR10": CIFAR10, "ImageFolder": ImageFolder}[
        data["source"]["class_path"].rpartition(".")[2]
    ]
    transform = ImageTransform(**data["transform"])
    reader = ImageData(source("images"), image_size=size, transform=transform).reader
    found = resolve_model_data_config(theirs)
    for setting in ("mean", "std", "crop_pct", "crop_mode", "interpolation"):
        assert getattr(cfg, setting) == found[setting] == getattr(reader, setting), setting


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2"])
def test_settings_by_timms_names(attention):
    settings = {"in_chans": 1, "img_size": (32, 48), "drop_path_rate": 0.2, "global_pool": "avg"}
    model = small(attention=attention, drop_rate=0.0, bn_momentum=None, **settings)
    config = model.config
    assert (config.in_channels, config.image_size, config.pool) == (1, (32, 48), "mean")
    assert (config.backbone.drop_path, config.backbone.attention) == (0.2, attention)
    assert model(torch.zeros(2, 1, 32, 48)).shape == (2, 5)
    data = resolve_model_data_config(model)
    assert data["input_size"] == (1, 32, 48)
    assert (data["interpolation"], data["crop_pct"]) == ("bicubic", 0.875)
    model.reset_classifier(3, "token")
    assert model(torch.zeros(2, 1, 32, 48)).shape == (2, 3)


def test_features_only_gives_maps_of_the_blocks():
    model = small(features_only=True, out_indices=(0, 2), depth=4, img_size=(32, 48)).eval()
    assert model.feature_info.channels() == [384, 384]
    assert model.feature_info.reduction() == [16, 16]
    images = torch.randn(1, 3, 32, 48)
    features = model(images)
    assert [feature.shape for feature in features] == [(1, 384, 2, 3)] * 2
    assert len(model.model.backbone.blocks) == 3
    expected = model.model.forward_intermediates(images, [0, 2], intermediates_only=True)
    assert all(torch.equal(*pair) for pair in zip(features, expected, strict=True))


def test_layer_decay_of_timms_optimizers():
    model = small(attention="diff_v1")
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, layer_decay=0.5)
    scales = {
        id(parameter): group["lr_scale"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    found = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    assert found["head.weight"] == 1.0
    assert found["backbone.blocks.1.attention.lambda_q1"] == 0.5
    assert found["backbone.blocks.0.attention.q_proj.weight"] == 0.25
    assert found["patch_embedding.proj.weight"] == found["cls_token"] == 0.125


def test_weights_of_a_file(tmp_path):
    model = small()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    again = small(checkpoint_path=str(tmp_path / "weights.safetensors"))
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_what_timm_cannot_create_is_refused():
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {SMALL}"):
        small(pretrained=True)
    with pytest.raises(ValueError, match=r"drop_rate must be 0, got 0.1: .* dropout=0.1 is"):
        small(drop_rate=0.1)
    with pytest.raises(ValueError, match="has no setting 'atention'; did you mean 'attention'"):
        small(atention="softmax")
    with pytest.raises(ValueError, match="img_size and image_size are the same setting"):
        small(image_size=32)
