"""Fixtures for all tests."""

import gc
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor

# Before the Hub's client is imported, here or in the processes of tests: without a network it would
# try for 20 seconds to download what tests name, such as a tokenizer.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure() -> None:
    """Make tests fail if Dynamo gives up on compiling a function after too many variants, instead
    of running it uncompiled with a warning; and compile machine code without vector instructions,
    because torch tries those of the CPU in a process each, which takes longer than all tests of
    machine code. Garbage is collected less often, because the tests have many objects. Ctrl-C is
    obeyed, which a shell makes the processes that it starts in the background ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.set_threshold(20_000, 20, 20)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    inductor.cpp.vec_isa_ok = False


def pytest_collection_finish() -> None:
    """Exempt all that is imported now from garbage collections, which take long with so many
    objects: a twentieth of the time of all tests."""
    gc.freeze()


def half(items: list[pytest.Item], which: int) -> list[pytest.Item]:
    """The first or the second half of the tests."""
    middle = len(items) // 2
    return items[middle:] if which else items[:middle]


GPU_WARNINGS = (
    "ignore:Attempting to run cuBLAS, but there was no current CUDA context",
    "ignore:The CUDA Graph is empty",
    "ignore:The AccumulateGrad node's stream does not match",
    "ignore:Synchronization debug mode is a prototype feature",
    "ignore:TensorFloat32 tensor cores",
)
"""Warnings of torch about its own operations, and its advice to round float32."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests if there is no GPU, and ignore torch's warnings in them. Put tests whose data
    loaders fork at the start of both halves, with one of which each of two processes begins: a fork
    takes several times as long once a process has compiled models."""
    forking = [item for item in items if "datamodules" in item.path.parts]
    others = [item for item in items if "datamodules" not in item.path.parts]
    items[:] = [*half(forking, 0), *half(others, 0), *half(forking, 1), *half(others, 1)]
    for item in items:
        if not item.get_closest_marker("gpu"):
            continue
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        for warning in GPU_WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Started(subprocess.Popen[str]):
    """A command that runs during a test, in its own process group.

    Args:
        command: Command to run.
        environment: Environment variables, in addition to those of the test.
        cwd: Working directory; by default that of the test.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        cwd: Path | None = None,
    ) -> None:
        super().__init__(
            command,
            cwd=cwd,
            env={**os.environ, "PYTHONFAULTHANDLER": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, seconds: float) -> tuple[str, str]:
        """Wait for the command, and return its stdout and stderr; see `finish_all`."""
        return self.finish_all([self], seconds)[0]

    @staticmethod
    def finish_all(processes: Sequence["Started"], seconds: float) -> list[tuple[str, str]]:
        """Wait for several commands, and return the stdout and stderr of each.

        If that takes too long, the test fails with the stack traces of all their threads.
        """
        end = time.monotonic() + seconds
        try:
            return [each.communicate(timeout=end - time.monotonic()) for each in processes]
        except subprocess.TimeoutExpired:
            for each in processes:
                each._send(signal.SIGABRT)
            printed = [
                "\n".join([str(each.args), *each.communicate(timeout=30)]) for each in processes
            ]
        pytest.fail("\n".join([f"did not end within {seconds:g} seconds:", *printed]))

    def __exit__(self, *exception: Any) -> None:
        """Kill the whole process group."""
        self._send(signal.SIGKILL)
        super().__exit__(*exception)

    def _send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)


@pytest.fixture(scope="session")
def start() -> type[Started]:
    """`with start(command, environment) as process: process.finish(seconds)`."""
    return Started
