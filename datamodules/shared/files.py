"""Which files data are: regular ones, none of them hidden.

Every datamodule lists its folders here, and asks here before it opens a file: a named pipe would
keep a run waiting for a writer, beyond the reach of any signal.
"""

import heapq
import os
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffmm.checks import DataError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

_AT_ONCE = 50_000


def why_no_file(path: str | Path) -> str | None:
    """Why `path` is not to be opened, to be said after its name; `None` for a regular file.

    A symbolic link is what it points to.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except (OSError, ValueError) as error:  # a ring of links, a name with a null character
        return f"cannot be opened: {getattr(error, 'strerror', None) or error}"
    if stat.S_ISREG(mode):
        return None
    return f"is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file"


def check_file(path: str | Path, role: str) -> None:
    """Refuse what is no regular file.

    Args:
        path: of the file.
        role: what it is, for the message: `"manifest"`.

    Raises:
        FileNotFoundError: if there is nothing of this name.
        DataError: if it is something else, naming it.
    """
    fault = why_no_file(path)
    if fault == "does not exist":
        raise FileNotFoundError(f"no {role} {path}")
    if fault is not None:
        raise DataError(f"{role} {path} {fault}")


def read_text(path: str | Path, role: str) -> str:
    """The text of a small file in UTF-8, with or without a byte order mark.

    Args:
        path, role: as in `check_file`.

    Raises:
        FileNotFoundError: if there is nothing of this name.
        DataError: if it is no regular file, or not UTF-8, naming it.
    """
    check_file(path, role)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{role} {path} is not UTF-8 text: {error}") from error


def read_lines(path: str | Path, role: str) -> list[str]:
    """The lines of such a file. Arguments and errors as in `read_text`."""
    return read_text(path, role).splitlines()


def is_hidden(path: Path) -> bool:
    """Whether a name in `path` begins with a dot: `._a.png`, `.ipynb_checkpoints/a.png`."""
    return any(part.startswith(".") for part in path.parts)


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC): what a person would call the same name is the same.

    File systems differ: `é` may come back as one character or as `e` with an accent.
    """
    return unicodedata.normalize("NFC", name)


def list_files(folder: str | Path, extensions: Sequence[str]) -> list[Path]:
    """All that ends in one of `extensions` (in lower case) in `folder`, at any depth.

    In order of folders and then names. Hidden files and folders are passed over. Links to folders
    are followed, but not around in circles. What is no regular file is listed too, and refused when
    it is opened.
    """
    found = [
        (parent, name)
        for parent, name in _walk(os.fspath(folder))
        if name.lower().endswith(tuple(extensions))
    ]
    return [Path(parent, name) for parent, name in sorted(found)]


def walk_files(folder: str | Path, extensions: Sequence[str]) -> Iterator[Path]:
    """What `list_files` lists, found as it is asked for: in order of names, a folder's files where
    its own name stands. However many files there are, the names of `_AT_ONCE` are held at most for
    each folder on the way."""
    yield from _walk_in_order(Path(folder), tuple(extensions), frozenset())


def _walk_in_order(
    folder: Path, extensions: tuple[str, ...], above: frozenset[tuple[int, int]]
) -> Iterator[Path]:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    for name in _names_in_order(folder):
        path = folder / name
        if path.is_dir():
            yield from _walk_in_order(path, extensions, above | {identity})
        elif name.lower().endswith(extensions):
            yield path


def _names_in_order(folder: Path) -> Iterator[str]:
    """The names in a folder that are not hidden, sorted; it is looked through once for every
    `_AT_ONCE` of them."""
    last = ""
    while True:
        with os.scandir(folder) as entries:
            names = heapq.nsmallest(
                _AT_ONCE,
                (e.name for e in entries if e.name > last and not e.name.startswith(".")),
            )
        yield from names
        if len(names) < _AT_ONCE:
            return
        last = names[-1]


def glob_files(folder: str | Path, pattern: str) -> list[Path]:
    """All that matches `pattern` in `folder`, as `pathlib` does it, in order of their paths.

    Hidden files and folders are passed over, as in `list_files`, and folders are no files.
    """
    folder = Path(folder)
    return sorted(
        path
        for path in folder.glob(pattern)
        if not is_hidden(path.relative_to(folder)) and not path.is_dir()
    )


def _walk(folder: str) -> Iterator[tuple[str, str]]:
    """The folder and the name of each entry that is none itself."""
    todo: list[tuple[str, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while todo:
        parent, above = todo.pop()
        status = os.stat(parent)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            continue
        with os.scandir(parent) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    todo.append((entry.path, above | {identity}))
                else:
                    yield parent, entry.name
