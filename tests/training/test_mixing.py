"""Mixup, cutmix, label smoothing and SpecAugment."""

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torchaudio.transforms import SpecAugment

from diffmm.training import Classification, MixingConfig, OptimizerConfig, ScheduleConfig
from diffmm.training.mixing import mix, numpy_seeded

IMAGES = torch.arange(6.0)[:, None, None, None].expand(6, 3, 8, 8)
"""Images whose pixels all equal the index of the image."""


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
def test_targets_are_mixed_as_the_inputs(kind, mode):
    config = MixingConfig(**{kind: 1.0}, mode=mode)
    mixed, weights = mix(IMAGES, config, key=(0,))
    assert not torch.equal(mixed, IMAGES)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(6))
    # The mean of a mixed image is the weighted mean of its source images.
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), weights.float() @ torch.arange(6.0))


def test_it_is_timm_s(make):
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 6])
    config = MixingConfig(mixup_alpha=0.8, cutmix_alpha=1.0, mode="elem")
    timm = Mixup(0.8, 1.0, mode="elem", label_smoothing=0.1, num_classes=7)
    with numpy_seeded((3, 4)):
        their_images, their_targets = timm(images.clone(), labels)
    ours, weights = mix(images, config, key=(3, 4))
    assert torch.equal(ours, their_images)
    targets = weights @ torch.nn.functional.one_hot(labels, 7).float()
    logits = torch.randn(6, 7)
    task = make.task("image", label_smoothing=0.1)
    loss = task.loss(logits, targets, task.label_smoothing).mean()
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits, their_targets))
    plain = task.loss(logits, labels, 0.1).mean()
    torch.testing.assert_close(plain, LabelSmoothingCrossEntropy(0.1)(logits, labels))


def test_the_key_decides_and_nothing_else():
    config = MixingConfig(mixup_alpha=1.0)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    first = mix(IMAGES, config, key=(1, 2, 3))[1]
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.seed(6)
    assert torch.equal(mix(IMAGES, config, key=(1, 2, 3))[1], first)
    assert not torch.equal(mix(IMAGES, config, key=(1, 2, 4))[1], first)


def test_the_inputs_are_left_alone():
    images = IMAGES.clone()
    mix(images, MixingConfig(mixup_alpha=1.0), key=(0,))
    assert torch.equal(images, IMAGES)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("name", ["image", "audio"])
def test_mixtures_train(name, multi_label, make, fit):
    mixing = MixingConfig(mixup_alpha=0.5)
    task = make.task(name, mixing=mixing, multi_label=multi_label, label_smoothing=0.1)
    batch = make.batch(name)
    if multi_label:
        batch["labels"] = torch.nn.functional.one_hot(batch["labels"], 7).float()
        batch["labels"][:, 0] = 1.0
        batch["labels"][1, 1:] = 1.0
    trainer = fit(task, [batch], [batch], max_steps=3, limit_train_batches=3)
    metric = "val/mean_average_precision" if multi_label else "val/accuracy"
    assert 0.0 <= trainer.callback_metrics[metric] <= 1.0
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_a_mixture_of_sounds_is_as_long_as_the_longer(make, fit, monkeypatch):
    task = make.task("audio", mixing=MixingConfig(mixup_alpha=1.0))
    batch, seen = make.batch("audio"), []
    forward = task.model.forward
    monkeypatch.setattr(
        task.model, "forward", lambda *inputs: (seen.append(inputs), forward(*inputs))[1]
    )
    fit(task, [batch])
    waveforms, num_samples = seen[0]
    lengths = batch["num_samples"]
    assert torch.equal(num_samples, torch.maximum(lengths, lengths.flip(0)))
    for waveform, length in zip(waveforms, num_samples, strict=True):
        assert waveform[length - 1] != 0.0
        assert not waveform[length:].any()


def test_multi_label_metrics_and_loss(make):
    task = make.task("image", multi_label=True).eval()
    batch = make.batch("image")
    batch["labels"] = torch.rand(6, 7).round()
    logits = task.model(batch["images"])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"])
    torch.testing.assert_close(task.training_loss(batch, 0), expected)


def test_validation_neither_mixes_nor_smooths(make):
    batch = make.batch("image")
    plain = make.task("image").eval()
    task = make.task("image", mixing=MixingConfig(mixup_alpha=1.0), label_smoothing=0.3).eval()
    task.model.load_state_dict(plain.model.state_dict())
    for other in (plain, task):
        other.update_metrics(batch, dict(other.metrics["val"].items()))
    expected = plain.metrics["val"]["loss"].compute()
    torch.testing.assert_close(task.metrics["val"]["loss"].compute(), expected)


def test_specaugment_is_for_training(make, fit):
    torch.manual_seed(0)
    augment = SpecAugment(n_time_masks=1, time_mask_param=8, n_freq_masks=1, freq_mask_param=4)
    task = Classification(
        make.audio(), OptimizerConfig(1e-3), ScheduleConfig(10, kind="constant"), augment=augment
    )
    batch = make.batch("audio")
    fit(task, [batch], [batch], max_steps=1, limit_train_batches=1)
    task.train()
    assert task.training_loss(batch, 0) != task.training_loss(batch, 0)
    task.eval()
    assert task.training_loss(batch, 0) == task.training_loss(batch, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "mixing needs mixup_alpha or cutmix_alpha above 0"),
        ({"mixup_alpha": -1.0}, "mixup_alpha must not be negative, got -1.0"),
        ({"mixup_alpha": 1.0, "probability": 2.0}, r"probability must be in \[0, 1\], got 2.0"),
        ({"mixup_alpha": 1.0, "mode": "pairs"}, "got 'pairs'; did you mean 'pair'?"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MixingConfig(**settings)


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ValueError, match="must be even, got 5"):
        mix(IMAGES[:5], MixingConfig(mixup_alpha=1.0), key=(0,))
    with pytest.raises(ValueError, match="cutmix is for images"):
        mix(torch.zeros(4, 100), MixingConfig(cutmix_alpha=1.0), key=(0,))
