"""Runs that stop at a signal: all processes at the same step, and nothing lost."""

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
"""That stop a run; where processes get several, the last of these counts."""

QUESTION = "stop"
"""What the processes are asked, see `Coordinator.ask`."""

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}
"""Of a process that was stopped by a signal."""


class GracefulShutdown(Callback):
    """Ends a run that gets SIGTERM, SIGUSR1 or SIGINT (Ctrl-C), in any of its processes: all of
    them finish the same step, save, and raise Lightning's `SIGTERMException`, a `SystemExit`, so
    that they exit with 143 (130 after SIGINT).

    The processes agree at the end of every optimizer step (with the `Coordinator`, which asks for
    `NonFiniteGuard` at the same time), and at every batch of validation. A
    validation that was cut short is made again, from its beginning, when the run goes on. Before
    the first step there is nothing to save. Further signals change nothing, least of all a save.

    It saves by the trainer's `Checkpoints`; without that, as `stopped_step_00001000.ckpt` in
    `default_root_dir`; and not at all where the trainer's checkpoints are off.

    Under SLURM, SIGUSR1 (`#SBATCH --signal=USR1@120`: two minutes before the time is up) also puts
    the job back into the queue, once everything is saved.

    While `fit` runs, Lightning's own signal handlers are off: SIGTERM to one process of several
    makes them hang, and SLURM's signal makes them save elsewhere. Afterwards all handlers are what
    they were before. Data loaders with workers should have
    `worker_init_fn=diffmm.workers.ignore_stop_signals`: signals are often sent to workers as well.

    Args:
        requeue: whether SIGUSR1 requeues a SLURM job.
    """

    def __init__(self, *, requeue: bool = True) -> None:
        self.requeue = requeue
        self._active = False
        self._got: signal.Signals | None = None  # by this process
        self._agreed: signal.Signals | None = None  # to be obeyed, by all processes
        self._step = 0
        self._num_common_batches = 0.0
        self._random_state: Tensor | None = None  # after this fit's last step

    @property
    def is_stopping(self) -> bool:
        """Whether the processes have agreed to stop."""
        return self._agreed is not None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Python takes signals in its main thread alone.
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
            return  # gradients are being accumulated, and would be lost
        self._step = trainer.global_step
        self._random_state = torch.get_rng_state()
        if self._active:
            self._hear(*Coordinator.of(trainer).agree(trainer, [QUESTION]))
        if self.is_stopping:
            # Lightning first logs this step, and then raises its exception.
            self._save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Where processes have unequal shares, only so many batches are sure to come in all.
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
            # As it was before the validation, in which a loader drew a number when it began.
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
            os.write(2, b"\nstopping after this step (at once, without saving: Ctrl-\\)\n")
        self._got = got if self._got is None else max(self._got, got, key=SIGNALS.index)

    def _vote(self) -> float:
        """What this process knows; 0 is to go on."""
        return 0.0 if self._got is None else SIGNALS.index(self._got) + 1.0

    def _hear(self, vote: float) -> None:
        """Take the highest of all processes' votes."""
        if vote > 0.0:
            self._agreed = SIGNALS[int(vote) - 1]

    def _agree(self, trainer: Trainer) -> bool:
        """Ask all processes, outside of a step."""
        if self._active:
            self._hear(_largest(trainer, self._vote()))
        return self.is_stopping

    def _end(self, trainer: Trainer) -> None:
        """End a validation."""
        if not trainer.sanity_checking:
            # Otherwise Lightning leaves the workers of the training data to wait for their end.
            trainer.training = True
        raise SIGTERMException

    def _save(self, trainer: Trainer) -> None:
        assert self._agreed is not None
        where = save_before_end(trainer, reason=self._agreed.name)
        rank_zero_info(
            f"{self._agreed.name}: stopped after step {trainer.global_step}, "
            f"{'not saved: checkpoints are off' if where is None else f'saved in {where}'}"
        )


class _Handlers:
    """Stands in for what Lightning does about signals, until the trainer is torn down."""

    def __init__(self, stop: GracefulShutdown, trainer: Trainer) -> None:
        self.stop = stop
        self.before = {number: signal.signal(number, stop._note) for number in SIGNALS}
        self.put_back = replace_signal_handling(trainer, self)

    @property
    def received_sigterm(self) -> bool:
        """Lightning's loops ask after every batch, and raise `SIGTERMException`."""
        return self.stop.is_stopping

    def register_signal_handlers(self) -> None:
        """They are set already."""

    def teardown(self) -> None:
        """The last thing that a trainer does, after an exception too."""
        for number, handler in self.before.items():
            if handler is not None:
                signal.signal(number, handler)
        self.put_back()


def save_before_end(trainer: Trainer, *, reason: str) -> Path | None:
    """Save a run that is about to end; every process calls it at the same step.

    Returns:
        Where; nothing if the trainer keeps no checkpoints.
    """
    path = _save(trainer, reason)
    # Lightning kills all processes when one of them ends with a code other than 0.
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
    """Put the SLURM job that this process belongs to, if any, back into the queue."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip()
        rank_zero_warn(f"`{' '.join(command)}` failed ({reason}): submit the job again yourself")


def _largest(trainer: Trainer, value: float) -> float:
    """The largest `value` of all processes."""
    if trainer.world_size == 1:
        return value
    values = torch.tensor([value], device=trainer.strategy.root_device)
    torch.distributed.all_reduce(values, ReduceOp.MAX)
    return values.item()
