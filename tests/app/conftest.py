"""Small untrained models of each kind, and files for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image
from torch import nn

from datamodules import AudioTextData, ImageTextData
from datamodules.audio import AudioReader
from datamodules.image import ImageReader
from datamodules.pairs import RenderedShapes
from diffmm import TrainedModel
from diffmm.models import (
    AudioConfig,
    AudioModel,
    BackboneConfig,
    CaptioningConfig,
    CaptioningModel,
    ContrastiveConfig,
    ContrastiveModel,
    CTCConfig,
    CTCModel,
    ImageConfig,
    ImageModel,
    TextConfig,
    TextModel,
    TextTowerConfig,
)
from diffmm.models.job import Job, text_reader

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def backbone(rope: str, attention: str = "diff_v2") -> BackboneConfig:
    return BackboneConfig(32, 2, 4, rope=rope, init_std=0.2, attention=attention)


def image_config(num_classes: int = 0) -> ImageConfig:
    return ImageConfig(
        backbone=backbone("2d"), image_size=16, patch_size=4, num_classes=num_classes
    )


@pytest.fixture
def classifier() -> TrainedModel:
    """A classifier of images of three classes."""
    reader = ImageReader(
        image_size=(16, 16),
        channels=3,
        interpolation="bicubic",
        crop_pct=1.0,
        crop_mode="center",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    job = Job(reader=reader.describe(), class_names=("cat", "<dog>", "bird"), recipe="image/test")
    return TrainedModel(ImageModel(image_config(3)), job)


@pytest.fixture
def sound_classifier() -> TrainedModel:
    """A multi-label classifier of sounds with diff_v1."""
    config = AudioConfig(
        backbone=backbone("2d", "diff_v1"), sample_rate_hz=8000, num_mels=32, num_classes=2
    )
    reader = AudioReader(sample_rate_hz=8000).describe()
    return TrainedModel(
        AudioModel(config), Job(reader=reader, class_names=("tone", "click"), multi_label=True)
    )


@pytest.fixture
def decoder() -> TrainedModel:
    """A decoder of bytes."""
    config = TextConfig(vocab_size=259, max_length=160, backbone=backbone("1d"))
    return TrainedModel(TextModel(config), Job(reader=text_reader("bytes"), recipe="text/test"))


@pytest.fixture
def chatting(decoder: TrainedModel) -> TrainedModel:
    """A decoder of conversations."""
    reader = text_reader("bytes")
    reader["init_args"]["chat_template"] = CHAT
    return TrainedModel(decoder.model, Job(reader=reader))


@pytest.fixture
def make_contrastive() -> Callable[..., TrainedModel]:
    """`make_contrastive(init_bias=-3.0)` creates a contrastive model of images and texts."""

    def make(**changes: Any) -> TrainedModel:
        tower = TextTowerConfig(259, 40, backbone("none"), causal=False, pool="mean")
        config = ContrastiveConfig(image=image_config(), text=tower, embed_dim=10, **changes)
        data = ImageTextData(RenderedShapes(4, 4), image_size=16, max_tokens=40)
        job = Job(reader=data.describe_inputs()["reader"], recipe="image_text/test")
        return TrainedModel(ContrastiveModel(config), job)

    return make


@pytest.fixture
def contrastive(make_contrastive: Callable[..., TrainedModel]) -> TrainedModel:
    """A contrastive model without a bias."""
    return make_contrastive()


@pytest.fixture
def captioner() -> TrainedModel:
    """A captioning model of images, whose texts depend on its input."""
    text = TextConfig(vocab_size=259, max_length=60, backbone=backbone("1d"))
    model = CaptioningModel(CaptioningConfig(encoder=image_config(), decoder=text))
    nn.init.normal_(model.decoder.embedding.weight)
    data = ImageTextData(RenderedShapes(4, 4), image_size=16, max_tokens=40)
    return TrainedModel(model, Job(reader=data.describe_inputs()["reader"]))


@pytest.fixture
def transcriber() -> TrainedModel:
    """A CTC model of sounds."""
    encoder = AudioConfig(
        backbone=backbone("1d", "diff_v1"), sample_rate_hz=8000, num_mels=32, stem="frame"
    )
    model = CTCModel(CTCConfig(encoder=encoder, vocab_size=259, blank_id=256))
    data = AudioTextData(sample_rate_hz=8000, max_tokens=40)
    return TrainedModel(model, Job(reader=data.describe_inputs()["reader"]))


@pytest.fixture
def picture(tmp_path: Path) -> str:
    """The path of an image."""
    path = tmp_path / "a picture.png"
    pixels = np.random.default_rng(0).integers(256, size=(20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def sound(tmp_path: Path) -> str:
    """The path of a sound."""
    path = tmp_path / "chirp.wav"
    soundfile.write(path, 0.5 * np.sin(np.cumsum(np.linspace(0.05, 2.0, 9000))), 8000)
    return str(path)


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """The path of a file that is no image, whatever its name."""
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return str(path)
