"""Files of predictions, written as they are made: CSV, JSON lines or Parquet by their ending."""

import csv
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmm.recipes.errors import InputError, RunFailedError, message_of

if TYPE_CHECKING:
    from diffmm.hub.predictions import Prediction

ROWS_AT_ONCE = 4096
"""Of a Parquet file, rows held before they are written."""


class Writer(ABC):
    """A file of rows that is open for writing.

    Args:
        path: of the file, which is made.
        top_k: classes per row.
    """

    name: Path
    """What it is called once it is whole."""

    def __init__(self, path: Path, top_k: int) -> None:
        self.name = path
        self.columns = ["file", "label", "score"]
        for rank in range(2, top_k + 1):
            self.columns += [f"label_{rank}", f"score_{rank}"]

    def row(self, prediction: "Prediction") -> list[Any]:
        """The values of the columns; scores with six digits, which is what float32 has."""
        scores = [float(f"{score:.6g}") for score in prediction.scores]
        ranked = zip(prediction.labels, scores, strict=True)
        return [prediction.file, *(value for pair in ranked for value in pair)]

    def write(self, prediction: "Prediction") -> None:
        """Add a row.

        Raises:
            RunFailedError: if it cannot be written.
        """
        with reported(self.name):
            self.add(prediction)

    @abstractmethod
    def add(self, prediction: "Prediction") -> None:
        """Add a row to what has been written."""

    @abstractmethod
    def close(self) -> None:
        """Write what is held back, and close the file."""


class CSVWriter(Writer):
    """Comma-separated values in UTF-8, with a header."""

    def __init__(self, path: Path, top_k: int) -> None:
        super().__init__(path, top_k)
        # Names of files are bytes, and not all of them are UTF-8.
        self.file = path.open("x", encoding="utf-8", errors="surrogateescape", newline="")
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.writer.writerow(self.columns)

    def add(self, prediction: "Prediction") -> None:
        self.writer.writerow(self.row(prediction))

    def close(self) -> None:
        self.file.close()


class JSONLinesWriter(Writer):
    """An object per line."""

    def __init__(self, path: Path, top_k: int) -> None:
        super().__init__(path, top_k)
        self.file = path.open("x", encoding="utf-8")

    def add(self, prediction: "Prediction") -> None:
        row = dict(zip(self.columns, self.row(prediction), strict=True))
        # With ASCII escapes alone, so that any name of a file can be written.
        self.file.write(f"{json.dumps(row)}\n")

    def close(self) -> None:
        self.file.close()


class ParquetWriter(Writer):
    """A Parquet file, in row groups of `ROWS_AT_ONCE`."""

    def __init__(self, path: Path, top_k: int) -> None:
        import pyarrow
        from pyarrow import parquet

        super().__init__(path, top_k)
        self.schema = pyarrow.schema(
            (name, pyarrow.float32() if name.startswith("score") else pyarrow.string())
            for name in self.columns
        )
        self.writer = parquet.ParquetWriter(path, self.schema)
        self.rows: list[list[Any]] = []

    def add(self, prediction: "Prediction") -> None:
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
    """Refuse the name of an output before anything is read.

    Raises:
        InputError: for another ending, a file that is there, or a folder that is not.
    """
    if path.suffix.lower() not in endings:
        listed = ", ".join(endings)
        raise InputError(f"--output must end in one of {listed}, got {str(path)!r}")
    if os.path.lexists(path):
        raise InputError(f"{path} exists already: choose another --output")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} to write {path.name} to")


@contextmanager
def writing(path: Path, top_k: int) -> Iterator[Writer]:
    """A file that gets its name when the block has ended well, and is removed otherwise.

    Raises:
        InputError: if it cannot be made.
        RunFailedError: if it cannot be written: the disk is full, say.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            writer = WRITERS[path.suffix.lower()](unfinished, top_k)
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
        unfinished.unlink(missing_ok=True)


@contextmanager
def reported(path: Path, *, quiet: bool = False) -> Iterator[None]:
    """A system's refusal to write becomes a failure that names the file, or nothing at all."""
    try:
        yield
    except OSError as error:
        if not quiet:
            raise RunFailedError(
                f"the predictions could not be written to {path}: {message_of(error)}"
            ) from error
