"""Progress in lines: what a log or a pipe shows where a terminal shows a bar."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

SECONDS = 10.0
"""From one line of progress to the next."""


class ProgressLines(Callback):
    """Prints a line per validation with its metrics and, without a progress bar, one with the
    training loss after the first step and then every few seconds.

    Args:
        seconds: from one line on training to the next; `None` for validations alone.
    """

    def __init__(self, seconds: float | None = SECONDS) -> None:
        self.seconds = seconds
        self._began = (0.0, 0)
        self._told_at: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = (time.monotonic(), trainer.global_step)
        self._told_at = None

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
        if self._told_at is not None and now - self._told_at < self.seconds:
            return
        loss = trainer.callback_metrics.get("train/loss")
        if loss is None:  # no step has been made of the first batches
            return
        is_first, self._told_at = self._told_at is None, now
        text = f"train/loss {float(loss):.4g}"
        steps = trainer.global_step - self._began[1]
        if not is_first and steps > 0:
            rate = steps / max(1e-9, now - self._began[0])
            text += f"  {rate:.3g} steps/s"
            if trainer.max_steps > 0:
                text += f"  {duration((trainer.max_steps - trainer.global_step) / rate)} left"
        tell(trainer, text)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        metrics = [
            f"{name} {float(value):.4g}"
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        ]
        if metrics:
            tell(trainer, "  ".join(metrics))


def tell(trainer: Trainer, text: str) -> None:
    """Print a line that begins with how far training is, above the bar if there is one."""
    total = f"/{trainer.max_steps:,}" if trainer.max_steps > 0 else ""
    line = f"step {trainer.global_step:,}{total}  {text}"
    bar: Any = trainer.progress_bar_callback
    if bar is None or getattr(bar, "is_disabled", False):
        print(line, flush=True)
    else:
        bar.print(line)


def duration(seconds: float) -> str:
    """A length of time in writing: `1:02:03`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def show_progress(trainer: Trainer, *, is_terminal: bool) -> None:
    """Let a trainer that shows its progress also print its validations and, where the output is no
    terminal, lines in place of a bar."""
    bar = trainer.progress_bar_callback
    if bar is None:
        return
    if not is_terminal:
        bar.disable()
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.insert(0, ProgressLines(None if is_terminal else SECONDS))
