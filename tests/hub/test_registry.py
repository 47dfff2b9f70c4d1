"""Models by the names of recipes."""

import dataclasses
import re

import pytest
import torch

from diffmm.hub.registry import create_model, describe_model, list_models
from diffmm.models import (
    AudioModel,
    CaptioningModel,
    ContrastiveModel,
    CTCModel,
    ImageModel,
    MaskedAutoencoder,
    TextModel,
)
from diffmm.models.description import build, config_class
from diffmm.models.weights import save_model
from diffmm.recipes.catalog import recipe_names

KINDS = {
    "text": TextModel,
    "image": ImageModel,
    "audio": AudioModel,
    "image_text": ContrastiveModel,
    "audio_text": ContrastiveModel,
    "multimodal": ContrastiveModel,
}
OTHERS = {
    "mae": MaskedAutoencoder,
    "caption": CaptioningModel,
    "transcription": CaptioningModel,
    "ctc": CTCModel,
    "librispeech": CTCModel,
}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_model_with_any_attention(name):
    with torch.device("meta"):
        model = create_model(name, attention="softmax")
    others = [kind for part, kind in OTHERS.items() if part in name]
    kind = others[0] if others else KINDS[name.partition("/")[0]]
    assert type(model) is kind
    towers = getattr(model.config, "towers", {"": getattr(model.config, "encoder", model.config)})
    assert {tower.backbone.attention for tower in towers.values()} == {"softmax"}


def test_names_are_filtered_by_a_part_or_a_pattern():
    assert list_models() == recipe_names()
    assert list_models("vit") == ["image/imagenet_vit_b", "image/imagenet_vit_s"]
    assert list_models("image/*_tiny") == ["image/digits_mae_tiny", "image/digits_tiny"]
    assert list_models("tiny*") == []


def test_overrides_are_fields_of_the_model_or_its_backbone():
    model = create_model(
        "image/imagenet_vit_s", attention="diff_v2", num_classes=5, depth=2, patch_size=(32, 32)
    )
    assert (model.num_classes, model.config.patch_size) == (5, (32, 32))
    backbone = model.config.backbone
    assert (backbone.attention, backbone.depth, backbone.dim) == ("diff_v2", 2, 384)
    assert model.training
    assert model.forward_head(torch.zeros(1, 50, 384)).shape == (1, 5)


def test_an_override_reaches_all_that_refers_to_the_same_variable():
    config = create_model("image/digits_mae_tiny", attention="softmax", mask_ratio=0.5).config
    assert config.mask_ratio == 0.5
    assert config.encoder.backbone.attention == config.decoder.attention == "softmax"
    assert create_model("image/digits_mae_tiny", dim=32).config.decoder.dim == 64


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "image/digits_tiny",
            {"num_clases": 5},
            "ImageModel of image/digits_tiny has no setting "
            "'num_clases'; did you mean 'num_classes'?",
        ),
        ("image/digits_tiny", {"backbone": {}}, "backbone must be a plain value, got dict"),
        ("image/digits_tiny", {"backbone": 3}, "has no setting 'backbone'"),
        ("image/digits_tiny", {"attention": "diff_v9"}, "attention must be one of"),
        ("image/digits_tiny", {"depth": 0}, "depth must be at least 1, got 0"),
        ("image/digits_tiny", {"depth": "two"}, "BackboneConfig cannot be created"),
        ("image/digts_tiny", {}, "there is no recipe 'image/digts_tiny'; did you mean"),
        ("nowhere.yaml", {}, "there is no recipe file nowhere.yaml"),
        ("image/digits_tiny", {"skip_head": True}, "skip_head=True needs weights"),
        ("image_text/shapes_tiny", {"depth": 3}, "depth is a setting of 2 towers of image_text/s"),
    ],
)
def test_what_is_refused(name, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model(name, **overrides)


def test_a_recipe_of_ones_own_and_one_without_a_model(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "vars: {width: 32}\n"
        "model: {init_args: {model: {class_path: diffmm.models.TextModel, init_args: {config: "
        "{vocab_size: 10, max_length: 8, "
        "backbone: {dim: '${vars.width}', depth: 1, num_heads: 2, rope: 1d}}}}}}\n"
    )
    assert create_model(str(path)).config.backbone.dim == 32
    assert create_model(str(path), dim=16).config.backbone.dim == 16
    for text, message in (
        ("vars: {}\n", "has no model with a class_path and a config"),
        (path.read_text().replace("vars.width", "vars.depth"), "refers to vars.depth"),
        (
            path.read_text().replace("diffmm.models.TextModel", "os.system"),
            "class_path must be one",
        ),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            create_model(str(path))


def test_weights_to_start_from(tmp_path):
    file = save_model(create_model("image/digits_tiny"), tmp_path)
    model = create_model("image/digits_tiny", weights=file)
    again = create_model("image/digits_tiny", weights=file, num_classes=3, skip_head=True)
    assert again.num_classes == 3
    for name, weight in again.state_dict().items():
        assert name.startswith("head.") or weight.equal(model.state_dict()[name])
    with pytest.raises(ValueError, match="skip_head=True keeps the new one"):
        create_model("image/digits_tiny", weights=file, num_classes=3)


@pytest.mark.parametrize("name", ["image/digits_mae_tiny", "audio/sound_events_mae_tiny"])
def test_no_setting_stands_in_two_configs(name):
    """An override would be ambiguous."""
    description = describe_model(name, {})
    model = config_class(description["class_path"])
    encoder = type(build(description).config.encoder)
    backbone = type(build(description).config.decoder)
    names = [
        field.name for config in (model, encoder, backbone) for field in dataclasses.fields(config)
    ]
    assert len(names) == len(set(names))
