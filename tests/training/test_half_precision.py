"""Weights in 16 bits: input features keep their precision, and AdamW works."""

import pytest
import torch
from lightning.pytorch import Callback

from diffmm.training import OptimizerConfig
from diffmm.training.optimizer import check_eps

HALF = ("bf16-true", "16-true")


class Watch(Callback):
    """Records the inputs of the model, and the losses."""

    def __init__(self):
        self.batches, self.losses = [], []

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.batches.append(batch)

    def on_validation_batch_start(self, trainer, task, batch, batch_idx):
        self.batches.append(batch)

    def on_train_batch_end(self, trainer, *args):
        self.losses.append(trainer.callback_metrics["train/loss"].item())


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("audio", "waveforms"),
        ("audio_text", "waveforms"),
        ("audio_captions", "waveforms"),
        ("audio_ctc", "waveforms"),
        ("audio_mae", "waveforms"),
        ("image_mae", "images"),
    ],
)
def test_data_are_not_rounded(make, fit, precision, name, field):
    watch, batch = Watch(), make.batch(name)
    task = make.task(name, optimizer=OptimizerConfig(1e-3, eps=1e-3))
    fit(task, [batch], [batch], precision=precision, limit_train_batches=1, callbacks=[watch])
    assert len(watch.batches) == 2
    assert all(torch.equal(seen[field], batch[field]) for seen in watch.batches)


def test_other_fields_are(make, fit):
    """Inputs have the weights' dtype, so that models such as timm's accept them."""
    watch, batch = Watch(), make.batch("image")
    fit(make.task("image"), [batch], precision="bf16-true", callbacks=[watch])
    assert watch.batches[0]["images"].dtype == torch.bfloat16


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("name", ["audio_mae", "image_mae"])
def test_targets_of_faint_patterns_are_those_of_float32(make, fit, precision, name):
    """A pattern far fainter than its background, which bfloat16 cannot represent."""
    batch = make.batch(name)
    if name == "image_mae":
        batch["images"] = 2.0 + 1e-3 * batch["images"]
    else:
        tone = 0.9 * torch.sin(0.1 * torch.arange(2000))
        batch["waveforms"] = tone + 1e-4 * batch["waveforms"]
    losses = []
    for each in ("32-true", precision):
        torch.manual_seed(0)
        watch, task = Watch(), make.task(name, optimizer=OptimizerConfig(1e-3, eps=1e-3))
        fit(task, [batch], precision=each, callbacks=[watch], logger=False)
        losses += watch.losses
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(("causal_lm", precision) for precision in HALF),
        *(("image_text", precision) for precision in HALF),
        *((name, "16-true") for name in ("image", "image_captions", "audio_ctc")),
        *((name, "bf16-true") for name in ("audio", "image_cross_captions")),
    ],
)
def test_weights_in_16_bits_learn_as_those_in_32(make, fit, precision, name):
    batch, losses = make.batch(name), []
    for each in ("32-true", precision):
        torch.manual_seed(0)
        watch = Watch()
        optimizer = OptimizerConfig(1e-3, eps=2.5e-4)
        task = make.task(name, optimizer=optimizer)
        fit(task, [batch], precision=each, max_steps=15, callbacks=[watch], logger=False)
        losses.append(watch.losses)
    assert losses[0][-1] < 0.99 * losses[0][0]
    # The contrastive loss falls to a tenth, and with it what an error is relative to.
    assert losses[1] == pytest.approx(losses[0], rel=0.05 if name == "image_text" else 0.02)


def test_an_eps_that_float16_loses_is_refused(make, fit):
    message = (
        r"eps=1e-08 is too small for weights in float16, where squares of gradients below "
        r"0.000244 are 0: give the optimizer an eps of at least 0.00025, or train with precision "
        r"16-mixed or bf16-true"
    )
    with pytest.raises(ValueError, match=message):
        fit(make.task("image"), [make.batch("image")], precision="16-true")
    fit(make.task("image"), [make.batch("image")], precision="bf16-true", logger=False)
    check_eps(2.5e-4, torch.float16)
    with pytest.raises(ValueError, match="eps=1e-30 is too small for weights in float32"):
        check_eps(1e-30, torch.float32)
