"""Writes checkpoints, if asked to beside the training."""

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
    """A checkpoint could not be written; the earlier ones are as they were."""


class HashedFile:
    """A file for `torch.save` whose hash is taken on the way."""

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
        SaveFailedError: naming the folder, and the bytes needed and free; nothing of it is left.
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
        # torch wraps the error of a file that it cannot write to in one of its own.
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise failed(directory, facts["step"], num_bytes(state), error) from error


def failed(directory: Path, step: int, needed: int, error: Exception) -> SaveFailedError:
    """The error of a save that did not work."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    cause: BaseException = error
    while not isinstance(cause, OSError) and cause.__context__ is not None:
        cause = cause.__context__
    return SaveFailedError(
        f"the checkpoint of step {step} could not be written to {directory}: it needs about "
        f"{needed:,} bytes, {free:,} are free there ({str(cause).splitlines()[0]})"
    )


class Writer:
    """Runs one save at a time, in a thread beside the training or while that waits."""

    def __init__(self) -> None:
        self._running: Future[Path | SaveFailedError] | None = None

    def run(self, save: Callable[[], Path | SaveFailedError], *, background: bool) -> None:
        """Begin a save; what became of the one before has been asked for."""
        assert self._running is None
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._running = thread.submit(save)
        thread.shutdown(wait=not background)

    @property
    def is_busy(self) -> bool:
        """Whether a save is being written."""
        return self._running is not None and not self._running.done()

    def rest(self) -> None:
        """Wait until nothing is being written; what became of it can still be asked for."""
        if self._running is not None:
            wait([self._running])

    def wait(self) -> Path | SaveFailedError | None:
        """What became of the save that was begun last, when it is done; `None` after that."""
        running, self._running = self._running, None
        return None if running is None else running.result()
