"""Fingerprints of training data in checkpoints, which detect changed data on resume.

A fingerprint is cheap to compute and consists of short values with readable names. It covers all
names and labels, and the sizes and first bytes of some files. It does not cover parent folders and
modification times, so data may be moved or copied.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from datamodules.shared.files import composed, why_no_file
from datamodules.shared.stored import AnyFile

Fingerprint = dict[str, Any]
"""Plain values by name, equal if the data are equal."""

NUM_SIZES = 10_000
"""Number of files whose size is checked, evenly spaced over all files."""
NUM_BEGINNINGS = 64
"""Number of files whose first bytes are read."""
BEGINNING_BYTES = 4096

Item = TypeVar("Item")


def digest(parts: Iterable[bytes | str]) -> str:
    """A short hash of a sequence of parts."""
    whole = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        whole.update(len(content).to_bytes(8, "little") + content)
    return whole.hexdigest()


def spread(items: Sequence[Item], count: int) -> Iterator[Item]:
    """At most `count` evenly spaced items, from the first to the last."""
    for place in np.linspace(0, len(items) - 1, min(len(items), count)).round().astype(int):
        yield items[place]


def of_files(paths: Sequence[str | AnyFile]) -> Fingerprint:
    """The fingerprint of some files; their names are relative to their common folder."""
    names = [os.path.abspath(path) for path in paths]
    shared = os.path.commonpath([os.path.dirname(name) for name in names])
    return {
        "files": len(names),
        "names of files": digest(composed(name.removeprefix(shared)) for name in names),
        "sizes of files": digest(str(_size(name)) for name in spread(names, NUM_SIZES)),
        "contents of files": digest(_beginning(name) for name in spread(names, NUM_BEGINNINGS)),
    }


def changes(then: Fingerprint, now: Fingerprint) -> list[str]:
    """Describe the differences of two fingerprints. Values in only one of them are ignored, because
    the other may be from another version."""
    found = []
    for name in [name for name in then if name in now and then[name] != now[name]]:
        is_hash = name.startswith(("names", "sizes", "contents", "labels"))
        found.append(f"{name} differ" if is_hash else f"{name}: {then[name]}, now {now[name]}")
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
