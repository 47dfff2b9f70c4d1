"""A run directory belongs to one process at a time.

Its owner holds a lock (`flock`) on a file in it, which the kernel lets go when the owner dies,
however it dies: nothing is ever stale.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffmm.cli.errors import BadInput

LOCK_NAME = "run.lock"


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Own a run directory, which is made if it is not there, until the block ends.

    If the block refuses its input, folders that were made for it are removed. Of the several
    processes of a run the first one owns the directory for all.

    Raises:
        BadInput: if another process owns it, with its number, its machine and since when.
    """
    if not is_first_process():
        yield
        return
    missing = [path for path in (run, *run.parents) if not path.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = _lock(run)
    except OSError as error:
        raise BadInput(f"{run} cannot be written: {error}") from error
    # Workers are forked: a copy of theirs would hold the lock after this process is gone.
    held = [lock]
    os.register_at_fork(after_in_child=lambda: _close(held))
    try:
        yield
    except BadInput:
        for path in missing:
            if path == run:
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
    finally:
        with suppress(FileNotFoundError):
            (run / LOCK_NAME).unlink()
        _close(held)


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
            raise BadInput(
                f"{run} is in use by {owner}: wait for it, end it, or choose another folder"
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
