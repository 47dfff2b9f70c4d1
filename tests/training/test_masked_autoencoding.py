"""Masked patches are a function of seed, epoch and sample."""

import pytest
import torch
from lightning.pytorch import Callback

from diffmm.training.masked_autoencoding import NOISE, mask_noise


def test_noise_belongs_to_a_sample():
    index = torch.tensor([7, 1000, 3])
    noise = mask_noise(index, 64, seed=5, epoch=2)
    assert noise.shape == (3, 64)
    assert noise.min() >= 0.0
    assert noise.max() < 1.0
    assert torch.equal(mask_noise(index.flip(0), 64, seed=5, epoch=2), noise.flip(0))
    assert torch.equal(mask_noise(index[1:], 64, seed=5, epoch=2), noise[1:])
    assert not torch.equal(noise[0], noise[1])
    for other in ({"seed": 6, "epoch": 2}, {"seed": 5, "epoch": 3}, {"seed": 5, "epoch": None}):
        assert not torch.equal(mask_noise(index, 64, **other), noise)


def test_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    mask_noise(torch.arange(3), 8, seed=0, epoch=0)
    assert torch.equal(torch.get_rng_state(), before)


class Recorded(Callback):
    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.train.append(batch[NOISE])

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.val.append(batch[NOISE])


@pytest.mark.parametrize("name", ["image_mae", "audio_mae"])
def test_training_masks_change_with_the_epoch_and_others_never(name, make, fit):
    recorded, batch = Recorded(), make.batch(name)
    task = make.task(name, seed=3)
    fit(task, [batch], [batch], max_steps=6, limit_train_batches=2, callbacks=[recorded])
    first, again, second = recorded.train[0], recorded.train[1], recorded.train[2]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(first, mask_noise(batch["index"], first.shape[1], seed=3, epoch=0))
    assert len(recorded.val) == 3
    assert all(torch.equal(noise, recorded.val[0]) for noise in recorded.val)
    assert not torch.equal(recorded.val[0], first)


def test_the_mask_is_the_one_of_the_noise(make):
    task, batch = make.task("image_mae").eval(), make.batch("image_mae")
    batch[NOISE] = mask_noise(batch["index"], 16, seed=0, epoch=None)
    prediction = task.predict_step(batch)
    hidden = batch[NOISE].argsort(dim=1).argsort(dim=1) >= 4
    assert torch.equal(prediction["mask"], hidden)
    assert prediction["prediction"].shape == (6, 16, 12)


def test_the_loss_weighs_every_hidden_patch_the_same(make):
    """Clips of different lengths in batches of any size."""
    task, batch = make.task("audio_mae").eval(), make.batch("audio_mae")
    batch[NOISE] = mask_noise(batch["index"], 16, seed=0, epoch=None)
    batch["num_samples"][:3] = 400
    values = []
    for split in ([6], [1, 5], [3, 3]):
        metrics = task.make_metrics()
        for part in zip(*(tensor.split(split) for tensor in batch.values()), strict=True):
            with torch.no_grad():
                task.update_metrics(dict(zip(batch, part, strict=True)), metrics)
        values.append(metrics["loss"].compute())
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(values[2], values[0], rtol=1e-5, atol=0)
