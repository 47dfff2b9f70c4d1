"""Validation of the last weights of a run."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from diffmm.training.lightning_internals import add_validation, is_last_batch
from diffmm.training.resilience.coordinator import Coordinator


class LastValidation(Callback):
    """Validates after the last step of a run, even if its number is not a multiple of
    `val_check_interval`.

    Lightning validates only at its interval, so that the weights with which training ends would
    otherwise never be measured. `Checkpoints` saves them after this validation. It is not part of
    the schedule: a run that is resumed for longer equals one that was longer from the start.
    """

    def __init__(self) -> None:
        self._restore: Callable[[], None] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.enable_validation:
            coordinator = Coordinator.of(trainer)
            self._restore = add_validation(trainer, lambda: coordinator.last_validation_follows)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        follows = self._restore is not None and reaches_end(trainer)
        Coordinator.of(trainer).last_validation_follows = follows

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Coordinator.of(trainer).last_validation_follows = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        Coordinator.of(trainer).last_validation_follows = False
        if self._restore is not None:
            self._restore()
            self._restore = None


def reaches_end(trainer: Trainer) -> bool:
    """Whether the current batch is the last one by the run's number of steps or epochs."""
    loop = trainer.fit_loop
    last_epoch = loop.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= loop.max_epochs
    steps_done = 0 <= loop.max_steps <= trainer.global_step
    return steps_done or (last_epoch and is_last_batch(trainer))
