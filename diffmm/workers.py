"""Data loader workers of a training process."""

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
"""Whether forked processes of this Python can hang, which `diffmm.forks` handles."""

Sample = TypeVar("Sample", covariant=True)


class WorkerLoader(DataLoader[Sample]):
    """A `DataLoader` whose workers start with stop signals blocked until its `worker_init_fn`,
    which should be `ignore_stop_signals`, handles them. Workers that hang when forked by a Python
    before 3.12 are started again."""

    def __iter__(self) -> Any:
        if self.num_workers == 0:
            return super().__iter__()
        is_forked = multiprocessing.get_start_method(allow_none=True) in (None, "fork")
        if FORKS_CAN_HANG and is_forked and self.multiprocessing_context is None:
            from diffmm.forks import CheckedForks  # cannot be imported on Windows

            self.multiprocessing_context = CheckedForks()
        with _stop_signals_held():
            return super().__iter__()


def ignore_stop_signals(worker_id: int) -> None:
    """A `worker_init_fn` of a `DataLoader` that ignores stop signals, which the training process
    handles.

    A terminal, torchrun and SLURM send stop signals to every process of a run. If a worker exited,
    the training process would fail before it has saved a checkpoint. A worker still exits with the
    training process, or when only that process sends SIGTERM, as data loaders do.
    """
    for number in STOP_SIGNALS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    # Only waiting for a signal reveals its sender. (macOS lacks `sigwaitinfo`; there SIGTERM keeps
    # its default action.)
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
    """Block stop signals in this thread and in processes that it starts, during the body."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
