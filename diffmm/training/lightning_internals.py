"""What the library needs of Lightning that has no public name, in one place.

Each function says what Lightning keeps there; `tests/training/test_lightning_internals.py` has one
test for each, which fails when Lightning moves it.
"""

from collections.abc import Callable
from typing import Any, Protocol

from lightning.pytorch import Trainer


class SignalHandling(Protocol):
    """What a trainer asks of what handles its signals."""

    @property
    def received_sigterm(self) -> bool:
        """Whether to end; asked after every batch."""

    def register_signal_handlers(self) -> None:
        """Called when a run is set up."""

    def teardown(self) -> None:
        """Called last, after an exception too."""


def is_logging_step(trainer: Trainer) -> bool:
    """Whether the trainer writes to its loggers after this batch; its own learning rate monitor
    asks in the same way."""
    return trainer._logger_connector.should_update_logs


def training_has_data(trainer: Trainer) -> bool:
    """Whether the fit loop has begun to fetch batches."""
    return trainer.fit_loop._data_fetcher is not None


def validation_follows(trainer: Trainer) -> bool:
    """Whether the trainer validates after the batch it is at, by its schedule; not where it counts
    seconds, or has no data yet."""
    loop = trainer.fit_loop
    if trainer._val_check_time_interval is not None or loop._data_fetcher is None:  # type: ignore[attr-defined]
        return False
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def accumulates(trainer: Trainer) -> bool:
    """Whether the batch only adds to the gradients, so that no optimizer step follows."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def is_last_batch(trainer: Trainer) -> bool:
    """Whether the batch is the last of its epoch."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def forget_fetched_batches(trainer: Trainer) -> None:
    """End the epoch: what has been fetched ahead is not trained on."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        fetcher.done = True
        getattr(fetcher, "batches", []).clear()


def checkpoint_of(trainer: Trainer) -> dict[str, Any]:
    """What the trainer would save, callbacks' and datamodule's state included."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def replace_signal_handling(trainer: Trainer, handling: SignalHandling) -> Callable[[], None]:
    """Let `handling` stand in for what the trainer does about signals.

    Lightning's own hangs where one of several processes gets SIGTERM, and asks all processes at
    every batch, for which a GPU has to wait.

    Returns:
        A function that puts the trainer's own back.
    """
    before = trainer._signal_connector
    trainer._signal_connector = handling  # type: ignore[assignment]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def put_back() -> None:
        trainer._signal_connector = before
        del trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor

    return put_back


def leave_signals_alone(trainer: Trainer) -> None:
    """Have the trainer register no signal handlers."""
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
