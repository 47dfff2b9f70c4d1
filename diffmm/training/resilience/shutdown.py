"""Graceful shutdown: on a signal, all processes stop after the same step and save."""

import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.distributed import ReduceOp

from diffmm.training.lightning_internals import replace_signal_handling
from diffmm.training.resilience.checkpoints import check_weights
from diffmm.training.resilience.coordinator import Coordinator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that stop a run. If processes receive several, the last in this order takes effect."""

QUESTION = "stop"
"""Name of the question to all processes, see `Coordinator.ask`."""

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}
"""Exit code of the process, by the signal that stopped it."""


class GracefulShutdown(Callback):
    """Stops a run when any of its processes receives SIGTERM, SIGUSR1 or SIGINT (Ctrl-C). All
    processes finish the same step (the current one or, of several processes, the one after it),
    save a checkpoint and raise Lightning's `SIGTERMException`, a
    `SystemExit`, so that they exit with code 143 (130 after SIGINT).

    The processes communicate at the end of every optimizer step (in the same all-reduce as
    `NonFiniteGuard`, see `Coordinator`) and after every validation batch. An interrupted validation
    is repeated from its beginning when the run is resumed. Before the first step, nothing is saved.
    Further signals have no effect; in particular, they do not interrupt a save.

    The checkpoint is saved by the trainer's `Checkpoints` callback or, without one, as
    `stopped_step_00001000.ckpt` in `default_root_dir`. Nothing is saved if checkpointing is
    disabled in the trainer.

    Under SLURM, SIGUSR1 (`#SBATCH --signal=USR1@120`, two minutes before the time limit) also
    requeues the job, after the checkpoint is saved.

    While `fit` runs, Lightning's own signal handlers are disabled: they hang when only one of
    several processes receives SIGTERM, and on SLURM's signal they save to another location. All
    previous handlers are restored afterwards. Data loaders with workers should use
    `worker_init_fn=diffmm.workers.ignore_stop_signals`, because signals are often also sent to the
    workers.

    Args:
        requeue: Whether SIGUSR1 requeues a SLURM job.
    """

    def __init__(self, *, requeue: bool = True) -> None:
        self.requeue = requeue
        self._active = False
        self._got: signal.Signals | None = None  # received by this process
        self._agreed: signal.Signals | None = None  # agreed on by all processes
        self._step = 0
        self._num_common_batches = 0.0
        self._random_state: Tensor | None = None  # after the last step of this fit

    @property
    def is_stopping(self) -> bool:
        """Whether the processes have agreed to stop."""
        return self._agreed is not None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Python handles signals in its main thread only.
        self._active = stage == "fit" and threading.current_thread() is threading.main_thread()
        self._got = self._agreed = None
        self._random_state = None
        if self._active:
            Coordinator.of(trainer).ask(QUESTION, self._vote)
            _Handlers(self, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if self._agree(trainer):
            raise SIGTERMException

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self._step:
            return  # accumulated gradients would be lost
        self._step = trainer.global_step
        self._random_state = torch.get_rng_state()
        if self._active:
            self._store_vote(self._vote_of_all(trainer))
        if self.is_stopping:
            # After this hook, Lightning logs the step and then raises its exception.
            self._save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Processes may have different numbers of batches; they communicate only in common ones.
        count = float(sum(trainer.fit_loop.epoch_loop.val_loop.max_batches))
        if self._active:
            self._num_common_batches = -_largest(trainer, -count)
        if self.is_stopping:
            self._end(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._num_common_batches -= 1
        if not 0 < self._num_common_batches < float("inf") or not self._agree(trainer):
            return
        if self._random_state is not None:
            # Restore the state from before validation, whose data loader drew a random number.
            trainer.training = True
            torch.set_rng_state(self._random_state)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback.on_validation_epoch_end(trainer, pl_module)  # swaps weights back
            self._save(trainer)
        self._end(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and self._agree(trainer):
            self._save(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._agreed is None or not isinstance(exception, SIGTERMException):
            return
        exception.code = EXIT_CODES[self._agreed]
        if self._agreed is signal.SIGUSR1 and self.requeue and trainer.is_global_zero:
            requeue_slurm_job()

    def _note(self, number: int, frame: FrameType | None) -> None:
        got = signal.Signals(number)
        if got is signal.SIGINT and self._got is None and getattr(rank_zero_only, "rank", 0) == 0:
            # Printing is not safe here: this may run within another print.
            os.write(2, b"\nstopping after this step (Ctrl-\\ stops immediately, without saving)\n")
        self._got = got if self._got is None else max(self._got, got, key=SIGNALS.index)

    def _vote(self) -> float:
        """Return this process's vote; 0 means to continue."""
        return 0.0 if self._got is None else SIGNALS.index(self._got) + 1.0

    def _store_vote(self, vote: float) -> None:
        """Store the signal of the highest vote of all processes."""
        if vote > 0.0:
            self._agreed = SIGNALS[int(vote) - 1]

    def _vote_of_all(self, trainer: Trainer) -> float:
        """Return the highest vote of all processes after a step."""
        if trainer.world_size == 1:
            return self._vote()
        return Coordinator.of(trainer).latest(trainer, QUESTION)

    def _agree(self, trainer: Trainer) -> bool:
        """Compare the votes of all processes outside of a step, and return whether to stop."""
        if self._active:
            self._store_vote(_largest(trainer, self._vote()))
        return self.is_stopping

    def _end(self, trainer: Trainer) -> None:
        """Stop during validation."""
        if not trainer.sanity_checking:
            # Otherwise Lightning does not shut down the workers of the training data loader.
            trainer.training = True
        raise SIGTERMException

    def _save(self, trainer: Trainer) -> None:
        assert self._agreed is not None
        where = save_before_end(trainer, reason=self._agreed.name)
        rank_zero_info(
            f"{self._agreed.name}: stopped after step {trainer.global_step}, "
            f"{'not saved: checkpoints are disabled' if where is None else f'saved in {where}'}"
        )


