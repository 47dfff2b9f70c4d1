"""Processes that load data beside a training process."""

import os
import signal
import threading


def ignore_stop_signals(worker_id: int) -> None:
    """Leave the signals that stop a run to its training process: a `DataLoader`'s `worker_init_fn`.

    A terminal, torchrun and SLURM send them to every process of a run. A worker that ended by one
    would take along the training process, which is about to save. It still ends with that process,
    or when that process (and nobody else) sends SIGTERM, as loaders do.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Only waiting for a signal tells its sender. (macOS has no such call: SIGTERM is as before.)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
