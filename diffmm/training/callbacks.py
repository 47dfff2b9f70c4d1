"""Callbacks that log the lambda of every layer and the training throughput."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from diffmm.batch import samples_of, size_of
from diffmm.layers.attention import Attention
from diffmm.models.backbone import Backbone
from diffmm.models.modes import evaluating
from diffmm.training.lightning_internals import is_logging_step
from diffmm.training.parallel import data_share
from diffmm.training.step_log import log_step


class LambdaMonitor(Callback):
    """Logs the mean lambda of each differential layer as `lambda/layer_00`, `lambda/layer_01`, ...

    Where lambda differs per head and token, the mean is taken over the heads and tokens of the
    batch's first sample. It is measured at logging steps by an additional, uncompiled forward pass
    of that sample in evaluation mode and without gradients. Training itself therefore needs no
    hooks (which compiled and recomputed blocks do not support), draws the same random numbers with
    and without this callback, and is not slowed down.

    The layers of a second backbone (the decoder of a masked autoencoder, the text tower of a
    contrastive model) are not logged.
    """

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not is_logging_step(trainer):
            return
        layers = differential_layers(pl_module)
        if not layers:
            return
        sample = samples_of(batch, slice(1))
        with trainer.precision_plugin.forward_context():
            means = mean_lambdas(pl_module, layers, sample)
        for index, mean in means.items():
            log_step(pl_module, f"lambda/layer_{index:02d}", mean)


def differential_layers(module: nn.Module) -> dict[int, Attention]:
    """Return the differential attention layers of a module's first backbone, by layer index."""
    layers: dict[int, Attention] = {}
    backbones = (part for part in module.modules() if isinstance(part, Backbone))
    for layer in next(backbones, module).modules():
        if isinstance(layer, Attention) and layer.is_differential:
            layers.setdefault(layer.layer_index, layer)
    return layers


def mean_lambdas(
    task: LightningModule, layers: dict[int, Attention], batch: dict[str, Tensor]
) -> dict[int, Tensor]:
    """Return the mean lambda of each layer while `task` processes `batch`."""
    means: dict[int, Tensor] = {}

    def watch(index: int) -> Any:
        def hook(layer: Attention, args: tuple[Tensor, ...]) -> None:
            lam = layer.lam(args[0])
            assert lam is not None
            means.setdefault(index, lam.mean())  # a shared layer is used by a second tower, too

        return hook

    handles = [layer.register_forward_pre_hook(watch(i)) for i, layer in layers.items()]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), evaluating(task):
            # A module of another library has no `observe`.
            getattr(task, "observe", task.predict_step)(batch)
    finally:
        for handle in handles:
            handle.remove()
    return means


class SpeedMonitor(Callback):
    """Logs `train/samples_per_second` and, for text, `train/tokens_per_second`: the throughput of
    all processes between two logging steps, excluding the time spent in validation; and
    `train/data_wait`, the share of that time, in [0, 1], that this process waited for batches (or
    for callbacks that come after this one, such as one that saves a checkpoint)."""

    def __init__(self) -> None:
        self._start = 0.0
        self._paused_at = 0.0
        self._waits_since = 0.0
        self._waited = 0.0
        self._num_samples = 0
        self._num_tokens = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused_at = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._waits_since = time.monotonic()
        self._start += self._waits_since - self._paused_at

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.monotonic() - self._waits_since

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._num_samples += size_of(batch)
        self._num_tokens += batch["tokens"].numel() if "tokens" in batch else 0
        self._waits_since = time.monotonic()
        if not is_logging_step(trainer):
            return
        seconds = max(1e-9, self._waits_since - self._start)
        log_step(pl_module, "train/data_wait", self._waited / seconds, prog_bar=True)
        rate = data_share(trainer)[1] / seconds
        log_step(pl_module, "train/samples_per_second", rate * self._num_samples)
        if self._num_tokens:
            tokens_per_second = rate * self._num_tokens
            log_step(pl_module, "train/tokens_per_second", tokens_per_second, prog_bar=True)
        self._restart()

    def _restart(self) -> None:
        self._start = self._waits_since = time.monotonic()
        self._waited = 0.0
        self._num_samples = self._num_tokens = 0
