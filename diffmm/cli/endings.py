"""Exit of a command on a signal, a closed pipe or a full disk."""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class TerminatedError(SystemExit):
    """Raised on SIGTERM, so that the command cleans up and exits with 143."""

    def __init__(self) -> None:
        super().__init__(143)


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise `TerminatedError` unless another handler (of a run that saves first) is
    active.

    The handler of Ctrl-C is restored on exit, because Lightning removes it after the first Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    process = os.getpid()

    def obey(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise TerminatedError
        # A forked process has nothing to clean up.
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
    """Flush standard output, because the interpreter cannot report errors when it flushes on exit.

    Raises:
        OSError: If flushing fails; the remaining output is discarded.
    """
    try:
        sys.stdout.flush()
    except OSError:
        is_closed = is_output_closed()
        with suppress(OSError, ValueError):  # a stream without a file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        if is_closed:
            raise ClosedOutputError from None
        raise


class ClosedOutputError(BrokenPipeError):
    """The reader of this command's output has closed it, as in `diffmm recipes | head -1`."""


def is_output_closed() -> bool:
    """Whether standard output is a pipe whose reader has closed it."""
    try:
        place = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    look = select.poll()
    look.register(place, select.POLLOUT)
    return any(event & select.POLLERR for _, event in look.poll(0))


def is_of_closed_output(error: BaseException) -> bool:
    """Whether a command has ended because its output is no longer read, whatever was made of the
    error on its way; the remaining output is then discarded."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    is_of_pipe = any(isinstance(each, BrokenPipeError) for each in chain)
    if any(isinstance(each, ClosedOutputError) for each in chain):
        return True
    if isinstance(error, SystemExit) and is_of_pipe:
        return True  # raised by Rich, which has discarded the output
    is_closed = is_output_closed()
    if not isinstance(error, SystemExit) and not (is_of_pipe and is_closed):
        return False
    try:
        # A command that ends normally (`--help` of argparse) may have left its output unwritten.
        flush_output()
    except OSError:
        return is_closed
    return is_of_pipe and is_closed
