"""Whether a sound file has all that it begins: libsndfile reads one that was cut off as shorter."""

import os
import struct
from pathlib import Path
from typing import BinaryIO

_PIPED = (0x7FFFEFFF, 0x80000000), (0xFFFFEFFF, 0xFFFFFFFF)
"""What programs that write a WAV into a pipe put where its length would be: FFmpeg the largest
number, SoX and arecord one near half of it."""

_MOST_CHUNKS = 1000
_MOST_PAGE = 27 + 255 + 255 * 255  # bytes of an Ogg page


def what_is_missing(path: Path, format: str) -> str | None:
    """What of a sound file is missing at its end, to follow its name; `None` if nothing is.

    Args:
        path: of a regular file.
        format: of the file, in libsndfile's words. All but WAV and Ogg are found out by decoding.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if format in ("WAV", "WAVEX", "RF64"):
            return _of_wav(file, size)
        return _of_ogg(file, size) if format == "OGG" else None


def _of_wav(file: BinaryIO, size: int) -> str | None:
    """Of a RIFF file, chunks of a name, a length and data: whether the `data` are as long."""
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
                return f"ends after {held} of the {length} bytes of sound that its header promises"
            break
        file.seek(length + length % 2, os.SEEK_CUR)
    return None


def _of_ogg(file: BinaryIO, size: int) -> str | None:
    """Of an Ogg file, a row of pages: whether the last one is whole, and the stream's end."""
    file.seek(max(0, size - _MOST_PAGE))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
    whole = len(page) > 26 and len(page) >= 27 + page[26] + sum(segments)
    if not whole or not page[5] & 4:
        return "ends before its stream does (its last page is cut, or not marked as the last)"
    return None
