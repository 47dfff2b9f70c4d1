"""Every dataclass of settings rejects invalid numbers."""

import dataclasses
import importlib
import math
import pkgutil
from typing import get_type_hints

import numpy as np
import pytest

import datamodules
import diffmm.models
import diffmm.training
from datamodules.audio.augment import AudioAugment
from datamodules.image.reader import ImageReader
from datamodules.image.transform import ImageTransform
from datamodules.pairs import ImageAudioTextReader
from datamodules.pairs.image_text import ImageTextReader
from datamodules.shared.bad_samples import BadSamples
from datamodules.text.retrieval.sources import AssociativeRecall, ManyShot, Needles
from diffmm.checks import Settings, check_count, counted, number_fault, reason_of, shown_name
from diffmm.layers.rope_scaling import RopeScaling
from diffmm.models import (
    AudioConfig,
    BackboneConfig,
    ContrastiveConfig,
    ImageConfig,
    MaskedAutoencoderConfig,
    TextConfig,
    TextTowerConfig,
)
from diffmm.training import LoRAConfig, MixingConfig, OptimizerConfig, ScheduleConfig

BACKBONE = BackboneConfig(16, 1, 2, attention="diff_v1", rope="2d")
IMAGE = ImageConfig(backbone=BACKBONE, image_size=8, patch_size=4)
VALID: tuple[Settings, ...] = (
    BACKBONE,
    RopeScaling("linear", factor=2.0),
    TextConfig(8, 8, dataclasses.replace(BACKBONE, rope="1d")),
    AudioConfig(backbone=BACKBONE, sample_rate_hz=16000),
    MaskedAutoencoderConfig(encoder=IMAGE, decoder=BACKBONE),
    ContrastiveConfig(
        image=IMAGE,
        text=TextTowerConfig(8, 8, dataclasses.replace(BACKBONE, rope="none")),
        embed_dim=4,
        init_bias=-10.0,
    ),
    OptimizerConfig(1e-3),
    ScheduleConfig(10),
    MixingConfig(mixup_alpha=0.5),
    LoRAConfig(),
    AudioAugment(),
    BadSamples(),
    Needles(depth=0.5),
    AssociativeRecall(),
    ManyShot(),
    ImageTransform(),
    ImageReader(
        image_size=(8, 8),
        channels=1,
        interpolation="bicubic",
        crop_pct=1.0,
        crop_mode="center",
        mean=(0.5,),
        std=(0.5,),
    ),
    ImageTextReader(
        tokenizer="bytes",
        image_size=(8, 8),
        channels=1,
        interpolation="bicubic",
        crop_pct=1.0,
        crop_mode="center",
        mean=(0.5,),
        std=(0.5,),
    ),
    ImageAudioTextReader(
        tokenizer="bytes",
        image_size=(8, 8),
        channels=1,
        interpolation="bicubic",
        crop_pct=1.0,
        crop_mode="center",
        mean=(0.5,),
        std=(0.5,),
        sample_rate_hz=8000,
    ),
)
WRONG = (math.nan, math.inf, -math.inf, 1e300, 1e-300)


def all_settings():
    """Every dataclass in the packages whose classes recipes name."""
    for package in (diffmm.models, diffmm.training, datamodules):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for value in vars(importlib.import_module(found.name)).values():
                if isinstance(value, type) and dataclasses.is_dataclass(value):
                    yield value


def float_fields(cls):
    """Fields that are numbers, or contain some."""
    hints = get_type_hints(cls)
    return [f.name for f in dataclasses.fields(cls) if "float" in str(hints[f.name])]


def test_every_dataclass_of_settings_is_one():
    settings = {cls for cls in all_settings() if float_fields(cls)}
    # What a replay finds, and the arguments of `generate`, which may be as extreme as they like.
    others = {cls for cls in settings if cls.__name__ in ("MicroBatch", "Sampling")}
    assert settings - others == {type(valid) for valid in VALID}
    assert all(issubclass(cls, Settings) for cls in settings - others)


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("valid", VALID, ids=lambda valid: type(valid).__name__)
def test_its_numbers_are_ones_that_a_run_can_mean(valid, value):
    for name in float_fields(type(valid)):
        is_pair = "tuple" in str(get_type_hints(type(valid))[name])
        for wrong in (value, (0.5, value)) if is_pair else (value,):
            with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
                dataclasses.replace(valid, **{name: wrong})


def test_counts_too():
    with pytest.raises(ValueError, match="total_steps must be at most 1,000,000,000,000,000 in si"):
        ScheduleConfig(10**16)


@pytest.mark.parametrize("value", [0, -1, 10**15, 0.0, -0.0, 1e-45, -1e30, True, None, "nan", []])
def test_other_values_are_no_fault(value):
    assert number_fault(value) is None


def test_the_reason_of_an_error_is_one_line():
    assert reason_of(ValueError("\n first\nsecond")) == "first"
    assert reason_of(TimeoutError()) == "TimeoutError"
    assert reason_of(OSError(" \n")) == "OSError"


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", None])
def test_a_count_is_an_integer_of_at_least_1(value):
    for valid in (1, np.int64(3)):
        check_count("top_k", valid)
    with pytest.raises(ValueError, match=f"top_k must be an integer of at least 1, got {value!r}"):
        check_count("top_k", value)


@pytest.mark.parametrize("name", ["cat", "été", "big dog", "7", "it's", "a/b"])
def test_plain_names_are_shown_as_they_are(name):
    assert shown_name(name) == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat, big", '"cat, big"'),
        ("a;b", '"a;b"'),
        ('dog "rex"', r'"dog \"rex\""'),
        ("line\nbreak", r'"line\nbreak"'),
        ("a\u2028b", r'"a\u2028b"'),
        (" a", '" a"'),
        ("", '""'),
    ],
)
def test_names_that_look_like_several_are_quoted(name, shown):
    assert shown_name(name) == shown


def test_one_is_in_the_singular():
    assert [counted(n, "sample") for n in (0, 1, 1200)] == [
        "0 samples",
        "1 sample",
        "1,200 samples",
    ]
