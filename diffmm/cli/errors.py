"""What a user got wrong."""

from collections.abc import Iterator
from contextlib import contextmanager


class BadInput(Exception):
    """Mistakes of the user, one line each; the command line prints them and exits with 2."""

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.lines = [" ".join(mistake.split()) for mistake in mistakes]


class RunFailed(Exception):
    """A run that was started well could not go on; the command line prints it and exits with 1."""


@contextmanager
def refusing() -> Iterator[None]:
    """The library's own refusals (`ValueError`, `FileNotFoundError`) become `BadInput`."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise BadInput(told(error)) from error


def told(error: BaseException) -> str:
    """The message of an error, without the traceback of the worker process it came from."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if "Original Traceback" in str(error):
        return lines[-1].partition(": ")[2] or lines[-1]
    return " ".join(lines)
