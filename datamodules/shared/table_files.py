"""CSV files: their columns and rows, and the files that they name."""

import csv
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from datamodules.shared.files import check_file
from diffmm.checks import DataError

TABLES = (".csv", ".tsv")
"""Extensions of tables, in lower case."""


class TableRow(NamedTuple):
    """A row of a table.

    Attributes:
        line: Number of its last line in the file, from 1.
        values: Its values by column; None for those that it lacks.
    """

    line: int
    values: Mapping[str, str | None]


def delimiter_of(table: Path) -> str:
    """The character between the values of a table: a tab in a `.tsv` file. Otherwise a comma,
    unless the first line has several names only if it is divided at semicolons (which Excel writes
    in many languages), or only if it is divided at tabs.

    Raises:
        UnicodeDecodeError: If the first line is not UTF-8.
    """
    if table.suffix.lower() == ".tsv":
        return "\t"
    several = []
    for delimiter in (",", ";", "\t"):
        with table.open(newline="", encoding="utf-8-sig") as file, suppress(csv.Error):
            if len(next(csv.reader(file, delimiter=delimiter, strict=True), [])) > 1:
                several.append(delimiter)
    return several[0] if len(several) == 1 else ","


def header_of(table: Path) -> list[str]:
    """The names of the columns in the first line of a table.

    Raises:
        FileNotFoundError: If the table does not exist.
        ValueError: If it is not a table in UTF-8.
    """
    check_file(table, "table")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            return next(csv.reader(file, delimiter=delimiter_of(table), strict=True), [])
    except UnicodeDecodeError as error:
        raise _not_utf_8(table, error) from error
    except csv.Error as error:
        raise DataError(f"table {table} is not a UTF-8 CSV file: {error}") from error


def _not_utf_8(table: Path, error: UnicodeDecodeError) -> DataError:
    return DataError(f"table {table} is not a UTF-8 CSV file: {error}: save it as UTF-8")


def read_rows(table: Path, columns: Sequence[str]) -> Iterator[TableRow]:
    """Read the rows of a table, with or without a byte order mark. Empty lines are skipped.

    Args:
        table: The table.
        columns: The columns that are needed; others are ignored.

    Raises:
        FileNotFoundError: If the table does not exist.
        ValueError: If it is not a table in UTF-8, lacks one of `columns` or has it twice, has a row
            of more values than columns, or no row; the message names the table and the problem.
    """
    header = header_of(table)
    for column in columns:
        if column not in header:
            raise ValueError(
                f"{table} has no column {column!r}, only {', '.join(header) or 'nothing'}"
            )
        if header.count(column) > 1:
            raise ValueError(
                f"{table} has {header.count(column)} columns {column!r}: rename all but one of them"
            )
    line = 1
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=delimiter_of(table), strict=True)
            for values in reader:
                # The values that no column has are under None.
                if any(values.pop(None, ())):
                    raise ValueError(
                        f"{table}, line {reader.line_num} has more fields than the first line: put "
                        f"texts that contain the separator in double quotes"
                    )
                line = reader.line_num
                yield TableRow(line, values)
    except UnicodeDecodeError as error:
        raise _not_utf_8(table, error) from error
    except csv.Error as error:
        raise DataError(
            f"table {table} is not a UTF-8 CSV file: {error}, in the row that begins after line "
            f"{line}: put a text with double quotes in double quotes, and double those in it"
        ) from error
    if line == 1:
        raise ValueError(f"table {table} has no rows")


class NamedFiles:
    """The files that tables name. A file that is named in several ways is the same file."""

    def __init__(self) -> None:
        self._first: dict[str, Path] = {}

    def find(self, folder: Path, name: str) -> Path:
        """The path of a file by its name in a table, relative to a folder or absolute, as it was
        first found.

        Of a name with accents, Unicode's other form is tried if there is no such file: `é` may be
        one character, or `e` followed by a combining accent.
        """
        path = folder / name
        if not name.isascii() and not path.exists():
            others = (folder / unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
            path = next((other for other in others if other.exists()), path)
        # What is above a link depends on where it leads.
        is_plain = os.pardir not in path.parts
        key = os.path.abspath(path) if is_plain else os.path.realpath(path)
        return self._first.setdefault(key, path)
