"""Errors in the user's input, and failed runs."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Mistakes in the input, one line each; the command line prints them and exits with 2."""

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.lines = [" ".join(mistake.split()) for mistake in mistakes]


class RunFailedError(Exception):
    """A run that had started could not continue; the command line prints this and exits with 1."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turn the library's errors (`ValueError`), and those of files that cannot be read or written
    (`OSError`), into `InputError`."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(message_of(error)) from error


def message_of(error: BaseException) -> str:
    """The message of an error, without the traceback of the worker process it came from."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if "Original Traceback" in str(error):
        return lines[-1].partition(": ")[2] or lines[-1]
    return " ".join(lines)


def warn(line: str) -> None:
    """Print a warning."""
    print(f"diffmm: warning: {line}", file=sys.stderr)
