"""What is wrong with local files, mostly of JSON lines, for errors of a library that hides it."""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from glob import glob

from diffmm.checks import article

JSON_LINES = (".jsonl", ".jsonl.gz")


def first_fault(patterns: Iterable[str], column: str) -> str | None:
    """The first missing file, or row of JSON lines that cannot be read, and the way out.

    Args:
        patterns: Paths or patterns; addresses, and the rows of files of other formats, are passed
            over.
        column: Name of the column that must be text, or null.

    Returns:
        The fault with its line and file, or `None` if there is none.
    """
    for pattern in patterns:
        files = [pattern] if os.path.exists(pattern) else sorted(glob(pattern, recursive=True))
        if not files and "://" not in pattern:
            return (
                f"{pattern} does not exist: restore it, or set --data.source.data_files to where "
                f"it is now"
            )
        for file in filter(os.path.isfile, files):
            if file.endswith(JSON_LINES) and (fault := _fault(file, column)) is not None:
                return fault
    return None


def _fault(file: str, column: str) -> str | None:
    try:
        for number, line in enumerate(_lines(file), 1):
            if line.strip() and (reason := _reason(line, column)) is not None:
                return f"line {number} of {file} {reason}"
    except (OSError, EOFError, zlib.error):  # a damaged archive, which the library describes
        return None
    return None


def _lines(file: str) -> Iterator[bytes]:
    with gzip.open(file) if file.endswith(".gz") else open(file, "rb") as opened:
        yield from opened


def _reason(line: bytes, column: str) -> str | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"is not UTF-8 text ({error}): save the file as UTF-8"
    except json.JSONDecodeError as error:
        return f"is not JSON ({error.msg} at character {error.pos}): correct or remove it"
    except RecursionError as error:
        return f"is not JSON ({error}): correct or remove it"
    if not isinstance(row, dict):
        return f"is {type(row).__name__}, not an object with a text in {column!r}: correct it"
    value = row.get(column)
    if value is None or isinstance(value, str):
        return None
    kind = article(type(value).__name__)
    return f"has {kind} in column {column!r} instead of text: correct or remove it"
