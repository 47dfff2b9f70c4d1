"""Starts runs as real processes that can be killed.

The processes run `diffmm fit ...`. They are forked from a server that has imported all modules,
which saves ten seconds per process; several processes form a group as under torchrun.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = (
    "benchmarks.faults.recorder",
    "datamodules.text.data",
    "datasets",
    "diffmm.cli.fit",
    "diffmm.recipes.out_of_memory",
    "diffmm.recipes.trainer",
    "diffmm.training",
    "torch.utils.tensorboard",
)


class Attempt:
    """One start of a run, with one or more processes.

    Args:
        arguments: Arguments of `diffmm`.
        log: File to which the output of the processes is appended.
        num_processes: Number of processes.
    """

    def __init__(self, arguments: Sequence[str], log: Path, num_processes: int = 1) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self.log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        self.ranks: list[ForkServerProcess] = []
        port = free_port()
        for rank in range(num_processes):
            environment = {"OMP_NUM_THREADS": "1"}
            if num_processes > 1:
                environment |= {
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
                    **{"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)},
                    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                    "TORCHELASTIC_RUN_ID": "faults",
                }
            process = context.Process(target=_run, args=(list(arguments), log, environment))
            process.start()
            self.ranks.append(process)

    @property
    def is_running(self) -> bool:
        """Whether all processes are running."""
        return all(process.is_alive() for process in self.ranks)

    def send(self, number: int, ranks: Sequence[int]) -> None:
        """Send a signal to some of the processes, without their workers."""
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(self.ranks[rank].pid or 0, number)

    def kill(self, ranks: Sequence[int]) -> None:
        """Send SIGKILL to some of the processes and their workers."""
        for rank in ranks:
            kill_group(self.ranks[rank])

    def wait(self, seconds: float) -> list[int | None]:
        """Return the exit codes; `None` for a process that did not end in time and was killed."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            # Workers briefly outlive their process.
            kill_group(process)
            process.join()
        return codes

    @property
    def printed(self) -> str:
        """The output of the processes so far."""
        text = self.log.read_bytes()[self._log_start :] if self.log.exists() else b""
        return text.decode(errors="replace")


def kill_group(process: ForkServerProcess) -> None:
    """Send SIGKILL to a process and its process group."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()  # It has not created its group yet.


def free_port() -> int:
    """Return an unused port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """Entry point of a process."""
    os.setsid()
    # Reset the start method, which would otherwise be that of the fork server.
    multiprocessing.set_start_method(None, force=True)
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    # Write each line immediately, as on a terminal.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = ["diffmm", *arguments]

    from diffmm.cli import main

    sys.exit(main(arguments))
