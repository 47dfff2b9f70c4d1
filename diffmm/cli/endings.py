"""How a command ends when it is stopped from outside: by a signal, a closed pipe or a full disk."""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class TerminatedError(SystemExit):
    """SIGTERM came: what has been begun is put away, and the command exits with 143."""

    def __init__(self) -> None:
        super().__init__(143)


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise `TerminatedError`, where nothing else (a run that saves first) obeys it.

    Ctrl-C keeps its handler, which Lightning takes away when it has come once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    process = os.getpid()

    def obey(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise TerminatedError
        # A forked process, which has nothing to put away.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    if before[signal.SIGTERM] is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, obey)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def flush_output() -> None:
    """Write what was printed, before the interpreter's end does it and cannot say what went wrong.

    Raises:
        OSError: if it cannot be written; the rest is given up.
    """
    try:
        sys.stdout.flush()
    except OSError:
        is_closed = is_unheard()
        with suppress(OSError, ValueError):  # a stream without a file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        if is_closed:
            raise ClosedOutputError from None
        raise


class ClosedOutputError(BrokenPipeError):
    """The output of this command is no longer read: `diffmm recipes | head -1`."""


def is_unheard() -> bool:
    """Whether standard output is a pipe whose reader has closed it."""
    try:
        place = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    look = select.poll()
    look.register(place, select.POLLOUT)
    return any(event & select.POLLERR for _, event in look.poll(0))
