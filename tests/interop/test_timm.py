"""Vision transformers of timm: the same logits, features and gradients as timm itself, and weights
that come back bit by bit."""

import json
from pathlib import Path

import pytest
import timm
import torch
from encoders import assert_same_files, compare_gradients, randomize
from hugging_face import assert_same
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.layers import DiffAttention
from timm.models._hub import save_for_hf

from diffmm.hub.readers import make_reader
from diffmm.interop import FAMILIES, read_model, write_model
from diffmm.models import BackboneConfig, ImageConfig, ImageModel
from diffmm.models.job import Job
from diffmm.models.weights import own_weights

SIZE = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "img_size": (32, 48),
    "patch_size": (8, 16),
    "num_classes": 7,
}
VIT = "vit_base_patch16_224"
DIFF = {"attn_layer": "diff"}

CASES = {
    "vit": (VIT, {}),
    "gray, without a head": (VIT, {"in_chans": 1, "num_classes": 0}),
    "mean of the patches": (VIT, {"global_pool": "avg", "reg_tokens": 1}),
    "mean of all tokens": (VIT, {"global_pool": "avg", "pool_include_prefix": True}),
    "attention pool of the patches": (VIT, {"global_pool": "map", "mlp_ratio": 3.3}),
    "attention pool of all tokens": (VIT, {"global_pool": "map", "pool_include_prefix": True}),
    "norm of queries and keys, no biases": (
        VIT,
        {"qk_norm": True, "qkv_bias": False, "proj_bias": False},
    ),
    "rmsnorm": (VIT, {"norm_layer": "rmsnorm", "qk_norm": True}),
    "no norm at the end": (VIT, {"final_norm": False}),
    "pixels that no patch covers": (VIT, {"img_size": (35, 50)}),
    "deit": ("deit_small_patch16_224", {"patch_size": 16}),
    "deit, distilled": ("deit_small_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": (28, 42), "patch_size": 14}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {}),
    "dinov2, swiglu": ("vit_giant_patch14_dinov2", {}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "clip, quick gelu": ("vit_base_patch16_clip_quickgelu_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "siglip, another width": ("vit_so400m_patch14_siglip_224", {}),
    "diff": (VIT, DIFF),
    "diff with a norm of queries and keys": (VIT, {**DIFF, "qk_norm": True, "in_chans": 1}),
    "vit_dwee": ("vit_dwee_patch16_reg1_gap_256", {}),
    "vit_dpwee": ("vit_dpwee_patch16_reg1_gap_256", {}),
    "vit_dpwee, biases, norm of queries and keys": (
        "vit_dpwee_patch16_reg1_gap_256",
        {"qkv_bias": False, "qk_norm": True},
    ),
    "vit_pwee": ("vit_pwee_patch16_reg1_gap_256", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3, biases, class token": (
        "vit_small_patch16_dinov3_qkvb",
        {"global_pool": "token", "rope_temperature": 30.0},
    ),
    "dinov3 plus": ("vit_small_plus_patch16_dinov3", {"mlp_ratio": 3.1, "in_chans": 1}),
}


def saved(name, arguments, folder):
    """A model of timm at random weights, and its folder as timm saves it."""
    model = randomize(timm.create_model(name, **arguments))
    arguments = {key: value for key, value in arguments.items() if key != "num_classes"}
    save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return model


def images(model):
    height, width = model.patch_embed.img_size
    return torch.randn(2, model.patch_embed.proj.in_channels, height, width)


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """timm's model, ours and the folder of timm's."""
    name, changes = CASES[request.param]
    theirs = saved(name, SIZE | changes, tmp_path / "theirs")
    return theirs, read_model(tmp_path / "theirs"), tmp_path / "theirs"


def test_logits_features_and_all_gradients_are_timms(pair):
    theirs, ours, _ = pair
    x = images(theirs)
    assert_same(ours.forward_features(x), theirs.forward_features(x), "features")
    assert ours.global_pool == theirs.global_pool
    compare_gradients(theirs, ours, lambda model, dtype: model(x.to(dtype)), "timm")


def test_weights_come_back_bit_by_bit_and_timm_reads_them(pair, tmp_path):
    theirs, ours, folder = pair
    back = write_model(ours, tmp_path / "back", "timm")
    assert_same_files(folder, back)
    again = timm.create_model(f"local-dir:{back}", pretrained=True).eval()
    x = images(theirs)
    assert torch.equal(again(x), theirs(x))
    assert read_model(back).config == ours.config


@pytest.mark.parametrize("case", ["clip", "mean of the patches", "dinov3", "deit, distilled"])
def test_features_of_blocks_and_of_the_pool_are_timms(case, tmp_path):
    name, changes = CASES[case]
    theirs = saved(name, SIZE | changes, tmp_path)
    ours, x = read_model(tmp_path), images(theirs)
    (last, taken), (truth, intermediates) = (
        model.forward_intermediates(x, indices=[0], norm=True) for model in (ours, theirs)
    )
    assert_same(taken[0], intermediates[0], "block 0")
    pooled = ours.forward_head(last, pre_logits=True)
    assert_same(pooled, theirs.forward_head(truth, pre_logits=True), "pooled")


@pytest.mark.parametrize(
    "name",
    [
        "deit_base_distilled_patch16_224",
        "vit_base_patch16_224",
        "vit_so400m_patch14_siglip_384",
        "vit_base_patch14_reg4_dinov2",
        "vit_base_patch16_dinov3_qkvb",
        "vit_dlittle_patch16_reg1_gap_256",
        "vit_dpwee_patch16_reg1_gap_256",
    ],
)
def test_published_architectures_have_all_tensors(name):
    published = timm.get_pretrained_cfg(name).to_dict()
    settings = {"architecture": name, "num_classes": 1000, "pretrained_cfg": published}
    config = FAMILIES["timm"].config_of(settings, "a test")
    with torch.device("meta"):
        theirs, ours = timm.create_model(name, num_classes=1000), ImageModel(config)
    found = FAMILIES["timm"].table(config).to_theirs(own_weights(ours))
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert {key: tensor.shape for key, tensor in found.items()} == shapes


class DualLambda(DiffAttention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, dual_lambda=True, **kwargs)


@pytest.mark.parametrize("name", [VIT, "vit_dpwee_patch16_reg1_gap_256"])
def test_dual_lambda_is_seen_in_the_tensors(name, tmp_path):
    from timm.models.vision_transformer import DiffParallelScalingBlock

    class DualBlock(DiffParallelScalingBlock):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, dual_lambda=True, **kwargs)

    custom = {"attn_layer": DualLambda} if name == VIT else {"block_fn": DualBlock}
    theirs = randomize(timm.create_model(name, **SIZE, **custom))
    arguments = {**SIZE, **(DIFF if name == VIT else {})}
    save_for_hf(theirs, tmp_path, model_args=arguments, safe_serialization=True)
    ours = read_model(tmp_path)
    assert ours.backbone.attentions[1].lambda_b.shape == (1,)
    x = images(theirs)
    compare_gradients(theirs, ours, lambda model, dtype: model(x.to(dtype)), "timm")
    with pytest.raises(ValueError, match="timm has no setting for dual_lambda=True"):
        write_model(ours, tmp_path / "back", "timm")


