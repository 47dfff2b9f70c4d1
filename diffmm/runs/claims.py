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

    If the block raises `InputError`, or is interrupted before the run has begun (before
    `config.yaml` is written), everything that it created is removed: the directory itself, or, in
    an existing directory, its new folders and the new files below them. The first process of a run
    owns the directory for all of its processes.

    Raises:
        InputError: If another process owns it; the message gives its process ID, host and start
            time.
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
    # Forked workers would otherwise inherit the lock and hold it after this process has ended.
    held = [lock]
    os.register_at_fork(after_in_child=lambda: _close(held))
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, InputError) or not (run / CONFIG_NAME).exists():
            _remove(run, missing)
            if run not in missing:
                _remove_new(run, before, deep=was_run)
            if config is not None and (run / CONFIG_NAME).read_text("utf-8") != config:
                write_text(run / CONFIG_NAME, config)
        raise
    finally:
        with suppress(FileNotFoundError):
            (run / LOCK_NAME).unlink()
        _close(held)


def _content(run: Path, *, deep: bool) -> set[Path]:
    """The content of a directory; with `deep`, also of its subdirectories."""
    return set(run.rglob("*") if deep else run.iterdir()) if run.is_dir() else set()


def _remove(run: Path, missing: list[Path]) -> None:
    """Remove the folders that were missing before."""
    for path in missing:
        if path == run:
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _remove_new(run: Path, before: set[Path], *, deep: bool) -> None:
    """Remove what was added to a directory that already existed."""
    for path in _content(run, deep=deep) - before:
        # A new file in the directory itself may be the user's, such as a log written by the shell.
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.parent != run or path.name == CONFIG_NAME:
            path.unlink(missing_ok=True)


def _close(held: list[int]) -> None:
    while held:
        os.close(held.pop())


def is_first_process() -> bool:
    """Whether this process is the first or only one of its run, according to the ranks that
    Lightning, torchrun and srun set."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def _lock(run: Path) -> int:
    """Lock the lock file of a run and write the owner to it; return its file descriptor."""
    import fcntl

    path = run / LOCK_NAME
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous owner removes the lock file, so the locked file must still be in place.
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
    record = {"process": os.getpid(), "machine": socket.gethostname(), "since": now}
    os.ftruncate(lock, 0)
    os.write(lock, json.dumps(record).encode())
    return lock


def _owner(path: Path) -> str:
    """A description of the process that holds a lock."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads(path.read_text(encoding="utf-8"))
        return f"process {record['process']} on {record['machine']} since {record['since']}"
    return "another process"
