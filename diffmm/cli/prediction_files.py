"""Prediction files, written incrementally: CSV, JSON lines or Parquet, by their suffix."""

import csv
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmm.new_folders import discard
from diffmm.recipes.errors import InputError, RunFailedError, message_of

if TYPE_CHECKING:
    from diffmm.hub.predictions import Caption, Prediction

ROWS_AT_ONCE = 4096
"""Number of rows per row group of a Parquet file."""


TEXT_COLUMNS = ("file", "text")
"""Columns of captions and transcripts."""


def class_columns(top_k: int) -> list[str]:
    """Columns of the `top_k` most likely classes."""
    more = [f"{name}_{rank}" for rank in range(2, top_k + 1) for name in ("label", "score")]
    return ["file", "label", "score", *more]


class Writer(ABC):
    """A file of rows that is open for writing.

    Args:
        path: Path of the new file.
        columns: Names of the columns.
    """

    name: Path
    """Final path of the file, once it is complete."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.name = path
        self.columns = list(columns)

    def row(self, prediction: "Prediction | Caption") -> list[Any]:
        """Return the values of the columns; scores have six digits, the precision of float32."""
        from diffmm.hub.predictions import Caption

        if isinstance(prediction, Caption):
            return [prediction.file, prediction.text]
        scores = [float(f"{score:.6g}") for score in prediction.scores]
        ranked = zip(prediction.labels, scores, strict=True)
        return [prediction.file, *(value for pair in ranked for value in pair)]

    def write(self, prediction: "Prediction | Caption") -> None:
        """Add a row.

        Raises:
            RunFailedError: If it cannot be written.
        """
        with reported(self.name):
            self.add(prediction)

    @abstractmethod
    def add(self, prediction: "Prediction | Caption") -> None:
        """Append a row to the file."""

    @abstractmethod
    def close(self) -> None:
        """Write buffered rows, and close the file."""


class CSVWriter(Writer):
    """Comma-separated values in UTF-8, with a header."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__(path, columns)
        # File names are bytes, which may not be valid UTF-8.
        self.file = path.open("x", encoding="utf-8", errors="surrogateescape", newline="")
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.writer.writerow(self.columns)

    def add(self, prediction: "Prediction | Caption") -> None:
        self.writer.writerow(self.row(prediction))

    def close(self) -> None:
        self.file.close()


class JSONLinesWriter(Writer):
    """An object per line."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__(path, columns)
        self.file = path.open("x", encoding="utf-8")

    def add(self, prediction: "Prediction | Caption") -> None:
        row = dict(zip(self.columns, self.row(prediction), strict=True))
        text = json.dumps(row, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:
            text = json.dumps(row)  # a file name that is not valid UTF-8 is escaped
        self.file.write(f"{text}\n")

    def close(self) -> None:
        self.file.close()


class ParquetWriter(Writer):
    """A Parquet file, in row groups of `ROWS_AT_ONCE`."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        import pyarrow
        from pyarrow import parquet

        super().__init__(path, columns)
        self.schema = pyarrow.schema(
            (name, pyarrow.float32() if name.startswith("score") else pyarrow.string())
            for name in self.columns
        )
        self.writer = parquet.ParquetWriter(path, self.schema)
        self.rows: list[list[Any]] = []

    def add(self, prediction: "Prediction | Caption") -> None:
        file, *rest = self.row(prediction)
        self.rows.append([file and file.encode("utf-8", "replace").decode(), *rest])
        if len(self.rows) == ROWS_AT_ONCE:
            self._flush()

    def close(self) -> None:
        try:
            self._flush()
        finally:
            self.writer.close()

    def _flush(self) -> None:
        import pyarrow

        if self.rows:
            columns = [list(column) for column in zip(*self.rows, strict=True)]
            arrays = [
                pyarrow.array(column, field.type)
                for column, field in zip(columns, self.schema, strict=True)
            ]
            self.writer.write_table(pyarrow.Table.from_arrays(arrays, schema=self.schema))
            self.rows = []


WRITERS: dict[str, type[Writer]] = {
    ".csv": CSVWriter,
    ".jsonl": JSONLinesWriter,
    ".parquet": ParquetWriter,
}


def check_output(path: Path, endings: tuple[str, ...]) -> None:
    """Check the path of an output file, before anything is read.

    Raises:
        InputError: If it has another suffix, the file exists, or its folder does not exist.
    """
    if path.suffix.lower() not in endings:
        listed = ", ".join(endings)
        raise InputError(f"--output must end in one of {listed}, got {str(path)!r}")
    if os.path.lexists(path):
        raise InputError(f"{path} exists already: choose another --output")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} to write {path.name} to")


@contextmanager
def writing(path: Path, columns: Sequence[str]) -> Iterator[Writer]:
    """Open a file that gets its final name when the block succeeds, and is removed otherwise.

    Raises:
        InputError: If the file cannot be created.
        RunFailedError: If it cannot be written, for example because the disk is full.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            writer = WRITERS[path.suffix.lower()](unfinished, columns)
            writer.name = path
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
        is_whole = False
        try:
            yield writer
            is_whole = True
        finally:
            with reported(path, quiet=not is_whole):
                writer.close()
        with reported(path):
            unfinished.replace(path)
    finally:
        discard(unfinished)


@contextmanager
def reported(path: Path, *, quiet: bool = False) -> Iterator[None]:
    """Turn an `OSError` into a `RunFailedError` that names the file or, if `quiet`, ignore it."""
    try:
        yield
    except OSError as error:
        if not quiet:
            raise RunFailedError(
                f"the predictions could not be written to {path}: {message_of(error)}"
            ) from error