def test_preprocessing_and_class_names_come_along(tmp_path):
    model = randomize(timm.create_model(VIT, **SIZE | {"num_classes": 3}))
    model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 0.8}
    model.pretrained_cfg |= {"crop_mode": "squash", "interpolation": "bilinear"}
    labels = {"label_names": ["n1", "n2", "n3"], "label_descriptions": {"n1": "cat", "n3": "dog"}}
    arguments = SIZE | {"num_classes": 3}
    save_for_hf(model, tmp_path / "t", labels, arguments, safe_serialization=True)
    ours = read_model(tmp_path / "t")
    assert ours.job.class_names == ("cat", "n2", "dog")
    reader = make_reader(ours.job, "a test")
    assert reader.image_size == (32, 48)
    truth = resolve_model_data_config(model)
    for name in ("mean", "std", "crop_pct", "crop_mode", "interpolation"):
        assert getattr(reader, name) == truth[name]
        assert resolve_model_data_config(ours)[name] == truth[name]
    back = write_model(ours, tmp_path / "back", "timm")
    assert read_model(back).job == ours.job
    again = timm.create_model(f"local-dir:{back}", pretrained=True)
    for name, value in resolve_model_data_config(again).items():
        expected = (3, 32, 48) if name == "input_size" else truth[name]
        assert value == expected or tuple(value) == expected, name


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ({"1": "b", "0": "a", "2": "c"}, ("a", "b", "c")),
        (["x", "y", "z"], ("x", "y", "z")),
        ({"one": "a"}, None),
    ],
)
def test_names_of_classes_by_number(labels, found, tmp_path):
    saved(VIT, SIZE | {"num_classes": 3}, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"label_names": labels}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    if found is None:
        with pytest.raises(
            ValueError, match=r"label_names must have numbers as keys, got \['one'\]"
        ):
            read_model(tmp_path)
    else:
        assert read_model(tmp_path).job.class_names == found


