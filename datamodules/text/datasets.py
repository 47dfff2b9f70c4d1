"""Text from the datasets library: on the Hugging Face hub, or in files of its formats."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from datamodules.shared.bad_samples import BadSampleError
from datamodules.text.sources import TextSource, without_mark
from datamodules.text.token_documents import Document
from diffmm.checks import DataError


class HuggingFaceText(TextSource):
    """A text column of a Hugging Face dataset, each row a document.

    A document's key is its text, so that equal documents fall in the same split. A byte order mark
    at its beginning is no part of it.

    Args:
        name: of a dataset on the hub, or `json`, `parquet`, `text`, `csv` with `data_files`.
        config: the dataset's configuration, where it has several.
        split: of the dataset, in the library's notation (`train`, `train[:1%]`).
        text_column: which holds the text.
        data_files: one file, several, or a pattern, for local files.
        streaming: read while training instead of before it; never whole in memory or on disk.
        shuffle_buffer: when streaming, rows are shuffled among this many.
        document_start: a regular expression that the first row of each document matches, for
            datasets whose rows are lines; rows are joined as they are. Without it each row is a
            document.

    Raises:
        ValueError: for a `shuffle_buffer` that is not positive, a `document_start` that is no
            regular expression or comes with `streaming`; (when read) for a dataset that the
            library cannot load, or one without that column, or with something else than text in it.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str = "train",
        text_column: str = "text",
        data_files: str | list[str] | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        document_start: str | None = None,
    ) -> None:
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1, got {shuffle_buffer}")
        if document_start is not None:
            if streaming:
                raise ValueError("document_start needs rows in order: it cannot be streamed")
            try:
                re.compile(document_start)
            except re.error as error:
                raise ValueError(
                    f"document_start {document_start!r} is no regular expression: {error}"
                ) from error
        self.name = name
        self.config = config
        self.split = split
        self.text_column = text_column
        self.data_files = data_files
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.document_start = document_start

    def documents(self) -> Iterator[Document]:
        return self._documents(self._load())

    def state(self) -> str:
        return self._load()._fingerprint

    def builder(self) -> Any:
        """What the library knows of the dataset before reading it.

        Raises:
            BadSampleError: if the library finds no such dataset, or cannot make sense of it.
        """
        import datasets

        with self._loading():
            return datasets.load_dataset_builder(self.name, self.config, data_files=self.data_files)

    def open(self, data_files: str | list[str] | None) -> Any:
        """The rows of `data_files`, or of the whole dataset, with their text alone.

        Raises:
            BadSampleError: if the library cannot load them.
            ValueError: if there is no such column.
        """
        import datasets

        with self._loading():
            rows = datasets.load_dataset(
                self.name,
                self.config,
                split=self.split,
                data_files=data_files,
                streaming=self.streaming,
            )
            # A stream of files knows its columns only after its first row.
            columns = rows.column_names or list(next(iter(rows), {}))
        if self.text_column not in columns:
            raise ValueError(
                f"dataset {self.name!r} has no column {self.text_column!r}, its columns are "
                f"{', '.join(columns)}: set text_column"
            )
        return rows.select_columns([self.text_column])

    def files(self) -> list[str]:
        """The files of the split, where the library tells of them.

        Raises:
            BadSampleError: as `builder`.
        """
        return [str(file) for file in (self.builder().config.data_files or {}).get(self.split, [])]

    def _load(self) -> Any:
        """All rows; without the files that cannot be read, where they are files of one's own."""
        if not self.triage.tolerates or self.data_files is None or self.streaming:
            return self.open(self.data_files)
        files = [file for file in self.files() if not self.triage.is_quarantined(file)]
        self.triage.num_read += len(files)
        try:
            return self.open(files)
        except BadSampleError:  # which does not say whose fault it is
            readable = [file for number, file in enumerate(files) if self._opens(number, file)]
            return self.open(readable)

    def _opens(self, number: int, file: str) -> bool:
        try:
            self.open(file)
            return True
        except BadSampleError as error:
            bad = BadSampleError(f"file {number} ({file}) cannot be read: {error}", file)
            self.triage.note(bad, instead="it is left out")
            return False

    @contextmanager
    def _loading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many types: the hub's, the network's, the parsers'
            cause = error.__cause__ or error  # the library wraps a parser's error in its own
            raise BadSampleError(
                f"the datasets library cannot load {self!r}: {type(cause).__name__}: {cause}"
            ) from error

    def _documents(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
        texts = self._texts(rows)
        if self.document_start is not None:
            texts = _joined(texts, re.compile(self.document_start))
        for text in texts:
            yield Document(text, text)

    def _texts(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
        for number, row in enumerate(rows):
            self.triage.num_read += 1
            try:
                yield text_of(row[self.text_column], self.text_column)
            except DataError as error:
                bad = BadSampleError(f"row {number} of dataset {self.name!r} {error}")
                self.triage.note(bad, instead="it is left out")


def text_of(value: object, column: str) -> str:
    """The text of a dataset's row, empty where there is none.

    Raises:
        DataError: (to follow the row's number) if it is something else.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"has a {type(value).__name__} in column {column!r}, not text: set text_column to a "
            f"column of texts"
        )
    return without_mark(value)


def _joined(rows: Iterable[str], start: re.Pattern[str]) -> Iterator[str]:
    """Rows joined into documents, a new one before each row that matches `start`."""
    parts: list[str] = []
    for row in rows:
        if start.match(row) and parts:
            yield "".join(parts)
            parts = []
        parts.append(row)
    if parts:
        yield "".join(parts)
