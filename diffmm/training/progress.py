"""Training progress as lines of text, for logs and pipes that cannot show a progress bar."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

SECONDS = 10.0
"""Interval between two lines of progress, in seconds."""


class ProgressLines(Callback):
    """Prints one line about the model, one with the metrics per validation and, at regular
    intervals from the first step on, one with the training loss.

    Args:
        seconds: Interval between two lines with the training loss, in seconds; `None` prints
            validation metrics only.
    """

    def __init__(self, seconds: float | None = SECONDS) -> None:
        self.seconds = seconds
        self._began = (0.0, 0)
        self._printed_at: float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print(about_model(pl_module), flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = (time.monotonic(), trainer.global_step)
        self._printed_at = None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now = time.monotonic()
        if self.seconds is None or not trainer.is_global_zero:
            return
        if self._printed_at is not None and now - self._printed_at < self.seconds:
            return
        # Unlike `callback_metrics`, these are numbers: reading them does not wait for the device.
        loss = trainer.progress_bar_metrics.get("train/loss")
        if loss is None:  # the first step is not complete
            return
        is_first, self._printed_at = self._printed_at is None, now
        text = f"train/loss {loss:.4g}"
        steps = trainer.global_step - self._began[1]
        if not is_first and steps > 0:
            rate = steps / max(1e-9, now - self._began[0])
            text += f"  {rate:.3g} steps/s"
            if trainer.max_steps > 0:
                text += f"  {duration((trainer.max_steps - trainer.global_step) / rate)} left"
        if (wait := trainer.progress_bar_metrics.get("train/data_wait")) is not None:
            text += f"  {wait:.0%} waiting for data"
        print_line(trainer, text)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        metrics = [
            f"{name} {float(value):.4g}"
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        ]
        if metrics:
            print_line(trainer, "  ".join(metrics))


def print_line(trainer: Trainer, text: str) -> None:
    """Print a line that begins with the current step, above the progress bar if there is one."""
    total = f"/{trainer.max_steps:,}" if trainer.max_steps > 0 else ""
    line = f"step {trainer.global_step:,}{total}  {text}"
    bar: Any = trainer.progress_bar_callback
    if bar is None or getattr(bar, "is_disabled", False):
        print(line, flush=True)
    else:
        bar.print(line)


def about_model(task: LightningModule) -> str:
    """The class of a task's model, and its number of parameters."""
    model = getattr(task, "model", task)
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    part = "" if trained == total else f", of which {trained:,} are trained"
    return f"model: {type(model).__name__}, {total:,} parameters{part}"


def duration(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds, such as `1:02:03`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def show_progress(trainer: Trainer, *, is_terminal: bool) -> None:
    """Let a trainer with a progress bar also print validation metrics and, if the output is not a
    terminal, replace the bar by lines of text."""
    bar = trainer.progress_bar_callback
    if bar is None:
        return
    if not is_terminal:
        bar.disable()
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.insert(0, ProgressLines(None if is_terminal else SECONDS))
