"""Detection of truncated sound files, which libsndfile reads as shorter ones."""

import os
import struct
from typing import BinaryIO

from datamodules.shared.stored import AnyFile

_PIPED = (0x7FFFEFFF, 0x80000000), (0xFFFFEFFF, 0xFFFFFFFF)
"""Placeholder lengths of WAV files that were written into a pipe: FFmpeg uses the largest number,
SoX and arecord one near half of it."""

_MOST_CHUNKS = 1000
_MOST_PAGE = 27 + 255 + 255 * 255  # maximum size of an Ogg page, in bytes


def what_is_missing(path: AnyFile, format: str) -> str | None:
    """Describe what is missing at the end of a sound file, as the end of a sentence; `None` if it
    is complete.

    Args:
        path: Path of a regular file.
        format: Format of the file, by libsndfile's name. Only WAV and Ogg are checked; truncated
            files of other formats fail to decode.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if format in ("WAV", "WAVEX", "RF64"):
            return _of_wav(file, size)
        return _of_ogg(file, size) if format == "OGG" else None


def _of_wav(file: BinaryIO, size: int) -> str | None:
    """Check the length of the `data` chunk of a RIFF file."""
    order = ">" if file.read(4) == b"RIFX" else "<"
    file.seek(12)
    length_64 = None
    for _ in range(_MOST_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            break
        name, length = struct.unpack(f"{order}4sI", head)
        if name == b"ds64":
            sizes = file.read(16)
            length_64 = struct.unpack("<8xQ", sizes) if len(sizes) == 16 else None
            file.seek(-len(sizes), os.SEEK_CUR)
        if name == b"data":
            held = size - file.tell()
            if length == 0xFFFFFFFF and length_64 is not None:
                (length,) = length_64
            elif any(low <= length <= high for low, high in _PIPED):
                break
            if length > held:
                return f"is incomplete: it has {held} of the {length} bytes of audio in its header"
            break
        file.seek(length + length % 2, os.SEEK_CUR)
    return None


def _of_ogg(file: BinaryIO, size: int) -> str | None:
    """Check that the last page of an Ogg file is complete and marked as the end of the stream."""
    file.seek(max(0, size - _MOST_PAGE))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
    whole = len(page) > 26 and len(page) >= 27 + page[26] + sum(segments)
    if not whole or not page[5] & 4:
        return "is incomplete (its last page is truncated or not marked as the end of the stream)"
    return None
