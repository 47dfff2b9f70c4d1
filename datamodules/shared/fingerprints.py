"""What a checkpoint knows of its data, so that a run does not go on with others unnoticed.

A fingerprint tells, cheaply, what the training batches are made of: short values, each under a name
that a reader understands. Names and labels count in full, sizes of files and their beginnings for
some of them. Folders above the data and times do not: data may be copied elsewhere.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from datamodules.shared.files import composed, why_no_file

Fingerprint = dict[str, Any]
"""Plain values by what they are of; equal where the data are."""

NUM_SIZES = 10_000
"""Of so many files the size is looked at, spread over all."""
NUM_BEGINNINGS = 64
"""So many are looked into."""
BEGINNING_BYTES = 4096

Item = TypeVar("Item")


def digest(parts: Iterable[bytes | str]) -> str:
    """A short hash of some parts, one after the other."""
    whole = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        whole.update(len(content).to_bytes(8, "little") + content)
    return whole.hexdigest()


def spread(items: Sequence[Item], count: int) -> Iterator[Item]:
    """At most `count` of some items, from the first to the last."""
    for place in np.linspace(0, len(items) - 1, min(len(items), count)).round().astype(int):
        yield items[place]


def of_files(paths: Sequence[str | Path]) -> Fingerprint:
    """What some files are, by their names below the folder that they share, in their order."""
    names = [os.path.abspath(path) for path in paths]
    shared = os.path.commonpath([os.path.dirname(name) for name in names])
    return {
        "files": len(names),
        "names of files": digest(composed(name.removeprefix(shared)) for name in names),
        "sizes of files": digest(str(_size(name)) for name in spread(names, NUM_SIZES)),
        "contents of files": digest(_beginning(name) for name in spread(names, NUM_BEGINNINGS)),
    }


def changes(then: Fingerprint, now: Fingerprint) -> list[str]:
    """What differs between two fingerprints, in words. What only one knows of does not count: the
    other may be of another version."""
    found = []
    for name in [name for name in then if name in now and then[name] != now[name]]:
        is_hash = name.startswith(("names", "sizes", "contents", "labels"))
        found.append(f"other {name}" if is_hash else f"{name}: {then[name]}, now {now[name]}")
    return found


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return None


def _beginning(path: str) -> bytes:
    if why_no_file(path) is not None:
        return b""
    try:
        with open(path, "rb") as file:
            return file.read(BEGINNING_BYTES)
    except OSError:
        return b""
