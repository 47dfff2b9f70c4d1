"""Writes checkpoints, optionally in the background."""

import hashlib
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from diffmm import checkpoint_folders
from diffmm.checkpoint_folders import STATE_NAME
from diffmm.training.resilience.checkpoints.snapshot import num_bytes


class SaveFailedError(OSError):
    """A checkpoint could not be written; earlier checkpoints are intact."""


class HashedFile:
    """A file for `torch.save` that computes its hash while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.file.write(data)
        self.hash.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def write(directory: Path, state: dict[str, Any], facts: dict[str, Any]) -> Path:
    """Write a checkpoint, and return its folder.

    Raises:
        SaveFailedError: If writing fails; the message names the folder and the bytes needed and
            free. No partial checkpoint is left behind.
    """
    unfinished = None
    try:
        unfinished = checkpoint_folders.start(directory, facts["step"])
        with (unfinished / STATE_NAME).open("wb") as file:
            hashed = HashedFile(file)
            torch.save(state, cast(IO[bytes], hashed))
        hashes = {STATE_NAME: (hashed.size, hashed.hash.hexdigest())}
        return checkpoint_folders.finish(unfinished, facts, hashes)
    except (OSError, RuntimeError) as error:
        # torch wraps an OSError of the file in a RuntimeError.
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise failed(directory, facts["step"], num_bytes(state), error) from error


def failed(directory: Path, step: int, needed: int, error: Exception) -> SaveFailedError:
    """Return the error of a failed save."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    cause: BaseException = error
    while not isinstance(cause, OSError) and cause.__context__ is not None:
        cause = cause.__context__
    return SaveFailedError(
        f"the checkpoint of step {step} could not be written to {directory}: it needs about "
        f"{needed:,} bytes, and {free:,} are free there ({str(cause).splitlines()[0]})"
    )


class Writer:
    """Runs one save at a time, in a background thread or while training waits."""

    def __init__(self) -> None:
        self._running: Future[Path | SaveFailedError] | None = None

    def run(self, save: Callable[[], Path | SaveFailedError], *, background: bool) -> None:
        """Start a save. The outcome of the previous save must have been fetched by `wait`."""
        assert self._running is None
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._running = thread.submit(save)
        thread.shutdown(wait=not background)

    @property
    def is_busy(self) -> bool:
        """Whether a save is being written."""
        return self._running is not None and not self._running.done()

    def rest(self) -> None:
        """Wait until no save is running, without fetching its outcome."""
        if self._running is not None:
            wait([self._running])

    def wait(self) -> Path | SaveFailedError | None:
        """Wait for the last save and return its outcome; `None` if it was already fetched."""
        running, self._running = self._running, None
        return None if running is None else running.result()
