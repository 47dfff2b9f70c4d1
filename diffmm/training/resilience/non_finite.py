"""Detects and skips optimizer steps whose loss or gradient is not finite."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from diffmm.training.resilience.bad_steps import BATCH_NAME, StepRecord, write_report
from diffmm.training.resilience.checkpoints import check_weights
from diffmm.training.resilience.coordinator import Coordinator
from diffmm.training.resilience.shutdown import save_before_end
from diffmm.training.sharding import gradient_norm
from diffmm.training.step_log import log_step

LOSS, GRADIENT = "loss is not finite", "gradient is not finite"
"""Names of the questions to all processes, see `Coordinator.ask`."""


class TooManyNonFiniteStepsError(RuntimeError):
    """Too many consecutive steps had a loss or gradient that is not finite."""


class NonFiniteGuard(Callback):
    """Skips every optimizer step whose gradient, or whose loss in any micro-batch of any process,
    is NaN or infinite. All processes skip the step. After `max_in_a_row` consecutive skipped steps,
    the run stops.

    A skipped step does not change the weights, the optimizer's state or the running statistics of
    normalization layers. In all other respects it counts as a step: the learning-rate schedule, the
    data, `global_step` and `max_steps` advance. The length of the run is therefore unchanged, and a
    resumed run skips the same steps as an uninterrupted one.

    Each skipped step is reported in a warning and, in full, in `bad_steps.jsonl` in the trainer's
    `default_root_dir`: the step (counted from 1, like the checkpoint after it) and, for each
    process at fault, its rank, losses and sample ids (`batch["index"]`). These are from the
    micro-batches whose loss is not finite or, if only the gradient is not finite, from all
    micro-batches of all processes, because gradients are checked after averaging. The losses of a
    task are divided by the number of targets in the step's first micro-batch. The number of skipped
    steps is logged as `train/skipped_steps` once there are any.

    When the run stops, each process at fault writes the micro-batches of the last step to
    `bad_batch_step_00001234_rank_0.pt`, a checkpoint is saved with the weights from before the
    first of the skipped steps, and `TooManyNonFiniteStepsError` is raised.
    `diffmm.training.resilience.replay` repeats the last step; a run that is resumed from the
    checkpoint continues after it.

    If the weights themselves are not finite, the run stops immediately with
    `NonFiniteWeightsError`.

    A gradient scaler (`16-mixed`) adjusts its scale by means of infinite gradients: it skips such a
    step itself and lowers the scale. This does not count as a skipped step while the scale is
    above 1. A loss that is not finite always counts.

    The cost per optimizer step is the norm of the gradients, which clipping needs anyway. A fused
    optimizer (as `Task` creates on CPUs and CUDA devices) skips the step on the device, and the
    process reads the verdict during the next step, so that it never waits for the GPU while all
    steps are finite. Every other optimizer, and a gradient scaler, need one synchronization per
    step.

    Args:
        max_in_a_row: Number of consecutive skipped steps that stops the run, at least 1.

    Raises:
        ValueError: If `max_in_a_row` is below 1.
    """

    def __init__(self, max_in_a_row: int = 10) -> None:
        if max_in_a_row < 1:
            raise ValueError(f"max_in_a_row must be at least 1, got {max_in_a_row}")
        self.max_in_a_row = max_in_a_row
        self.num_in_a_row = 0
        self.num_skipped = 0
        self._coordinator = Coordinator()  # replaced by the trainer's when training starts
        self._norm: Tensor | None = None  # norm of the gradients, before clipping
        self._record = StepRecord(1, 0)
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._is_clipping_off = False
        self._clip_val: int | float | None = None  # the trainer's value, while clipping is off
        self._last_skipped: StepRecord | None = None
        self._is_at_fault = False  # whether this process is, for that step

    def state_dict(self) -> dict[str, int]:
        self._coordinator.receive()
        return {"num_in_a_row": self.num_in_a_row, "num_skipped": self.num_skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.num_in_a_row = state_dict["num_in_a_row"]
        self.num_skipped = state_dict["num_skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._coordinator = Coordinator.of(trainer)
        self._coordinator.ask(LOSS, lambda: self._is_loss_bad(pl_module))
        self._coordinator.ask(GRADIENT, self._is_gradient_bad)
        self._begin_step(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._record.batches:
            self._record.epoch = trainer.current_epoch
            self._statistics = [(each, each.clone()) for each in running_statistics(pl_module)]
        self._record.batches.append((batch_idx, batch))

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._record.losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        parameters = list(trainer.precision_plugin.main_params(optimizer))
        self._norm = self._coordinator.norm = gradient_norm(parameters)
        if can_skip(optimizer) and not has_scaler(trainer):
            self._skip_on_device(trainer, optimizer)
        else:
            self._skip_on_host(trainer, parameters)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._norm is None:
            return  # gradients are being accumulated
        log_step(pl_module, "train/skipped_steps", lambda: float(self.num_skipped) or None)
        if self._is_clipping_off:
            trainer.gradient_clip_val, self._is_clipping_off = self._clip_val, False
        if self.num_in_a_row >= self.max_in_a_row:
            self._stop(trainer)
        self._begin_step(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._coordinator.receive()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._coordinator.receive()
        for optimizer in trainer.optimizers:
            optimizer.__dict__.pop("found_inf", None)

    def _begin_step(self, trainer: Trainer) -> None:
        self._record = StepRecord(trainer.global_step + 1, trainer.current_epoch)
        self._statistics = []
        self._norm = self._coordinator.norm = None

    def _is_loss_bad(self, pl_module: LightningModule) -> Tensor | float:
        if self._norm is None:
            return 0.0
        # Losses of this step from before resuming are only in the task's accumulated sum.
        accumulated = getattr(pl_module, "accumulated", None)
        before = [] if accumulated is None else [accumulated.total.to(self._norm)]
        losses = torch.stack([*self._record.losses, *before, self._norm.new_zeros(())])
        return losses.isfinite().logical_not().any()

    def _is_gradient_bad(self) -> Tensor | float:
        return 0.0 if self._norm is None else self._norm.isfinite().logical_not()

    def _skip_on_device(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Let the optimizer skip the step if it is bad, and judge the previous step."""
        record = self._record
        found = self._coordinator.agree_later(
            trainer,
            lambda answers: self._judge(
                trainer, record, bool(answers[LOSS]), bool(answers[GRADIENT])
            ),
        )
        bad = torch.maximum(found[LOSS], found[GRADIENT])
        # As a gradient scaler does, which shares this attribute.
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        for buffer, before in self._statistics:
            buffer.copy_(torch.where(bad > 0, before, buffer))
        self._coordinator.receive(all_but=1)
        if self.num_in_a_row or self.max_in_a_row == 1:
            # This step may be the last one of the run, which must stop before another one changes
            # the weights.
            self._coordinator.receive()

    def _skip_on_host(self, trainer: Trainer, parameters: list[nn.Parameter]) -> None:
        """Judge the step, and remove its gradients if it is bad."""
        self._coordinator.receive()
        bad_loss, bad_norm = map(bool, self._coordinator.agree(trainer, (LOSS, GRADIENT)))
        if not bad_loss and bad_norm and scale_is_at_fault(trainer):
            return
        self._judge(trainer, self._record, bad_loss, bad_norm)
        if not bad_loss and not bad_norm:
            return
        # An optimizer skips weights without a gradient. Clipping would fail without gradients.
        for parameter in parameters:
            parameter.grad = None
        self._clip_val, trainer.gradient_clip_val = trainer.gradient_clip_val, None
        self._is_clipping_off = True
        for buffer, before in self._statistics:
            buffer.copy_(before)

    def _judge(self, trainer: Trainer, record: StepRecord, bad_loss: bool, bad_norm: bool) -> None:
        """Count and report a step, once it is known whether it was skipped."""
        if not bad_loss and not bad_norm:
            self.num_in_a_row = 0
            return
        check_weights(trainer, record.step - 1)
        self.num_in_a_row += 1
        self.num_skipped += 1
        scale = scale_of(trainer) / trainer.accumulate_grad_batches
        report = record.report(trainer.global_rank, scale, is_loss_bad=bad_loss)
        self._last_skipped, self._is_at_fault = record, bool(report["losses"])
        reports = [report]
        if trainer.world_size > 1:
            reports = [report] * trainer.world_size
            torch.distributed.all_gather_object(reports, report)
        if trainer.is_global_zero:
            kind = "loss" if bad_loss else "gradient"
            write_report(trainer, record.step, reports, num_in_a_row=self.num_in_a_row, kind=kind)

    def _stop(self, trainer: Trainer) -> None:
        """Save what is needed to resume and to replay the step, and stop the run."""
        directory = Path(trainer.default_root_dir)
        if self._is_at_fault:
            assert self._last_skipped is not None
            self._last_skipped.save(directory, trainer.global_rank)
        skipped, self.num_in_a_row = self.num_in_a_row, 0  # a resumed run starts counting from 0
        where = save_before_end(trainer, reason="non-finite steps")
        raise TooManyNonFiniteStepsError(
            f"{skipped} steps in a row had a loss or gradient that is not finite, the last of them "
            f"step {trainer.global_step}: none of them changed the weights"
            f"{'' if where is None else f', which are saved in {where}'}. The batches of that step "
            f"are in {directory}/{BATCH_NAME}_*.pt (`diffmm replay RUN` repeats the step). Fix the "
            f"data, lower the learning rate, or resume from an earlier checkpoint"
        )


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Return the running-statistics buffers of normalization layers."""
    layers = [each for each in module.modules() if getattr(each, "track_running_stats", False)]
    return [buffer for layer in layers for buffer in layer.buffers(recurse=False)]


def can_skip(optimizer: Optimizer) -> bool:
    """Whether the optimizer skips a step on the device if its `found_inf` is not 0; fused
    optimizers do."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def has_scaler(trainer: Trainer) -> bool:
    """Whether gradients are scaled, as in `16-mixed`."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def scale_of(trainer: Trainer) -> float:
    """Return the scale of the gradient scaler; 1 if there is none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()


def scale_is_at_fault(trainer: Trainer) -> bool:
    """Whether gradients may be infinite merely because of the gradient scaler's scale."""
    return scale_of(trainer) > 1.0
