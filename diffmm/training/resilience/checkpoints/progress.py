"""Where a run stands between two batches, in the words of Lightning's loops.

Lightning saves its counters as they are within a hook, and guesses from them, on a resume, what had
been done: it leaves out a validation that was due after the batch, and an epoch's end. Here they
are saved as they will be when the batch is over, with what is then still to do.
"""

from typing import Any

from lightning.pytorch import Trainer

LOOP = "epoch_loop"
BATCHES = f"{LOOP}.batch_progress"
VALIDATION = f"{LOOP}.val_loop.batch_progress"


def validation_is_due(trainer: Trainer) -> bool:
    """Whether the trainer validates after the batch it is at, however long ago it last did."""
    loop = trainer.fit_loop
    if trainer._val_check_time_interval is not None or loop._data_fetcher is None:  # type: ignore[attr-defined]
        return False
    # A trainer that was told to stop validates once more: that is no part of the schedule.
    should_stop, trainer.should_stop = trainer.should_stop, False
    try:
        return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
    finally:
        trainer.should_stop = should_stop


def is_step_boundary(trainer: Trainer) -> bool:
    """Whether the batch ends an optimizer step, so that no gradient is half accumulated."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def is_epoch_end(trainer: Trainer) -> bool:
    """Whether the batch is the epoch's last."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


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
    loop = trainer.fit_loop
    fetcher: Any = loop._data_fetcher
    if is_epoch_end(trainer) and fetcher is not None:
        fetcher.done = True
        getattr(fetcher, "batches", []).clear()  # fetched ahead
