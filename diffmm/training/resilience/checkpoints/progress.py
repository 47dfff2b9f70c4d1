"""Progress of a run between two batches, as counters of Lightning's loops.

Lightning saves its counters as they are within a hook and, on resuming, infers from them what was
done: it skips a validation that was due after the batch, and the end of an epoch. This module saves
the counters as they are after the batch, including the work that is then still due.
"""

from typing import Any

from lightning.pytorch import Trainer

from diffmm.training.last_validation import reaches_end
from diffmm.training.lightning_internals import (
    accumulates,
    forget_fetched_batches,
    is_last_batch,
    validation_follows,
)
from diffmm.training.resilience.coordinator import Coordinator

LOOP = "epoch_loop"
BATCHES = f"{LOOP}.batch_progress"
VALIDATION = f"{LOOP}.val_loop.batch_progress"


def validation_is_due(trainer: Trainer) -> bool:
    """Whether validation is scheduled after the current batch."""
    # Lightning validates once more when it is asked to stop, which is not part of the schedule.
    should_stop, trainer.should_stop = trainer.should_stop, False
    try:
        return validation_follows(trainer)
    finally:
        trainer.should_stop = should_stop


def validation_comes(trainer: Trainer) -> bool:
    """Whether validation follows the current batch: a scheduled one, or that of the last step."""
    return validation_is_due(trainer) or Coordinator.of(trainer).last_validation_follows


def is_step_boundary(trainer: Trainer) -> bool:
    """Whether the current batch completes an optimizer step."""
    return not accumulates(trainer)


def is_epoch_end(trainer: Trainer) -> bool:
    """Whether the current batch is the last of its epoch."""
    return is_last_batch(trainer)


def training_ends(trainer: Trainer) -> bool:
    """Whether training ends after the current batch."""
    return trainer.should_stop or reaches_end(trainer)


def is_complete(trainer: Trainer) -> bool:
    """Whether a fit that has returned has completed all its steps or epochs."""
    loop = trainer.fit_loop
    epochs_done = loop.max_epochs not in (None, -1) and trainer.current_epoch >= loop.max_epochs
    return epochs_done or 0 <= loop.max_steps <= trainer.global_step


def settle(trainer: Trainer, fit_loop: dict[str, Any]) -> None:
    """Change the saved counters of the fit loop to their values after the current batch.

    Args:
        trainer: Trainer that is running `on_train_batch_end`, or `on_validation_end` of a fit.
        fit_loop: State of the fit loop; modified in place.
    """
    batches = fit_loop[BATCHES]
    for counts in (batches["total"], batches["current"]):
        counts["completed"] = counts["processed"]
    is_due = validation_is_due(trainer)
    is_pending = is_due and not trainer.validating
    if not is_due and is_step_boundary(trainer):
        fit_loop[f"{LOOP}.state_dict"]["_batches_that_stepped"] += 1
    # Lightning restarts a validation of which one batch has started and none has completed.
    nothing = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    begun = {**nothing, "ready": 1, "started": 1} if is_pending else nothing
    fit_loop[VALIDATION] = {"total": begun, "current": nothing, "is_last_batch": False}


def end_epoch_if_over(trainer: Trainer) -> None:
    """End a resumed epoch whose batches are all done, instead of fetching another batch."""
    if is_epoch_end(trainer):
        forget_fetched_batches(trainer)
