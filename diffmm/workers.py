"""Processes that load data beside a training process."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.utils.data import DataLoader

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM} | (
    {signal.SIGUSR1} if hasattr(signal, "SIGUSR1") else set()
)

FORKS_CAN_HANG = sys.version_info < (3, 12) and sys.platform == "linux"
"""Whether this is a Python whose forks `diffmm.forks` looks after, where processes are forked."""

Sample = TypeVar("Sample", covariant=True)


class WorkerLoader(DataLoader[Sample]):
    """A `DataLoader` whose workers are born with the signals that stop a run held back, until its
    `worker_init_fn`, which should be `ignore_stop_signals`, says what becomes of them; and born
    again where a Python before 3.12 lets a forked one hang."""

    def __iter__(self) -> Any:
        if self.num_workers == 0:
            return super().__iter__()
        is_forked = multiprocessing.get_start_method(allow_none=True) in (None, "fork")
        if FORKS_CAN_HANG and is_forked and self.multiprocessing_context is None:
            from diffmm.forks import CheckedForks  # Windows has nothing that this could import

            self.multiprocessing_context = CheckedForks()
        with _stop_signals_held():
            return super().__iter__()


def ignore_stop_signals(worker_id: int) -> None:
    """Leave the signals that stop a run to its training process: a `DataLoader`'s `worker_init_fn`.

    A terminal, torchrun and SLURM send them to every process of a run. A worker that ended by one
    would take along the training process, which is about to save. It still ends with that process,
    or when that process (and nobody else) sends SIGTERM, as loaders do.
    """
    for number in STOP_SIGNALS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    # Only waiting for a signal tells its sender. (macOS has no such call: SIGTERM is as before.)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def _stop_signals_held() -> Iterator[None]:
    """Hold them back, in this thread and in all processes it starts, until the end."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
