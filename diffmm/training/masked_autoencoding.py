"""Masked autoencoding of images and audio."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from diffmm.batch import AudioBatch, ImageBatch, inputs_of, size_of
from diffmm.models.job import Job
from diffmm.models.masked_autoencoder import MaskedAutoencoder, MaskedPrediction
from diffmm.training.accumulation import LossSum
from diffmm.training.batches import with_index
from diffmm.training.finetuning import FineTuneConfig
from diffmm.training.metrics import RatioOfSums
from diffmm.training.optimizer import OptimizerConfig
from diffmm.training.schedule import ScheduleConfig
from diffmm.training.task import Task

NOISE = "mask_noise"
"""Batch field with the noise that determines which patches are masked, `[B, N]` in [0, 1)."""


class MaskedAutoencoding(Task):
    """Squared error averaged over all masked patches of an optimizer step (He et al. 2022).

    The mask of a sample is drawn from the seed, the epoch and the sample's index. It therefore
    does not depend on batches or processes, and a resumed run draws the same masks; in evaluation
    the masks are the same every time. For batches without an index, training masks come from
    torch's generator, and evaluation masks from the seed and the sample's position in its batch. In
    addition to the metrics of every task, it logs `val/loss`.

    Args:
        model: Masked autoencoder to train.
        optimizer, schedule, finetune, compile, activation_checkpointing, fp8: See `Task`.
        seed: Seed of the masks.
    """

    model: MaskedAutoencoder

    def __init__(
        self,
        model: MaskedAutoencoder,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        *,
        seed: int = 0,
        finetune: FineTuneConfig | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
        fp8: bool = False,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            schedule,
            finetune=finetune,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
            fp8=fp8,
        )
        self.seed = seed

    def make_job(self, data: Any) -> Job:
        # The data may have classes, but the model predicts none.
        return replace(super().make_job(data), class_names=None)

    def layouts(self) -> list[Sequence[str]]:
        # Labeled samples are accepted, too.
        return [*super().layouts(), (*self._inputs(), "labels")]

    def prepared(self, batch: Any) -> Any:
        batch = super().prepared(batch)
        if NOISE in batch:
            return batch
        epoch = self.current_epoch if self.trainer.training else None
        inputs = inputs_of(self.model, batch)
        num_patches = self.model.encoder.num_patches(*inputs)
        if "index" in batch:
            noise = mask_noise(batch["index"], num_patches, seed=self.seed, epoch=epoch)
        elif epoch is None:
            places = torch.arange(size_of(inputs))
            noise = mask_noise(places, num_patches, seed=self.seed, epoch=None)
        else:
            noise = torch.rand(size_of(inputs), num_patches)
        return {**batch, NOISE: noise.to(inputs[0].device)}

    def predicted(self, batch: ImageBatch | AudioBatch) -> MaskedPrediction:
        """Return the model's prediction for a batch."""
        return self.model(*inputs_of(self.model, batch), noise=batch.get(NOISE))

    def loss_sum(self, batch: ImageBatch | AudioBatch, batch_idx: int) -> LossSum:
        loss, _, mask = self.predicted(batch)
        count = mask.sum().float()
        return LossSum(loss * count, count)

    def make_metrics(self) -> dict[str, Metric]:
        return {"loss": RatioOfSums()}

    def update_metrics(self, batch: ImageBatch | AudioBatch, metrics: dict[str, Metric]) -> None:
        loss, _, mask = self.predicted(batch)
        metrics["loss"].update(loss * mask.sum(), mask.sum())

    def predict_step(self, batch: ImageBatch | AudioBatch, batch_idx: int = 0) -> dict[str, Tensor]:
        """Return the prediction of every patch, `[B, N, P]`, and the mask, `[B, N]`."""
        _, prediction, mask = self.predicted(batch)
        return with_index(batch, prediction=prediction, mask=mask)


def mask_noise(index: Tensor, num_patches: int, *, seed: int, epoch: int | None) -> Tensor:
    """Draw noise for the patches of each sample, as a function of `(seed, epoch, index)` alone.

    Args:
        index: Positions of the samples in their dataset, `[B]`.
        num_patches: Number of patches per sample, `N`.
        seed: Seed of the run.
        epoch: Epoch, counted from 0; `None` for the fixed draw of evaluation.

    Returns:
        `[B, N]` float32 in [0, 1), on the CPU.
    """
    stream = 0 if epoch is None else epoch + 1
    noise = torch.empty(len(index), num_patches)
    for row, sample in zip(noise, index.tolist(), strict=True):
        sequence = np.random.SeedSequence([seed, stream, sample])
        state = int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
        row.uniform_(generator=torch.Generator().manual_seed(state))
    return noise
