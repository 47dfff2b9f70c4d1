"""Forked processes that are started again if they hang."""

import logging
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen

logger = logging.getLogger(__name__)

SECONDS_TO_BE_BORN = 10.0
"""Timeout of the first attempt; a fork takes hundredths of a second."""


class CheckedFork(ForkProcess):
    """A forked process that is killed and forked again if it does not start to run.

    In Python 3.11.7 and other releases before 3.12, a child waits forever for a lock of the
    interpreter if another thread held it during the fork
    (https://github.com/python/cpython/issues/112275), for example a thread of a process group that
    releases a tensor. The timeout doubles with every attempt.
    """

    _ends: tuple[Connection, Connection]
    """The ends of the pipe through which the child signals that it runs."""

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
                f"a forked process did not start within {seconds:g} seconds: forking it again "
                f"(not needed with Python 3.12)"
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
