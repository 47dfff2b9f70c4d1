"""A run directory belongs to one process at a time.

Its owner holds a lock (`flock`) on a file in it, which the kernel releases when the owner dies, so
that locks never become stale.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffmm.checkpoint_folders import write_text
from diffmm.recipes.errors import InputError
from diffmm.runs.directories import CONFIG_NAME

LOCK_NAME = "run.lock"


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Own a run directory, which is created if necessary, until the block ends.

    If the block refuses its input, or is stopped before the run has begun (has its `config.yaml`),
    whatever it created is removed: the directory itself, or, in an existing directory, its new
    folders and the new files below them. The first of a run's processes owns the directory for all.

    Raises:
        InputError: If another process owns it, with its number, its machine and the time.
    """
    if not is_first_process():
        yield
        return
    was_run = (run / CONFIG_NAME).exists()
    config = (run / CONFIG_NAME).read_text("utf-8", "replace") if was_run else None
    before = _content(run, deep=was_run)
    missing = [path for path in (run, *run.parents) if not path.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = _lock(run)
    except OSError as error:
        _remove(run, missing)
        raise InputError(f"{run} cannot be written: {error}") from error
    # Workers are forked: a copy of theirs would hold the lock after this process is gone.
    held = [lock]
    os.register_at_fork(after_in_child=lambda: _close(held))
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, InputError) or not (run / CONFIG_NAME).exists():
            _remove(run, missing)
            if run not in missing:
                _put_back(run, before, deep=was_run)
            if config is not None and (run / CONFIG_NAME).read_text("utf-8") != config:
                write_text(run / CONFIG_NAME, config)
        raise
    finally:
        with suppress(FileNotFoundError):
            (run / LOCK_NAME).unlink()
        _close(held)


def _content(run: Path, *, deep: bool) -> set[Path]:
    """What is in a directory, or also below it."""
    return set(run.rglob("*") if deep else run.iterdir()) if run.is_dir() else set()


def _remove(run: Path, missing: list[Path]) -> None:
    """Remove the folders that were missing before."""
    for path in missing:
        if path == run:
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _put_back(run: Path, before: set[Path], *, deep: bool) -> None:
    """Remove what has come into a directory that was there before."""
    for path in _content(run, deep=deep) - before:
        # A new file beside the run's own is perhaps the user's: a log that the shell writes.
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.parent != run or path.name == CONFIG_NAME:
            path.unlink(missing_ok=True)


def _close(held: list[int]) -> None:
    while held:
        os.close(held.pop())


def is_first_process() -> bool:
    """Whether this process is the first or the only one of its run. Lightning, torchrun and srun
    number those that they start."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def _lock(run: Path) -> int:
    """A locked file, which says who holds it."""
    import fcntl

    path = run / LOCK_NAME
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one before removes its file: what is locked must be the file that is there.
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                break
        except BlockingIOError:
            owner = _owner(path)
            os.close(lock)
            raise InputError(
                f"{run} is in use by {owner}: wait for it, stop it, or choose another directory"
            ) from None
        except OSError:
            os.close(lock)
            raise
        os.close(lock)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    told = {"process": os.getpid(), "machine": socket.gethostname(), "since": now}
    os.ftruncate(lock, 0)
    os.write(lock, json.dumps(told).encode())
    return lock


def _owner(path: Path) -> str:
    """Who holds a lock, in words."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads(path.read_text(encoding="utf-8"))
        return f"process {told['process']} on {told['machine']} since {told['since']}"
    return "another process"
