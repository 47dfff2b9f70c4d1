"""Validation of the last weights of a run."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from diffmm.training.lightning_internals import add_validation, is_last_batch


class LastValidation(Callback):
    """Validates after the last step of a run, even if its number is not a multiple of
    `val_check_interval`.

    Lightning validates only at its interval, so that the weights with which training ends would
    otherwise never be measured. `Checkpoints` saves them after this validation. It is not part of
    the schedule: a run that is resumed for longer equals one that was longer from the start.
    """

    def __init__(self) -> None:
        self.is_due = False
        """Whether training ends after the current batch."""
        self._restore: Callable[[], None] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.enable_validation:
            self._restore = add_validation(trainer, lambda: self.is_due)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.is_due = self._restore is not None and reaches_end(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.is_due = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.is_due = False
        if self._restore is not None:
            self._restore()
            self._restore = None


def last_validation_follows(trainer: Trainer) -> bool:
    """Whether a `LastValidation` validates after the current batch."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, LastValidation) and callback.is_due for callback in callbacks)


def reaches_end(trainer: Trainer) -> bool:
    """Whether the current batch is the last one by the run's number of steps or epochs."""
    loop = trainer.fit_loop
    last_epoch = loop.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= loop.max_epochs
    steps_done = 0 <= loop.max_steps <= trainer.global_step
    return steps_done or (last_epoch and is_last_batch(trainer))
