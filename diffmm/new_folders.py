"""Files and folders that appear whole or not at all. Needs only the standard library."""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in each `OSError` of the `with` statement that would name no file, as on a full
    disk, or only one with a temporary name or in a folder with one: `.`, the name of `path`, `.`
    and more."""
    try:
        yield
    except OSError as error:
        named = () if error.filename is None else Path(os.fsdecode(error.filename)).parts
        is_temporary = any(part.startswith(f".{path.name}.") for part in named)
        if error.errno is not None and (error.filename is None or is_temporary):
            error.filename = os.fspath(path)
        raise


def discard(file: Path) -> None:
    """Remove an unfinished file, if there is one: on a read-only disk even asking is an error."""
    with suppress(OSError):
        file.unlink(missing_ok=True)


@contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """Yield a new, empty folder beside `path`, in which its files are made before they are moved to
    their place. At the end of the `with` statement it is removed with what is still in it.

    The folder has a name of its own, so that several threads or processes can write at the same
    time. Folders above `path` are created, and removed again if nothing came to be in them.

    Raises:
        OSError: If a file cannot be written; it names `path` (see `naming`).
    """
    new_parents = [each for each in path.parents if not each.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with naming(path):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # not empty
            for each in new_parents:
                each.rmdir()


@contextmanager
def appearing(
    folder: Path, *, kept: Collection[str] = (), removed: Collection[str] = ()
) -> Iterator[Path]:
    """Yield a new, empty folder for the files of `folder`; at the end of the `with` statement it
    takes the place of `folder`, unless there is an error.

    The new folder is in a `workspace`. If `folder` exists, it stays the same folder, and the new
    files are moved into it one by one.

    Args:
        folder: The folder. Folders above it are created, and removed again if there is an error.
        kept: Names of files that are not replaced where they exist.
        removed: Patterns of names of files that are removed from `folder` unless there is a new
            one of the same name.
    """
    given, folder = folder, folder.resolve()  # "." has no name
    try:
        with workspace(folder) as beside:
            unfinished = beside / "new"  # with the permissions of other new folders
            unfinished.mkdir()
            yield unfinished
            if not folder.exists():
                try:
                    unfinished.rename(folder)
                    return
                except OSError:
                    if not folder.is_dir():  # another process was faster
                        raise
            _move(unfinished, folder, kept, removed)
    except OSError as error:
        if error.filename == os.fspath(folder):
            error.filename = os.fspath(given)
        raise


def _move(source: Path, folder: Path, kept: Collection[str], removed: Collection[str]) -> None:
    """Move all files into an existing folder."""
    written = {file.name for file in source.iterdir()}
    for file in [file for pattern in removed for file in folder.glob(pattern)]:
        if file.name not in written:
            file.unlink(missing_ok=True)
    for name in sorted(written):
        if name not in kept or not (folder / name).exists():
            (source / name).replace(folder / name)
