"""Where a run stands between two batches, in the words of Lightning's loops.

Lightning saves its counters as they are within a hook, and guesses from them, on a resume, what had
been done: it leaves out a validation that was due after the batch, and an epoch's end. Here they
are saved as they will be when the batch is over, with what is then still to do.
"""

from typing import Any

from lightning.pytorch import Trainer

from diffmm.training.lightning_internals import (
    accumulates,
    forget_fetched_batches,
    is_last_batch,
    validation_follows,
)

LOOP = "epoch_loop"
BATCHES = f"{LOOP}.batch_progress"
VALIDATION = f"{LOOP}.val_loop.batch_progress"


def validation_is_due(trainer: Trainer) -> bool:
    """Whether the trainer validates after the batch it is at, however long ago it last did."""
    # A trainer that was told to stop validates once more: that is no part of the schedule.
    should_stop, trainer.should_stop = trainer.should_stop, False
    try:
        return validation_follows(trainer)
    finally:
        trainer.should_stop = should_stop


def is_step_boundary(trainer: Trainer) -> bool:
    """Whether the batch ends an optimizer step, so that no gradient is half accumulated."""
    return not accumulates(trainer)


def is_epoch_end(trainer: Trainer) -> bool:
    """Whether the batch is the epoch's last."""
    return is_last_batch(trainer)


def training_ends(trainer: Trainer) -> bool:
    """Whether no batch follows."""
    loop = trainer.fit_loop
    last_epoch = loop.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= loop.max_epochs
    steps_done = 0 <= loop.max_steps <= trainer.global_step
    return trainer.should_stop or steps_done or (last_epoch and is_epoch_end(trainer))


def is_complete(trainer: Trainer) -> bool:
    """Whether a fit that has returned has made all its steps or epochs."""
    loop = trainer.fit_loop
    epochs_done = loop.max_epochs not in (None, -1) and trainer.current_epoch >= loop.max_epochs
    return epochs_done or 0 <= loop.max_steps <= trainer.global_step


def settle(trainer: Trainer, fit_loop: dict[str, Any]) -> None:
    """Change the fit loop's saved counters to what they are when the batch is over.

    Args:
        trainer: within `on_train_batch_end`, or `on_validation_end` of a fit.
        fit_loop: the loop's state.
    """
    batches = fit_loop[BATCHES]
    for counts in (batches["total"], batches["current"]):
        counts["completed"] = counts["processed"]
    is_due = validation_is_due(trainer)
    is_pending = is_due and not trainer.validating
    if not is_due and is_step_boundary(trainer):
        fit_loop[f"{LOOP}.state_dict"]["_batches_that_stepped"] += 1
    # A validation that has begun but one batch, and finished none, is what Lightning goes back to.
    nothing = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    begun = {**nothing, "ready": 1, "started": 1} if is_pending else nothing
    fit_loop[VALIDATION] = {"total": begun, "current": nothing, "is_last_batch": False}


def end_epoch_if_over(trainer: Trainer) -> None:
    """Let a resumed epoch that was at its end come to its end, rather than take a batch more."""
    if is_epoch_end(trainer):
        forget_fetched_batches(trainer)
