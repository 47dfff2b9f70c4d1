"""Common properties of image and audio models: the backbone is a normal module."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffmm.models import (
    AudioConfig,
    AudioModel,
    BackboneConfig,
    ImageConfig,
    ImageModel,
    MaskedAutoencoder,
    MaskedAutoencoderConfig,
)

BACKBONE = BackboneConfig(dim=32, depth=2, num_heads=4, rope="2d")


def image(num_classes=3):
    return ImageModel(
        ImageConfig(backbone=BACKBONE, image_size=8, patch_size=4, num_classes=num_classes)
    )


def audio():
    return AudioModel(
        AudioConfig(backbone=BACKBONE, sample_rate_hz=8000, num_mels=32, num_classes=3)
    )


def masked():
    return MaskedAutoencoder(MaskedAutoencoderConfig(image(0).config, BACKBONE))


INPUTS = {
    image: torch.randn(2, 3, 8, 8),
    audio: torch.randn(2, 4000),
    masked: torch.ones(2, 3, 8, 8),
}
CALLS = {
    image: ("__call__", "forward_features", "forward_intermediates"),
    audio: ("__call__", "forward_features", "forward_intermediates"),
    masked: ("__call__",),
}


@torch.no_grad()
@pytest.mark.parametrize(("make", "call"), [(make, call) for make in CALLS for call in CALLS[make]])
def test_hooks_and_compilation_of_the_backbone_take_effect(make, call):
    model = make().eval()
    backbone = model.encoder.backbone if make is masked else model.backbone
    inputs, seen = INPUTS[make], []
    backbone.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.manual_seed(1)
    expected = getattr(model, call)(inputs)
    assert len(seen) == 1
    if call == "__call__":
        assert isinstance(seen[0], torch.Tensor)
    counter = CompileCounterWithBackend("eager")
    backbone.compile(backend=counter)
    torch.manual_seed(1)
    torch.testing.assert_close(getattr(model, call)(inputs), expected)
    assert counter.frame_count == 1
