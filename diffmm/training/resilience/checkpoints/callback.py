"""The callback that saves checkpoints and resumes a run from one."""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch import __version__ as lightning_version
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from diffmm import __version__, checkpoint_folders
from diffmm.checkpoint_folders import DIRECTORY_NAME, STATE_NAME
from diffmm.checks import check_choice
from diffmm.training.lightning_internals import checkpoint_of, training_has_data
from diffmm.training.parallel import read_any_checkpoint
from diffmm.training.resilience.checkpoints import logs, progress
from diffmm.training.resilience.checkpoints.exact import (
    EXACT_KEY,
    check_exact,
    exact_state,
    restore_exact,
    start_timers,
    trust_data,
)
from diffmm.training.resilience.checkpoints.finite import check_weights
from diffmm.training.resilience.checkpoints.sharded import is_sharded, write_sharded
from diffmm.training.resilience.checkpoints.snapshot import available_bytes, num_bytes, snapshot
from diffmm.training.resilience.checkpoints.writer import SaveFailedError, Writer, write
from diffmm.training.resilience.coordinator import Coordinator

SECONDS_PER_MINUTE = 60.0
STEPS_PER_TIME_CHECK = 10
"""Interval, in steps, at which several processes compare the time, because that synchronizes."""


class Checkpoints(Checkpoint):
    """Saves checkpoints whose completeness is verified, and resumes a run exactly.

    A checkpoint is a folder with everything that the next batch depends on: weights, optimizer,
    schedule, position in the data, counters of the loops, states of other callbacks and random
    states of every process. If the samples of the data depend on `(seed, epoch, index)` alone and
    the datamodule saves its position (as those of `datamodules` do), a resumed run is bitwise
    identical on the CPU.

    Checkpoints are saved after an optimizer step or, if validation follows that step, after
    validation. The state is copied to CPU memory and written in the background while training
    continues, one checkpoint at a time. Training waits instead if there is not enough memory, or if
    processes write their own shards. If a save fails (on a full disk, for example), earlier
    checkpoints stay intact and training continues. Weights that are not finite are never saved;
    they stop the run.

    Args:
        dirpath: Folder of this run's checkpoints, not shared with other runs; by default
            `checkpoints` in the trainer's `default_root_dir`.
        every_n_steps: Number of optimizer steps between saves; None saves by time only.
        every_minutes: Minutes between saves, checked at every tenth step if there are several
            processes; None saves by steps only.
        monitor: Validation metric that ranks the checkpoints. If set, a checkpoint is also saved
            after every validation.
        mode: Whether the "min" or the "max" of `monitor` is best.
        keep_last: Number of most recent checkpoints to keep, at least 1.
        keep_best: Number of best checkpoints by `monitor` to keep in addition, at least 0.
        background: Whether to write while training continues, if memory allows.
        max_failed_saves: Number of consecutive failed saves that stops the run, at least 1.

    Raises:
        ValueError: If an argument is invalid; the message names it and the value.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        every_n_steps: int | None = None,
        every_minutes: float | None = 15.0,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        keep_last: int = 2,
        keep_best: int = 1,
        background: bool = True,
        max_failed_saves: int = 3,
    ) -> None:
        check_choice("mode", mode, ("min", "max"))
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("keep_last", keep_last, 1),
            ("keep_best", keep_best, 0),
            ("max_failed_saves", max_failed_saves, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if every_minutes is not None and not every_minutes > 0:
            raise ValueError(f"every_minutes must be above 0, got {every_minutes}")
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.monitor = monitor
        self.mode = mode
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.background = background
        self.max_failed_saves = max_failed_saves
        self._writer = Writer()
        self._num_failed = 0
        self._outcome: Path | SaveFailedError | None = None
        self._to_restore: dict[str, Any] | None = None
        self._saved_at: tuple[int, bool] | None = None
        self._saved_at_seconds = time.monotonic()
        self._asked_at: tuple[int, bool] | None = None
        self._is_step_logged = True

    @property
    def best_model_path(self) -> str:
        """Path of the best checkpoint's state, or an empty string. Lightning loads it for
        `ckpt_path="best"`."""
        if self.dirpath is None or self.monitor is None:
            return ""
        best = checkpoint_folders.best(self.dirpath, self.monitor, self.mode)
        return str(best[0].path / STATE_NAME) if best else ""

    def rest(self) -> None:
        """Wait until no checkpoint is being written."""
        self._writer.rest()

    def save_now(self, trainer: Trainer, *, reason: str) -> Path:
        """Save a checkpoint, for example before a run stops, and wait until it is written.

        Call it from a callback's `on_train_batch_end` or `on_validation_end`, after the same batch
        on every process, and before setting `trainer.should_stop`. A validation that is due after
        this batch is still run after resuming.

        Args:
            trainer: Trainer that is running `fit`.
            reason: Reason of the save, for the manifest.

        Returns:
            The folder of the checkpoint.

        Raises:
            SaveFailedError: On every process, if the checkpoint could not be written.
            NonFiniteWeightsError: On every process, if any weight is not finite.
        """
        self._asked_at = self._place(trainer)
        self._save(trainer, reason=reason, background=False)
        outcome = self._settle(trainer)
        if isinstance(outcome, SaveFailedError):
            raise outcome
        assert outcome is not None
        return outcome

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = Path(trainer.default_root_dir) / DIRECTORY_NAME
        Coordinator.of(trainer).saver = self
        read_any_checkpoint(trainer.strategy)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        checkpoint[EXACT_KEY] = None  # before the first batch: saved by the learning-rate finder
        if training_has_data(trainer):
            progress.settle(trainer, checkpoint["loops"]["fit_loop"])
            checkpoint[EXACT_KEY] = exact_state(trainer)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        trust_data(trainer, checkpoint)
        start_timers(trainer, checkpoint)
        if EXACT_KEY not in checkpoint:
            rank_zero_warn(
                "this checkpoint was not saved by Checkpoints: the run resumes with its weights "
                "and optimizer, but not exactly (it has no random states)"
            )
        elif checkpoint[EXACT_KEY] is not None:
            check_exact(trainer, checkpoint[EXACT_KEY])
            self._to_restore = checkpoint[EXACT_KEY]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._to_restore is not None:
            restore_exact(trainer, self._to_restore)
            self._to_restore = None
            self._saved_at = self._place(trainer)
        assert self.dirpath is not None
        if trainer.is_global_zero:
            # Not earlier: another process might still be reading a checkpoint.
            checkpoint_folders.clean(self.dirpath)
            logs.begin(trainer, self.dirpath, trainer.global_step)
        self._saved_at_seconds = time.monotonic()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._is_step_logged:
            # The step itself was logged only after the hook in which it was saved.
            logs.flush(trainer)
            self._is_step_logged = True

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.world_size == 1 and not self._writer.is_busy:
            self._settle(trainer)
        if not progress.validation_comes(trainer):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        outcome = self._settle(trainer)
        if isinstance(outcome, SaveFailedError):
            raise outcome

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # Other processes may be at another point, so that no communication is possible.
        outcome = self._writer.wait()
        if isinstance(outcome, SaveFailedError):
            rank_zero_warn(str(outcome))

    def _place(self, trainer: Trainer) -> tuple[int, bool]:
        """Return the current batch index, and whether validation is running."""
        return trainer.fit_loop.total_batch_idx, trainer.validating

    def _save_if_due(self, trainer: Trainer) -> None:
        """Save if a save is due; the decision is the same on all processes."""
        place = self._place(trainer)
        if trainer.should_stop and self._asked_at is not None and self._asked_at[0] == place[0]:
            return  # `save_now` has saved this batch, and its caller stopped the run
        is_measured = trainer.validating and self.monitor is not None
        if is_measured or progress.training_ends(trainer) or self._is_time(trainer):
            self._save(trainer, reason="schedule", background=self.background)

    def _is_time(self, trainer: Trainer) -> bool:
        """Whether a save is due by the number of steps or by time."""
        step = trainer.global_step
        is_saved = self._saved_at is not None and self._saved_at[0] == self._place(trainer)[0]
        if is_saved or not progress.is_step_boundary(trainer):
            return False
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            return True
        if self.every_minutes is None or (trainer.world_size > 1 and step % STEPS_PER_TIME_CHECK):
            return False
        minutes = (time.monotonic() - self._saved_at_seconds) / SECONDS_PER_MINUTE
        return trainer.strategy.broadcast(minutes >= self.every_minutes)

    def _save(self, trainer: Trainer, *, reason: str, background: bool) -> None:
        if self._saved_at == self._place(trainer) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self.dirpath is not None
        check_weights(trainer)
        self._settle(trainer)
        logs.flush(trainer)
        self._is_step_logged = False
        checkpoint = checkpoint_of(trainer)
        facts = self._facts(trainer, reason)
        self._saved_at, self._saved_at_seconds = self._place(trainer), time.monotonic()
        if is_sharded(checkpoint):
            outcome = write_sharded(trainer, self.dirpath, checkpoint, facts)
            if trainer.is_global_zero:
                self._writer.run(lambda: self._pruned(outcome), background=False)
        elif trainer.is_global_zero:
            free = available_bytes()
            background = background and (free is None or free > 2 * num_bytes(checkpoint))
            state = snapshot(checkpoint, copy=background)
            self._writer.run(partial(self._write, state, facts), background=background)

    def _write(self, state: dict[str, Any], facts: dict[str, Any]) -> Path | SaveFailedError:
        assert self.dirpath is not None
        try:
            return self._pruned(write(self.dirpath, state, facts))
        except SaveFailedError as error:
            return error

    def _pruned(self, outcome: Path | SaveFailedError) -> Path | SaveFailedError:
        """Remove old checkpoints after a successful save."""
        if isinstance(outcome, SaveFailedError):
            return outcome
        try:
            checkpoint_folders.prune(
                outcome.parent,
                keep_last=self.keep_last,
                keep_best=self.keep_best,
                monitor=self.monitor,
                mode=self.mode,
            )
        except OSError as error:
            rank_zero_warn(f"could not remove an old checkpoint: {error}")
        return outcome

    def _settle(self, trainer: Trainer) -> Path | SaveFailedError | None:
        """Wait for the last save, and return its outcome, the same on all processes.

        Raises:
            SaveFailedError: If `max_failed_saves` saves have failed in a row.
        """
        outcome = trainer.strategy.broadcast(self._writer.wait())
        if outcome is None:
            return self._outcome
        self._outcome = outcome
        if not isinstance(outcome, SaveFailedError):
            self._num_failed = 0
            return outcome
        self._num_failed += 1
        self._saved_at = None
        if self._num_failed >= self.max_failed_saves:
            raise outcome
        rank_zero_warn(
            f"{outcome}. Training continues; it stops after {self.max_failed_saves} failed saves "
            f"in a row, so far {self._num_failed}"
        )
        return outcome

    def _facts(self, trainer: Trainer, reason: str) -> dict[str, Any]:
        """Return the manifest entries for the current state."""
        return {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "reason": reason,
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "metrics": self._measured(trainer),
            "world_size": trainer.world_size,
            "strategy": type(trainer.strategy).__name__,
            "versions": {
                "diffmm": __version__,
                "torch": str(torch.__version__),
                "lightning": lightning_version,
            },
        }

    def _measured(self, trainer: Trainer) -> dict[str, float]:
        """Return the monitored metric if this state has just been validated and the value is
        finite.

        Raises:
            ValueError: If the metric is not logged; the message lists the logged metrics.
        """
        if self.monitor is None or not trainer.validating:
            return {}
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ValueError(
                f"monitor {self.monitor!r} is not logged in validation; logged metrics: {logged}"
            )
        value = float(trainer.callback_metrics[self.monitor])
        return {self.monitor: value} if math.isfinite(value) else {}