@pytest.mark.parametrize(("tag", "named"), [("augreg_in21k_ft_in1k", True), ("mine", False)])
def test_models_of_imagenet_have_its_names(tag, named, tmp_path):
    model = randomize(timm.create_model(VIT, **SIZE | {"num_classes": 1000}))
    model.pretrained_cfg["tag"] = tag
    save_for_hf(model, tmp_path, model_args=SIZE | {"num_classes": 1000}, safe_serialization=True)
    names = read_model(tmp_path).job.class_names
    assert (names is not None and names[0] == "tench, Tinca tinca") == named


def test_older_files_have_everything_in_one_object(tmp_path):
    theirs = saved("deit_tiny_patch16_224", {"img_size": 32}, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= settings.pop("pretrained_cfg") | {"input_size": [3, 32, 32], "labels": None}
    del settings["model_args"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    x = torch.randn(1, 3, 32, 32)
    ours = read_model(tmp_path)
    assert_same(ours(x), theirs(x))
    assert ours.job.reader["init_args"]["crop_pct"] == 0.9


def settings_of(**changes):
    return {"architecture": VIT, "num_classes": 7, "model_args": {**SIZE, "num_classes": 7}} | (
        changes
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "resnet18", "model_args": {}},
            "architecture='resnet18', .* this one has .*ResNet",
        ),
        ({"architecture": "vit_enormous"}, "architecture='vit_enormous', .* that timm has"),
        ({"architecture": "hf-hub:a/b"}, "architecture='hf-hub:a/b', but diffmm can hold only"),
        ({"global_pool": "avg"}, "global_pool='avg', .* has 'token': set it in model_args"),
        ({"model_args": {"pretrained": True}}, "model_args.pretrained=True, but diffmm can hold"),
        ({"model_args": {"global_pool": "max"}}, "global_pool='max', but diffmm can hold only tok"),
        ({"model_args": {"scale_attn_norm": True}}, "scale_attn_norm=True, but diffmm can hold"),
        ({"model_args": {"scale_mlp_norm": True}}, "scale_mlp_norm=True, but diffmm can hold"),
        ({"model_args": {"act_layer": "relu"}}, "only vision transformers; this one has ReLU"),
        ({"model_args": {"pos_embed": "none"}}, "tokens have no positions"),
        ({"model_args": {"depth": "two"}}, "timm cannot build .* model_args={'depth': 'two'}: "),
        ({"model_args": {"depth": 0}}, "model_args.depth=0, but diffmm can hold at least 1"),
        ({"model_args": [1]}, r"model_args must be an object, got \[1\]"),
        ({"model_args": {"img_size": 12}}, "image_size 12x12 is smaller than a patch 16x16"),
        ({"teacher": "x"}, "settings that diffmm does not know, .*: teacher='x'"),
        (
            {"architecture": "vit_base_patch16_rope_224", "model_args": {}},
            "only vision transformers; this one has .*Rotary",
        ),
        (
            {"architecture": "eva02_tiny_patch14_224", "model_args": {}},
            "only vision transformers; this one has RotaryEmbeddingCat",
        ),
        (
            {"architecture": "vit_small_patch16_dinov3", "model_args": {"use_fc_norm": 3}},
            None,
        ),
        (
            {"architecture": "eva_giant_patch14_224", "model_args": {"depth": 1}},
            "rope_type=None, but diffmm can hold only 'dinov3'",
        ),
        (
            {"architecture": "vit_small_patch16_dinov3", "model_args": {"qkv_fused": False}},
            "qkv_fused=False, but diffmm can hold only True",
        ),
    ],
)
def test_what_diffmm_cannot_hold_is_refused(changes, message):
    if message is None:
        assert FAMILIES["timm"].config_of(settings_of(**changes), "a test").pool_norm
        return
    with pytest.raises(ValueError, match=message):
        FAMILIES["timm"].config_of(settings_of(**changes), "a test")


