"""Indices of WebDataset shards: where the media and the texts of all samples are in their archives.

A shard is an uncompressed tar archive. The members of a sample have the same name up to the first
dot (`000012.jpg`, `000012.txt`). An index is made by the standard library's `tarfile`, which reads
the headers of members of every kind of tar; contents are read on access, by position. Nothing is
ever unpickled or extracted.
"""

import hashlib
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from datamodules.shared.files import check_file, composed, glob_files
from datamodules.shared.stored import Member
from diffmm.checks import DataError

_logger = logging.getLogger(__name__)

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_VERSION = 1


class ShardIndex(NamedTuple):
    """The members of a shard that are media or texts, in the order of the archive.

    Attributes:
        media: Name, offset and size of the image or sound of each sample.
        texts: Name, offset and size of the text of each sample.
        num_incomplete: Number of samples without one of the two, which are left out.
    """

    media: NDArray[np.void]
    texts: NDArray[np.void]
    num_incomplete: int


class Shards(Sequence[Member]):
    """One kind of member of all samples of several shards.

    Args:
        paths: The shards.
        tables: Name, offset and size of the members, by shard.
    """

    def __init__(self, paths: Sequence[Path], tables: Sequence[NDArray[np.void]]) -> None:
        self.paths = paths
        self.tables = tables
        self._ends = np.cumsum([len(table) for table in tables])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __iter__(self) -> Iterator[Member]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Member:  # type: ignore[override]
        shard = int(np.searchsorted(self._ends, index, side="right"))
        row = self.tables[shard][index - int(self._ends[shard])]
        name = row["name"].decode(errors="surrogateescape")
        return Member(self.paths[shard], name, int(row["offset"]), int(row["size"]))


def list_shards(pattern: str, argument: str) -> list[Path]:
    """The shards of a folder (all `*.tar` in it), of a pattern with wildcards, or of one with a
    range of numbers (`cc3m/{00000..00331}.tar`), in order.

    Args:
        pattern: The folder, the pattern or a single shard.
        argument: The name of the argument for messages.

    Raises:
        FileNotFoundError: If there are none, or a shard of a range does not exist.
        ValueError: If the shards are not local files.
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ValueError(
            f"{argument} is {pattern!r}, but shards must be local files, because training in a "
            f"random order that resumes exactly needs their index: download them first"
        )
    if match := _RANGE.search(pattern):
        first, last = match[1], match[2]
        names = [
            f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}"
            for number in range(int(first), int(last) + 1)
        ]
        paths = [path for name in names for path in list_shards(name, argument)]
    elif Path(pattern).is_dir():
        paths = glob_files(pattern, "*.tar")
    elif any(character in pattern for character in "*?["):
        paths = glob_files(Path(pattern).parent, Path(pattern).name)
    else:
        check_file(pattern, "shard")
        paths = [Path(pattern)]
    if not paths:
        raise FileNotFoundError(f"{argument}: no shards (.tar) are in {pattern}")
    return paths


def indexed(path: Path, media: Sequence[str], text: str, cache_dir: str | None) -> ShardIndex:
    """The index of a shard, from the cache if it is there.

    Args:
        path: The shard.
        media: Extensions of images or sounds, in lower case, with a dot.
        text: Extension of texts.
        cache_dir: Folder of the cache; `None` for none.

    Raises:
        FileNotFoundError: If the shard does not exist.
        DataError: If it is not an uncompressed tar archive or incomplete, a sample has two images,
            sounds or texts, or the cached index is damaged.
    """
    check_file(path, "shard")
    if cache_dir is None:
        return _index(path, media, text)
    status = path.stat()
    key = (os.path.abspath(path), status.st_size, status.st_mtime_ns, *media, text, _VERSION)
    cached = Path(cache_dir, f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.npz")
    if cached.exists():
        try:
            with np.load(cached, allow_pickle=False) as arrays:
                return ShardIndex(arrays["media"], arrays["texts"], int(arrays["num_incomplete"]))
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise DataError(f"{cached}, the index of {path}, is damaged: delete it") from error
    index = _index(path, media, text)
    cached.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may write the same index.
    with NamedTemporaryFile(dir=cached.parent, suffix=".partial", delete=False) as partial:
        np.savez(partial, media=index.media, texts=index.texts, num_incomplete=index.num_incomplete)
    os.replace(partial.name, cached)
    return index


def _index(path: Path, media: Sequence[str], text: str) -> ShardIndex:
    samples: dict[str, dict[str, tuple[bytes, int, int]]] = {}
    for member in _members(path):
        folder, _, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        extension = f".{extension.lower()}"
        role = "media" if extension in media else "text" if extension == text else None
        if not stem or not dot or role is None:
            continue
        sample = samples.setdefault(f"{folder}/{stem}", {})
        if role in sample:
            raise DataError(
                f"sample {stem} of shard {path} has two members of the same kind, such as "
                f"{member.name}: samples need names of their own"
            )
        name_bytes = member.name.encode(errors="surrogateescape")
        sample[role] = (name_bytes, member.offset_data, member.size)
    whole = [sample for sample in samples.values() if len(sample) == 2]
    return ShardIndex(
        _table([sample["media"] for sample in whole]),
        _table([sample["text"] for sample in whole]),
        len(samples) - len(whole),
    )


def _table(rows: list[tuple[bytes, int, int]]) -> NDArray[np.void]:
    longest = max((len(name) for name, _, _ in rows), default=1)
    kinds = [("name", f"S{longest}"), ("offset", np.int64), ("size", np.int64)]
    return np.array(rows, dtype=kinds)


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files of an archive, without keeping them in memory."""
    size = path.stat().st_size
    # Unbuffered, because headers are far apart.
    with path.open("rb", buffering=0) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]
                    if not member.isreg():
                        continue
                    if member.issparse():
                        raise DataError(f"{member.name} of shard {path} is a sparse file: copy it")
                    if member.size < 0 or member.offset_data + member.size > size:
                        raise DataError(f"shard {path} is incomplete: it ends in {member.name}")
                    yield member
                # At a damaged header, tarfile ends as it does at the zeros of the end.
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise DataError(f"shard {path} is damaged at byte {archive.offset:,}")
        except tarfile.TarError as error:
            raise DataError(
                f"shard {path} is not an uncompressed tar archive, or incomplete: {error}"
            ) from error


def report_incomplete(paths: Sequence[Path], indices: Sequence[ShardIndex], text: str) -> None:
    """Log how many samples are left out because they lack an image or sound, or a text."""
    counts = [index.num_incomplete for index in indices]
    if total := sum(counts):
        first = next(path for path, count in zip(paths, counts, strict=True) if count)
        _logger.warning(
            "%s samples of the shards are left out, because they have no image or sound, or no %s "
            "member, such as in %s",
            f"{total:,}",
            text,
            first,
        )


def text_of(member: Member) -> str:
    """The UTF-8 text of a member, in composed form.

    Raises:
        DataError: If it is not UTF-8.
    """
    try:
        return composed(member.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{member} is not UTF-8 text: {error}") from error
