"""Metrics of optimizer steps, logged without waiting for the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from diffmm.training.lightning_internals import is_logging_step
from diffmm.training.resilience.checkpoints.progress import is_step_boundary, training_ends
from diffmm.training.resilience.coordinator import Coordinator

Value = Tensor | float | Callable[[], float | None]
"""A scalar, or a function that is called once the step's verdict is known (see `NonFiniteGuard`);
`None` is not logged."""


class _Metric(NamedTuple):
    value: Value
    prog_bar: bool


class StepLog:
    """Collects the metrics of an optimizer step. They are in the trainer's `callback_metrics`
    immediately, as tensors on the device; `progress_bar_metrics` and, at logging steps, the
    trainer's loggers receive their values once the device has computed them.

    Lightning's own `log` reads the metrics of the progress bar after every step, and those of
    the loggers at logging steps, and waits for the device each time. Here, the metrics of a step
    arrive during the next step; those of the last step, and of one before a validation, before the
    next hook of the trainer. They are logged as step `global_step - 1`, as by Lightning.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, _Metric] = {}

    def add(self, trainer: Trainer, name: str, value: Value, *, prog_bar: bool = False) -> None:
        """Add a metric of the current step, the same on all processes.

        Args:
            trainer: Trainer that runs the step.
            name: Name of the metric.
            value: Its value; a tensor must be a scalar.
            prog_bar: Whether a progress bar shows the metric.
        """
        if isinstance(value, Tensor):
            value = value.detach()
        self._metrics[name] = _Metric(value, prog_bar)
        if not callable(value):
            trainer.callback_metrics[name] = torch.as_tensor(value)

    def send(self, trainer: Trainer) -> None:
        """Pass on the metrics of a completed step (see `StepLogger`)."""
        metrics, self._metrics = self._metrics, {}
        tensors = {n: m.value for n, m in metrics.items() if isinstance(m.value, Tensor)}
        step, epoch = trainer.global_step - 1, trainer.current_epoch
        is_logged = is_logging_step(trainer) or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]

        def receive(numbers: list[float]) -> None:
            known = dict(zip(tensors, numbers, strict=True))
            values: dict[str, float] = {}
            for name, (value, prog_bar) in metrics.items():
                number = known.get(name, value() if callable(value) else value)
                if number is None:
                    continue
                values[name] = float(number)
                if prog_bar:
                    trainer.progress_bar_metrics[name] = values[name]
                if callable(value):
                    trainer.callback_metrics[name] = torch.tensor(values[name])
            if is_logged:
                trainer.logged_metrics.update({n: torch.tensor(v) for n, v in values.items()})
                for logger in trainer.loggers:
                    logger.log_metrics({**values, "epoch": epoch}, step=step)
                    logger.save()

        coordinator = Coordinator.of(trainer)
        device = trainer.strategy.root_device
        numbers = [tensor.to(device, torch.float32) for tensor in tensors.values()]
        coordinator.send(torch.stack(numbers) if numbers else torch.empty(0), receive)
        if training_ends(trainer) or trainer.received_sigterm:
            coordinator.receive()


class StepLogger(Callback):
    """Completes the `step_log` of a task after each step; the last of its default callbacks. It is
    not a hook of the task, which a subclass may override."""

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if is_step_boundary(trainer) and isinstance(log := pl_module.step_log, StepLog):
            log.send(trainer)


def log_step(module: LightningModule, name: str, value: Value, *, prog_bar: bool = False) -> None:
    """Log a metric of the current optimizer step from a callback: through the `StepLog` of a task,
    or with Lightning's `log` for any other module."""
    if isinstance(log := getattr(module, "step_log", None), StepLog):
        log.add(module.trainer, name, value, prog_bar=prog_bar)
        return
    number = value() if callable(value) else value
    if number is not None:
        module.log(name, number, prog_bar=prog_bar)
