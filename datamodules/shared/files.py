"""Listing and checking of data files: regular files that are not hidden.

Every datamodule lists folders and checks files with these functions: opening a named pipe, for
example, would block a run in a way that no signal can interrupt.
"""

import heapq
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from datamodules.shared.stored import AnyFile, StoredFile
from diffmm.checks import DataError, is_hidden_name

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

MISSING = "does not exist"

_AT_ONCE = 50_000

_MOST_SHOWN = 8
"""Maximum number of extensions that a message lists."""


def why_no_file(path: str | AnyFile) -> str | None:
    """Why `path` cannot be used, as the end of a sentence; `None` for a regular file.

    Symbolic links are followed. Of a stored file, its container is checked.
    """
    if isinstance(path, StoredFile):
        container = path.container
        fault = None if container is None else why_no_file(container)
        return fault and f"cannot be read: {container} {fault}"
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        with_slashes = os.fspath(path).replace("\\", "/")
        if with_slashes != os.fspath(path) and os.path.exists(with_slashes):
            return f"{MISSING}, but it does with / in place of \\"
        return MISSING
    except (OSError, ValueError) as error:  # a cycle of links, a name with a null character
        return f"cannot be opened: {getattr(error, 'strerror', None) or error}"
    if stat.S_ISREG(mode):
        return None
    return f"is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file"


def check_file(path: str | Path, role: str) -> None:
    """Check that a path is a regular file.

    Args:
        path: Path of the file.
        role: The role of the file for the message, such as `"manifest"`.

    Raises:
        FileNotFoundError: If the path does not exist.
        DataError: If it is not a regular file.
    """
    fault = why_no_file(path)
    if fault is not None:
        kind = FileNotFoundError if fault.startswith(MISSING) else DataError
        raise kind(f"{role} {path} {fault}")


def read_text(path: str | Path, role: str) -> str:
    """Read a small UTF-8 file, with or without a byte order mark.

    Args:
        path: Path of the file.
        role: As in `check_file`.

    Raises:
        FileNotFoundError: If the path does not exist.
        DataError: If it is not a regular file or not UTF-8.
    """
    check_file(path, role)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{role} {path} is not UTF-8 text: {error}") from error


def read_lines(path: str | Path, role: str) -> list[str]:
    """Read the lines of a small UTF-8 file. Arguments and errors as in `read_text`."""
    return lines_of(read_text(path, role))


def lines_of(text: str) -> list[str]:
    """The lines of a file's text.

    Unlike `str.splitlines`, only line feeds separate lines: U+2028, form feeds and others are
    characters of a text.
    """
    return text.removesuffix("\n").split("\n") if text else []


def is_hidden(path: Path) -> bool:
    """Whether a name in `path` is hidden, as in `._a.png` or `.ipynb_checkpoints/a.png`."""
    return any(map(is_hidden_name, path.parts))


def extension_of(path: Path) -> str:
    """The extension of a file in lower case, both of them if it is packed (`.jsonl.gz`)."""
    parts = path.suffixes[-2:] if path.suffix.lower() == ".gz" else [path.suffix]
    return "".join(parts).lower()


def extensions_in_words(counts: Counter[str]) -> str:
    """The most frequent extensions, such as `.mp3, no extension and 3 more`."""
    names = [extension or "no extension" for extension, _ in counts.most_common()]
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more


def skipped_in_words(counts: Counter[str]) -> str:
    """Files with other extensions, such as `2 other files that are skipped (.avif)`."""
    one = counts.total() == 1
    return (
        f"{counts.total():,} other {'file that is' if one else 'files that are'} skipped "
        f"({extensions_in_words(counts)})"
    )


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC).

    File systems differ: `é` may be one character or `e` followed by a combining accent.
    """
    return unicodedata.normalize("NFC", name)


def list_files(folder: str | Path, extensions: Sequence[str]) -> list[Path]:
    """List all paths in `folder`, at any depth, that end in one of `extensions` (in lower case).

    They are sorted by folder, then by name. Hidden files and folders are skipped. Links to folders
    are followed, except in cycles. Paths that are not regular files are included and raise an error
    when they are opened.
    """
    found = [
        (parent, name)
        for parent, name in _walk(os.fspath(folder))
        if name.lower().endswith(tuple(extensions))
    ]
    return [Path(parent, name) for parent, name in sorted(found)]


def list_folders(folder: Path) -> list[Path]:
    """List the folders directly in `folder`, without hidden ones."""
    return [e for e in folder.iterdir() if e.is_dir() and not is_hidden_name(e.name)]


def loose_files(folder: str | Path, extensions: Sequence[str]) -> list[Path]:
    """List the files directly in `folder` that end in one of `extensions`, without hidden ones."""
    return [
        entry
        for entry in sorted(Path(folder).iterdir())
        if entry.name.lower().endswith(tuple(extensions))
        and not is_hidden(Path(entry.name))
        and entry.is_file()
    ]


def walk_files(folder: str | Path, extensions: Sequence[str]) -> Iterator[Path]:
    """Iterate lazily over the paths of `list_files`, depth first and in order of names. At most
    `_AT_ONCE` names per open folder are kept in memory."""
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
    """The names in a folder that are not hidden, sorted. The folder is scanned once per `_AT_ONCE`
    names."""
    last = ""
    while True:
        with os.scandir(folder) as entries:
            names = heapq.nsmallest(
                _AT_ONCE,
                (e.name for e in entries if e.name > last and not is_hidden_name(e.name)),
            )
        yield from names
        if len(names) < _AT_ONCE:
            return
        last = names[-1]


def glob_files(folder: str | Path, pattern: str) -> list[Path]:
    """List all paths in `folder` that match `pattern`, as in `pathlib`, sorted.

    Hidden files and folders are skipped, as in `list_files`, and so are folders.
    """
    folder = Path(folder)
    return sorted(
        path
        for path in folder.glob(pattern)
        if not is_hidden(path.relative_to(folder)) and not path.is_dir()
    )


def _walk(folder: str) -> Iterator[tuple[str, str]]:
    """The parent folder and the name of each entry that is not a folder."""
    todo: list[tuple[str, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while todo:
        parent, above = todo.pop()
        status = os.stat(parent)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            continue
        with os.scandir(parent) as entries:
            for entry in entries:
                if is_hidden_name(entry.name):
                    continue
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    todo.append((entry.path, above | {identity}))
                else:
                    yield parent, entry.name