class _Handlers:
    """Replaces Lightning's signal handling until the trainer is torn down."""

    def __init__(self, stop: GracefulShutdown, trainer: Trainer) -> None:
        self.stop = stop
        self.before = {number: signal.signal(number, stop._note) for number in SIGNALS}
        self.restore = replace_signal_handling(trainer, self)

    @property
    def received_sigterm(self) -> bool:
        """Whether to stop; Lightning's loops check it after every batch and raise
        `SIGTERMException`."""
        return self.stop.is_stopping

    def register_signal_handlers(self) -> None:
        """Do nothing: the handlers are already registered."""

    def teardown(self) -> None:
        """Restore the previous handlers; called last, also after an exception."""
        for number, handler in self.before.items():
            if handler is not None:
                signal.signal(number, handler)
        self.restore()


def save_before_end(trainer: Trainer, *, reason: str) -> Path | None:
    """Save a run that is about to stop. Every process must call it at the same step.

    Returns:
        Path of the checkpoint; `None` if checkpointing is disabled in the trainer.
    """
    path = _save(trainer, reason)
    # Lightning kills all processes when one of them exits with a non-zero code.
    getattr(trainer.strategy.launcher, "procs", []).clear()
    trainer.strategy.barrier()
    return path


def _save(trainer: Trainer, reason: str) -> Path | None:
    saver = Coordinator.of(trainer).saver
    if saver is not None:
        return saver.save_now(trainer, reason=reason)
    if trainer.checkpoint_callback is None:
        return None
    check_weights(trainer)
    path = Path(trainer.default_root_dir, f"stopped_step_{trainer.global_step:08d}.ckpt")
    trainer.save_checkpoint(path)
    return path


def requeue_slurm_job() -> None:
    """Requeue the SLURM job that this process belongs to, if any."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip()
        rank_zero_warn(f"`{' '.join(command)}` failed ({reason}): resubmit the job manually")


def _largest(trainer: Trainer, value: float) -> float:
    """Return the largest `value` of all processes."""
    if trainer.world_size == 1:
        return value
    values = torch.tensor([value], device=trainer.strategy.root_device)
    torch.distributed.all_reduce(values, ReduceOp.MAX)
    return values.item()
