"""Forked processes, started again where one is born dead."""

import logging
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen

logger = logging.getLogger(__name__)

SECONDS_TO_BE_BORN = 10.0
"""For a process's first try; a fork takes hundredths of one."""


class CheckedFork(ForkProcess):
    """A forked process that is killed and forked again if it does not begin to run.

    In Python 3.11.7 and other releases before 3.12 a child waits forever for a lock of the
    interpreter's, if another thread held that at the moment of the fork
    (https://github.com/python/cpython/issues/112275): one of a process group's, say, which lets go
    of a tensor. Every try has twice the time of the one before.
    """

    _ends: tuple[Connection, Connection]
    """Of the pipe through which the child tells that it runs."""

    @staticmethod
    def _Popen(process_obj: "CheckedFork") -> Popen:  # type: ignore[override]
        seconds = SECONDS_TO_BE_BORN
        while True:
            reader, writer = process_obj._ends = Pipe(duplex=False)
            child = Popen(process_obj)
            writer.close()
            with reader:
                if reader.poll(seconds):
                    return child
            logger.warning(
                f"a forked process did not begin to run within {seconds:g} seconds: forked again "
                f"(Python 3.12 does not need this)"
            )
            child.kill()
            child.wait()
            child.close()
            seconds *= 2

    def run(self) -> None:
        reader, writer = self._ends
        with reader, writer:
            writer.send_bytes(b"")
        super().run()


class CheckedForks(ForkContext):
    """The `multiprocessing` context of `CheckedFork`."""

    Process = CheckedFork