@pytest.mark.parametrize(
    ("encoder", "backbone", "message"),
    [
        ({}, {"rope": "2d"}, "timm cannot hold rope='2d'"),
        ({}, {"attention": "diff_v2"}, "timm cannot hold attention='diff_v2'"),
        ({}, {"norm_eps": 1e-4}, "timm cannot hold norm_eps=0.0001"),
        ({}, {"norm_eps": 1e-5, "feed_forward": "swiglu"}, "timm cannot hold norm_eps=1e-05"),
        ({"pool": "map"}, {"attention": "diff_v1"}, "timm cannot hold pool_heads=2"),
        ({"patch_bias": False}, {}, "timm cannot hold patch_bias=False"),
        ({}, {"attention": "diff_v1", "lambda_init": 0.8}, "timm cannot hold lambda_init=0.8"),
        ({}, {"num_kv_heads": 1}, "timm cannot hold num_kv_heads=1"),
    ],
)
def test_what_timm_cannot_hold_is_refused(encoder, backbone, message, tmp_path):
    plain = {"attention": "softmax", "norm": "layernorm", "feed_forward": "gelu"}
    plain |= {"qkv_bias": True, "out_bias": True, "feed_forward_bias": True}
    config = ImageConfig(
        backbone=BackboneConfig(24, 2, 2, **plain | backbone),
        image_size=16,
        patch_size=8,
        learned_positions=True,
        **encoder,
    )
    with pytest.raises(ValueError, match=message):
        write_model(ImageModel(config), tmp_path / "never", "timm")
    assert not (tmp_path / "never").exists()


OURS = {
    "attention pool": ({"pool": "map", "pool_width": 40, "num_reg_tokens": 2}, {}),
    "diff, attention pool": (
        {"pool": "map", "pool_heads": 2, "pool_width": 40},
        {"attention": "diff_v1"},
    ),
    "swiglu": ({}, {"feed_forward": "swiglu"}),
    "diff, rmsnorm, swiglu": (
        {"pool": "mean"},
        {"attention": "diff_v1", "norm": "rmsnorm", "norm_eps": 1e-6, "feed_forward": "swiglu"},
    ),
    "no class token, eps": ({"cls_token": False, "pool": "mean"}, {"norm_eps": 1e-5}),
    "distilled": ({"dist_token": True, "pool": "cls_dist", "head": "distilled"}, {}),
    "quick gelu, layer scale": ({}, {"feed_forward": "quick_gelu", "layer_scale": 0.2}),
    "normalized coordinates": (
        {"learned_positions": False, "rope_coordinates": "normalized"},
        {"rope": "2d", "rope_base": 50.0, "qkv_bias": "qv", "norm_eps": 1e-5, "layer_scale": 0.1,
         "dim": 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_a_model_of_diffmm_goes_to_timm(case, tmp_path):
    encoder, changes = OURS[case]
    settings = {"dim": 24, "depth": 2, "num_heads": 4, "attention": "softmax"}
    settings |= {"norm": "layernorm", "feed_forward": "gelu", "feed_forward_width": 40}
    settings |= {"qkv_bias": True, "out_bias": True, "feed_forward_bias": True}
    config = ImageConfig(
        backbone=BackboneConfig(**settings | changes),
        **{"image_size": (16, 24), "patch_size": 8, "num_classes": 3, "learned_positions": True}
        | encoder,
    )
    ours = randomize(ImageModel(config))
    ours.job = Job(class_names=("a", "b", "c"))
    folder = write_model(ours, tmp_path / "timm", "timm")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 16, 24)
    assert_same(theirs(x), ours(x))
    assert json.loads(Path(folder / "config.json").read_text())["label_names"] == ["a", "b", "c"]


def test_missing_and_surplus_tensors_are_all_named(tmp_path):
    saved(VIT, SIZE, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["blocks.0.extra"] = tensors.pop("blocks.1.mlp.fc1.weight")
    tensors["teacher"] = tensors.pop("norm.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="2 missing .*; 2 not expected") as error:
        read_model(tmp_path)
    for name in ("blocks.0.extra", "blocks.1.mlp.fc1.weight", "teacher", "norm.bias"):
        assert name in str(error.value)
