"""Detects and skips optimizer steps whose loss or gradient is not finite."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from diffmm.training.resilience.checkpoints import check_weights
from diffmm.training.resilience.coordinator import Coordinator
from diffmm.training.resilience.shutdown import save_before_end
from diffmm.training.sharding import gradient_norm

logger = logging.getLogger(__name__)

LOG_NAME = "bad_steps.jsonl"
"""File in the run directory with one line per skipped step."""

BATCH_NAME = "bad_batch_step"
"""Prefix of the files with the last batches that a stopped run writes."""

NUM_SHOWN = 16
"""Maximum number of sample ids per process in a message; `LOG_NAME` contains all of them."""


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

    The cost per optimizer step is the norm of the gradients, which clipping needs anyway, and one
    synchronization for a small tensor.

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
        self._window: list[tuple[int, Any]] = []  # micro-batches of the step, with their indices
        self._losses: list[Tensor] = []
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._clip_val: int | float | None = None  # the trainer's value, while a step is skipped
        self._report: dict[str, Any] | None = None  # this process's report of a skipped step

    def state_dict(self) -> dict[str, int]:
        return {"num_in_a_row": self.num_in_a_row, "num_skipped": self.num_skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.num_in_a_row = state_dict["num_in_a_row"]
        self.num_skipped = state_dict["num_skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._coordinator = Coordinator.of(trainer)
        self._coordinator.ask("loss is not finite", lambda: self._is_loss_bad(pl_module))
        self._coordinator.ask("gradient is not finite", self._is_gradient_bad)
        self._begin_step()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._window:
            self._statistics = [(each, each.clone()) for each in running_statistics(pl_module)]
        self._window.append((batch_idx, batch))

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        parameters = list(trainer.precision_plugin.main_params(optimizer))
        self._norm = self._coordinator.norm = gradient_norm(parameters)
        names = ("loss is not finite", "gradient is not finite")
        bad_loss, bad_norm = map(bool, self._coordinator.agree(trainer, names))
        if not bad_loss and not bad_norm:
            self.num_in_a_row = 0
        elif bad_loss or not scale_is_at_fault(trainer):
            check_weights(trainer)
            # An optimizer skips weights without a gradient. Clipping would fail without gradients.
            for parameter in parameters:
                parameter.grad = None
            self._clip_val, trainer.gradient_clip_val = trainer.gradient_clip_val, None
            for buffer, before in self._statistics:
                buffer.copy_(before)
            self.num_in_a_row += 1
            self.num_skipped += 1
            self._report_step(trainer, bad_loss)

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
        if self.num_skipped:
            pl_module.log("train/skipped_steps", float(self.num_skipped))
        if self._report is not None:
            trainer.gradient_clip_val = self._clip_val
            if self.num_in_a_row >= self.max_in_a_row:
                self._stop(trainer, self._report)
        self._begin_step()

    def _begin_step(self) -> None:
        self._window, self._losses, self._statistics = [], [], []
        self._norm = self._coordinator.norm = self._report = None

    def _is_loss_bad(self, pl_module: LightningModule) -> Tensor | float:
        if self._norm is None:
            return 0.0
        # Losses of this step from before resuming are only in the task's accumulated sum.
        accumulated = getattr(pl_module, "accumulated", None)
        before = [] if accumulated is None else [accumulated.total.to(self._norm)]
        losses = torch.stack([*self._losses, *before, self._norm.new_zeros(())])
        return losses.isfinite().logical_not().any()

    def _is_gradient_bad(self) -> Tensor | float:
        return 0.0 if self._norm is None else self._norm.isfinite().logical_not()

    def _report_step(self, trainer: Trainer, bad_loss: bool) -> None:
        """Report a skipped step and the processes at fault."""
        report: dict[str, Any] = {"rank": trainer.global_rank, "losses": [], "samples": []}
        scale = scale_of(trainer) / trainer.accumulate_grad_batches
        for loss, (_, batch) in zip(torch.stack(self._losses).tolist(), self._window, strict=True):
            if not bad_loss or not math.isfinite(loss):
                report["losses"].append(f"{loss / scale:.6g}")
                report["samples"] += sample_ids(batch)
        self._report = report
        reports = [report]
        if trainer.world_size > 1:
            reports = [report] * trainer.world_size
            torch.distributed.all_gather_object(reports, report)
        reports = [each for each in reports if each["losses"]]
        if trainer.is_global_zero:
            step = trainer.global_step + 1
            logger.warning(
                f"step {step} skipped ({self.num_in_a_row} in a row): its "
                f"{'loss' if bad_loss else 'gradient'} is not finite; "
                f"{'; '.join(map(summary_of, reports))}"
            )
            fact = {"step": step, "bad": "loss" if bad_loss else "gradient", "processes": reports}
            append(Path(trainer.default_root_dir, LOG_NAME), f"{json.dumps(fact)}\n")

    def _stop(self, trainer: Trainer, report: dict[str, Any]) -> None:
        """Save what is needed to resume and to replay the step, and stop the run."""
        directory = Path(trainer.default_root_dir)
        name = f"{BATCH_NAME}_{trainer.global_step:08d}_rank_{trainer.global_rank}.pt"
        if report["losses"]:
            save_batches(
                directory / name,
                {
                    "step": trainer.global_step,
                    "epoch": trainer.current_epoch,
                    "rank": trainer.global_rank,
                    "batch_indices": [number for number, _ in self._window],
                    "batches": [move_data_to_device(batch, "cpu") for _, batch in self._window],
                },
            )
        skipped, self.num_in_a_row = self.num_in_a_row, 0  # a resumed run starts counting from 0
        where = save_before_end(trainer, reason="bad numbers")
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


def scale_of(trainer: Trainer) -> float:
    """Return the scale of the gradient scaler; 1 if there is none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()


def scale_is_at_fault(trainer: Trainer) -> bool:
    """Whether gradients may be infinite merely because of the gradient scaler's scale."""
    return scale_of(trainer) > 1.0


def sample_ids(batch: Any) -> list[int]:
    """Return the positions of the samples in their dataset; empty if the batch has none."""
    return batch["index"].tolist() if isinstance(batch, dict) and "index" in batch else []


def summary_of(report: dict[str, Any]) -> str:
    """Format a process's losses and samples for a message."""
    samples = report["samples"]
    shown = ", ".join(map(str, samples[:NUM_SHOWN])) or "unknown"
    more = f" and {len(samples) - NUM_SHOWN} more" if len(samples) > NUM_SHOWN else ""
    return f"rank {report['rank']}: loss {', '.join(report['losses'])}, samples {shown}{more}"


def append(path: Path, line: str) -> None:
    """Append a line to a log file; a failure is only a warning."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        logger.warning(f"could not write to {path}: {error}")


def save_batches(path: Path, content: dict[str, Any]) -> None:
    """Write a file for `replay` atomically."""
    unfinished = path.with_name(f".{path.name}")
    torch.save(content, unfinished)
    unfinished.replace(path)
