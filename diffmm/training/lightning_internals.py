"""What the library needs of Lightning that has no public name, in one place.

Each function says what Lightning keeps there; `tests/training/test_lightning_internals.py` has one
test for each, which fails when Lightning moves it.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden


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


class PreparesBatches(LightningModule):
    """A module that has the last word on its batches: of the public hooks
    (`on_before_batch_transfer`, `on_after_batch_transfer`) Lightning calls a datamodule's in place
    of the module's, and warns where the module has them, too."""

    def prepared(self, batch: Any) -> Any:
        """What the steps and the callbacks get; called a second time, it changes nothing."""
        raise NotImplementedError

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        # The batch is still on the CPU: looking at its values makes no GPU wait.
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        return batch if datamodule_has_hooks(self.trainer) else self.prepared(batch)

    def _apply_batch_transfer_handler(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        batch = super()._apply_batch_transfer_handler(batch, device, dataloader_idx)
        return self.prepared(batch) if datamodule_has_hooks(self.trainer) else batch


def datamodule_has_hooks(trainer: Trainer) -> bool:
    """Whether the trainer's datamodule changes batches itself: it has hooks for that, and does not
    say `keeps_batches`."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is None or getattr(datamodule, "keeps_batches", False):
        return False
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    return any(is_overridden(hook, datamodule) for hook in hooks)
