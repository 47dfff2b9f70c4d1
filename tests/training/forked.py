"""Programs in processes that start at once: forks of a server that has imported what they use.

A Python process takes several seconds to import torch and Lightning.
"""

import faulthandler
import io
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

PRELOADED = (
    "lightning.pytorch",
    "datasets",
    "datamodules",
    "diffmm.hub.loading",
    "diffmm.recipes.trainer",
    # What training imports when it begins.
    "datamodules.image.data",
    "diffmm.cli.fit",
    "diffmm.recipes.out_of_memory",
    "diffmm.training",
    "sklearn.datasets",
    "torch.utils.tensorboard",
)


class Ended(NamedTuple):
    """The exit code of a process, negative for a signal, and its output."""

    code: int | None
    out: str
    err: str


def run_as_torchrun(
    script: Path, count: int, arguments: Sequence[str], logs: Path, seconds: float = 150.0
) -> None:
    """Run `python script arguments...` in several processes, as torchrun does.

    Args:
        script: Script to run.
        count: Number of processes.
        arguments: Arguments of the script.
        logs: Folder for the output of the processes.
        seconds: Time limit.

    Raises:
        AssertionError: If a process fails or does not end in time, with the output of all.
    """
    calls = [(_script, (script, list(arguments)))] * count
    ended = _run(calls, torchrun_environments(count), Path.cwd(), logs, seconds)
    assert [each.code for each in ended] == [0] * count, ended


def run_diffmm(
    arguments: Sequence[object],
    folder: Path,
    logs: Path,
    *,
    count: int = 1,
    is_read: bool = True,
    unbuffered: bool = False,
    seconds: float = 150.0,
) -> list[Ended]:
    """Run `diffmm arguments...` in a folder, in one process or in several, as torchrun does.

    Args:
        arguments: Arguments of `diffmm`.
        folder: Working directory.
        logs: Folder for the output of the processes.
        count: Number of processes.
        is_read: Whether the output is read; otherwise it is a pipe that is closed.
        unbuffered: Whether the output is unbuffered, as with `PYTHONUNBUFFERED=1`.
        seconds: Time limit.
    """
    calls = [(_diffmm, ([str(each) for each in arguments], is_read, unbuffered))] * count
    environments = torchrun_environments(count) if count > 1 else [{}]
    return _run(calls, environments, folder, logs, seconds)


def torchrun_environments(count: int) -> list[dict[str, str]]:
    """The environment variables of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **{"CUDA_VISIBLE_DEVICES": "", "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


Call = tuple[Callable[..., None], tuple[Any, ...]]


def _run(
    calls: Sequence[Call],
    environments: Sequence[Mapping[str, str]],
    folder: Path,
    logs: Path,
    seconds: float,
) -> list[Ended]:
    """Run each call in a process; those that exceed the time limit print all their stack traces."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    processes, files = [], []
    for rank, (call, environment) in enumerate(zip(calls, environments, strict=True)):
        files.append([logs / f"{name}_{rank}.txt" for name in ("out", "err")])
        begin = (call, {"OMP_NUM_THREADS": "1", **environment}, folder, *files[-1])
        processes.append(context.Process(target=_begin, args=begin))
        processes[-1].start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for number in (signal.SIGABRT, signal.SIGKILL):
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)  # also workers, which briefly outlive their process
            process.join(10)
    return [
        Ended(process.exitcode, *(path.read_text() for path in paths))
        for process, paths in zip(processes, files, strict=True)
    ]


def _begin(call: Call, environment: Mapping[str, str], folder: Path, out: Path, err: Path) -> None:
    """Entry point of a process."""
    os.setsid()
    # Reset the start method, which would otherwise be that of the fork server.
    multiprocessing.set_start_method(None, force=True)
    os.environ.update(environment)
    os.chdir(folder)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    faulthandler.enable()
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
    function, arguments = call
    function(*arguments)


def _script(script: Path, arguments: list[str]) -> None:
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def _diffmm(arguments: list[str], is_read: bool, unbuffered: bool) -> None:
    from diffmm.cli import main

    if not is_read:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    if unbuffered:
        raw = open(1, "wb", buffering=0, closefd=False)  # noqa: SIM115
        sys.stdout = io.TextIOWrapper(raw, write_through=True)
    sys.argv = ["diffmm", *arguments]
    try:
        sys.exit(main(arguments))
    finally:
        sys.stdout.flush()  # as the interpreter does on exit; a fork does so without errors
