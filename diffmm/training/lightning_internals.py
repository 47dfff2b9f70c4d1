"""All uses of private Lightning attributes, in one place.

`tests/training/test_lightning_internals.py` has one test per function or class, which fails when
Lightning changes the attribute.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden


class SignalHandling(Protocol):
    """Interface of a trainer's signal handling."""

    @property
    def received_sigterm(self) -> bool:
        """Whether to stop; queried after every batch."""

    def register_signal_handlers(self) -> None:
        """Called during setup."""

    def teardown(self) -> None:
        """Called last, also after an exception."""


def is_logging_step(trainer: Trainer) -> bool:
    """Whether the trainer writes to its loggers after this batch; Lightning's learning-rate monitor
    uses the same check."""
    return trainer._logger_connector.should_update_logs


def training_has_data(trainer: Trainer) -> bool:
    """Whether the fit loop has begun to fetch batches."""
    return trainer.fit_loop._data_fetcher is not None


def validation_follows(trainer: Trainer) -> bool:
    """Whether validation is scheduled after the current batch. False for time-based validation
    intervals and before the first batch is fetched."""
    loop = trainer.fit_loop
    if trainer._val_check_time_interval is not None or loop._data_fetcher is None:  # type: ignore[attr-defined]
        return False
    epoch_loop = loop.epoch_loop
    # The class's method, which `add_validation` does not replace.
    return type(epoch_loop)._should_check_val_fx(epoch_loop, loop._data_fetcher)


def add_validation(trainer: Trainer, is_due: Callable[[], bool]) -> Callable[[], None]:
    """Also validate after batches for which `is_due()`, beside those of the schedule.

    Returns:
        A function that restores the trainer's own schedule.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    scheduled = loop._should_check_val_fx
    loop._should_check_val_fx = lambda fetcher: is_due() or scheduled(fetcher)

    def restore() -> None:
        del loop._should_check_val_fx

    return restore


def accumulates(trainer: Trainer) -> bool:
    """Whether the current batch only accumulates gradients, without an optimizer step."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def is_last_batch(trainer: Trainer) -> bool:
    """Whether the current batch is the last of its epoch."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def forget_fetched_batches(trainer: Trainer) -> None:
    """End the epoch, discarding prefetched batches."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        fetcher.done = True
        getattr(fetcher, "batches", []).clear()


def checkpoint_of(trainer: Trainer) -> dict[str, Any]:
    """Return the checkpoint that the trainer would save, including the state of the callbacks and
    the datamodule."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def replace_signal_handling(trainer: Trainer, handling: SignalHandling) -> Callable[[], None]:
    """Replace the trainer's signal handling by `handling`.

    Lightning's own handling hangs when only one of several processes receives SIGTERM, and it
    communicates between processes at every batch, which synchronizes the GPU.

    Returns:
        A function that restores the trainer's own signal handling.
    """
    before = trainer._signal_connector
    trainer._signal_connector = handling  # type: ignore[assignment]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def restore() -> None:
        trainer._signal_connector = before
        del trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor

    return restore


def leave_signals_alone(trainer: Trainer) -> None:
    """Keep the trainer from registering signal handlers."""
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None


def trainer_of(module: LightningModule) -> Trainer | None:
    """The trainer of a module, or `None` if it is not attached to one (`module.trainer` then raises
    an error)."""
    return module._trainer


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Set the number of data-parallel groups once the number of devices is known; the strategy
    takes it as an argument only before that."""
    strategy._data_parallel_size = size


def record_new_columns(experiment: Any) -> bool:
    """Add the names of new metrics to the columns of a `CSVLogger`'s experiment.

    Returns:
        Whether there are new ones.
    """
    return bool(experiment._record_new_keys())


class PreparesBatches(LightningModule):
    """A module that prepares its batches after the datamodule's hooks have run. The public hooks
    (`on_before_batch_transfer`, `on_after_batch_transfer`) do not suffice: Lightning calls those of
    the datamodule instead of the module's, and warns if both define them."""

    def prepared(self, batch: Any) -> Any:
        """Return the batch that steps and callbacks receive. The function is idempotent."""
        raise NotImplementedError

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        # The batch is still on the CPU, so that checking its values does not synchronize the GPU.
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        return batch if datamodule_has_hooks(self.trainer) else self.prepared(batch)

    def _apply_batch_transfer_handler(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        batch = super()._apply_batch_transfer_handler(batch, device, dataloader_idx)
        return self.prepared(batch) if datamodule_has_hooks(self.trainer) else batch


def datamodule_has_hooks(trainer: Trainer) -> bool:
    """Whether the trainer's datamodule overrides a batch transfer hook and does not set
    `keeps_batches`."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is None or getattr(datamodule, "keeps_batches", False):
        return False
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    return any(is_overridden(hook, datamodule) for hook in hooks)
