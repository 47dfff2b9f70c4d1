"""The examples of docs/extending.md run, and the objects that they register work."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from diffmm.analysis.attention_maps import attention_maps
from diffmm.layers.attention import ATTENTIONS
from diffmm.layers.norm import NORMS
from diffmm.models import BackboneConfig, ImageConfig, ImageModel, TextConfig, TextModel
from diffmm.models.encoder import HEADS
from diffmm.training import OptimizerConfig
from diffmm.training.callbacks import differential_layers
from diffmm.training.optimizer import parameter_groups

FOLDER = Path(__file__).parents[1] / "docs/examples"


def load(name):
    """An example, which registers its objects even if another test has imported it before."""
    if name in sys.modules:
        return importlib.reload(sys.modules[name])
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def example():
    """`example("video")` imports docs/examples/video.py."""
    registries = (ATTENTIONS, NORMS, HEADS)
    before = [dict(registry) for registry in registries]
    sys.path.insert(0, str(FOLDER))
    yield load
    sys.path.remove(str(FOLDER))
    for registry, names in zip(registries, before, strict=True):
        for name in registry.keys() - names.keys():
            del registry[name]


@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec", "ignore:.*does not have many workers", "ignore:You defined a `validation"
)
def test_video_learns_which_way_squares_move(example):
    video = example("video")
    assert len((FOLDER / "video.py").read_text().splitlines()) <= 120
    assert video.train(steps=100) > 0.9  # 0.25 by chance


def test_dense_learns_shapes_and_boxes(example):
    shapes, boxes = example("dense").train(steps=45)
    assert shapes > 0.25
    assert boxes > 0.4


def test_transcription_learns_syllables(example):
    transcription = example("transcription")
    assert transcription.train(steps=75) < 0.4
    assert transcription.train(steps=1) > 0.8


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2"])
def test_video_has_what_every_encoder_has(example, attention):
    video = example("video")
    backbone = BackboneConfig(48, 2, 2, attention=attention, rope="3d")
    sizes = {"video_size": (4, 8, 8), "patch_size": (2, 4, 4)}
    config = video.VideoConfig(backbone=backbone, num_classes=3, learned_positions=True, **sizes)
    model = video.VideoModel(config).eval()
    clip = torch.randn(2, 1, 4, 8, 8)
    maps = attention_maps(model, clip)
    assert maps[0].combined.shape[-2:] == (9, 9)  # a class token and 2 x 2 x 2 patches
    groups = parameter_groups(model, OptimizerConfig(1e-3))
    decaying = {id(p) for group in groups if group["name"] == "decay" for p in group["params"]}
    assert id(model.stem.weight) in decaying
    model.reset_classifier(5)
    assert model(clip).shape == (2, 5)
    # A clip reversed in time is another clip.
    assert not torch.allclose(model(clip), model(clip.flip(2)), atol=1e-4)


def test_a_norm_and_a_head_of_ones_own(example):
    own = example("own_parts")
    backbone = BackboneConfig(32, 2, 4, rope="2d", norm="scale_norm")
    config = ImageConfig(
        backbone=backbone, image_size=8, patch_size=4, num_classes=3, head="cosine"
    )
    model = ImageModel(config)
    assert isinstance(model.backbone.norm, own.ScaleNorm)
    assert isinstance(model.head, own.CosineHead)
    logits = model(torch.randn(2, 3, 8, 8))
    assert logits.abs().max() <= 10.0
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_attention_of_ones_own_is_seen_everywhere(example):
    own = example("own_attention")
    backbone = BackboneConfig(32, 2, 4, rope="1d", attention="uniform_noise", combine="add")
    model = TextModel(TextConfig(20, 8, backbone))
    assert list(differential_layers(model)) == [0, 1]
    layer = attention_maps(model, torch.randint(20, (1, 6)))[0]
    rows = torch.arange(1, 7).reciprocal()
    torch.testing.assert_close(layer.components[1][0, 0, :, 0], rows)  # uniform over the past
    expected = -torch.tensor(-2.0).sigmoid()
    torch.testing.assert_close(layer.lam, expected.expand_as(layer.lam))
    assert own.UniformNoiseAttention.label == "uniform noise"
    groups = {group["name"] for group in parameter_groups(model, OptimizerConfig(1e-3))}
    assert groups == {"decay", "no_decay", "lambda"}
    with pytest.raises(ValueError, match="share='q' is not used by attention 'uniform_noise'"):
        BackboneConfig(32, 2, 4, attention="uniform_noise", share="q")
