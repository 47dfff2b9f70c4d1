"""Text of the datasets library, from the Hugging Face hub or from local files."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from datamodules.shared.bad_samples import BadSampleError
from datamodules.shared.folders import shown
from datamodules.text.json_lines import first_fault
from datamodules.text.sources import TextSource, without_mark
from datamodules.text.token_documents import Document
from diffmm.checks import DataError, article


class HuggingFaceText(TextSource):
    """A text column of a Hugging Face dataset, with one document per row.

    A document's key is its text, so that equal documents are in the same split. A byte order mark
    at its beginning is removed.

    Args:
        name: Name of a dataset on the hub, or `json`, `parquet`, `text` or `csv` with
            `data_files`.
        config: Configuration of the dataset, if it has several.
        split: Split of the dataset, in the library's notation (`train`, `train[:1%]`).
        text_column: Name of the column that contains the text.
        data_files: One local file, several files, or a pattern.
        streaming: Whether to read during training instead of before it, so that the data set need
            not fit into memory or on disk.
        shuffle_buffer: Number of rows among which a stream is shuffled.
        document_start: A regular expression that the first row of each document matches, for
            datasets whose rows are lines; rows are joined unchanged. By default each row is a
            document.

    Raises:
        ValueError: If `shuffle_buffer` is not positive, or `document_start` is not a regular
            expression or is used with `streaming`; during reading, if the library cannot load the
            dataset, or it has no such column of text.
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
                raise ValueError(
                    "document_start needs rows in order: set --data.source.streaming false or "
                    "leave it out"
                )
            try:
                re.compile(document_start)
            except re.error as error:
                raise ValueError(
                    f"document_start {document_start!r} is not a regular expression: {error}"
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

    def place(self) -> str:
        if self.data_files is None:
            config = "" if self.config is None else f" ({self.config})"
            return f"split {self.split!r} of dataset {self.name!r}{config}"
        return shown([self.data_files] if isinstance(self.data_files, str) else self.data_files, 3)

    def builder(self) -> Any:
        """The library's builder of the dataset, which describes it without reading it.

        Raises:
            BadSampleError: If the library cannot find or interpret the dataset.
        """
        import datasets

        with self._loading():
            return datasets.load_dataset_builder(self.name, self.config, data_files=self.data_files)

    def open(self, data_files: str | list[str] | None) -> Any:
        """The rows of `data_files`, or of the whole dataset, with only the text column.

        Raises:
            BadSampleError: If the library cannot load them.
            ValueError: If the text column does not exist.
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
            # The columns of streamed files are known only after the first row.
            columns = rows.column_names or list(next(iter(rows), {}))
        if self.text_column not in columns:
            way_out = "set --data.source.text_column"
            if self.name == "csv" and len(columns) == 1 and re.search("[;\t]", columns[0]):
                way_out = "separate them by commas"
            raise ValueError(
                f"dataset {self.name!r} has no column {self.text_column!r}, its columns are "
                f"{', '.join(columns)}: {way_out}"
            )
        return rows.select_columns([self.text_column])

    def files(self) -> list[str]:
        """The files of the split, if the library lists them.

        Raises:
            BadSampleError: As `builder`.
        """
        return [str(file) for file in (self.builder().config.data_files or {}).get(self.split, [])]

    def _load(self) -> Any:
        """All rows; local files that cannot be read are skipped if the policy allows it."""
        if not self.triage.tolerates or self.data_files is None or self.streaming:
            return self.open(self.data_files)
        files = [file for file in self.files() if not self.triage.is_quarantined(file)]
        self.triage.num_read += len(files)
        try:
            return self.open(files)
        except BadSampleError:  # does not say which file is bad
            readable = [file for number, file in enumerate(files) if self._opens(number, file)]
            return self.open(readable)

    def _opens(self, number: int, file: str) -> bool:
        try:
            self.open(file)
            return True
        except BadSampleError as error:
            bad = BadSampleError(f"file {number} ({file}) cannot be read: {error}", file)
            self.triage.note(bad, instead="skipping it")
            return False

    @contextmanager
    def _loading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the hub, the network or a parser
            cause = error.__cause__ or error  # the library wraps errors of parsers
            files = [self.data_files] if isinstance(self.data_files, str) else self.data_files or []
            reason = first_fault(files, self.text_column) or f"{type(cause).__name__}: {cause}"
            raise BadSampleError(
                f"the datasets library cannot load {self.place()}: {reason}"
            ) from error

    def _documents(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
        texts = self._texts(rows)
        if self.document_start is not None:
            texts = _joined(texts, re.compile(self.document_start))
        for text in texts:
            yield Document(text, text)

    def _texts(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
        for number, row in enumerate(self._decoded(rows)):
            self.triage.num_read += 1
            try:
                yield text_of(row[self.text_column], self.text_column)
            except DataError as error:
                bad = BadSampleError(f"row {number} of dataset {self.name!r} {error}")
                self.triage.note(bad, instead="skipping it")

    def _decoded(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The rows; the library decodes each of them when it is read, and cannot continue after one
        that is not UTF-8."""
        number = 0
        try:
            for row in rows:
                yield row
                number += 1
        except UnicodeDecodeError as error:
            raise BadSampleError(
                f"row {number} of {self.place()} is not UTF-8 text ({error}): save the file as "
                f"UTF-8"
            ) from error


def text_of(value: object, column: str) -> str:
    """The text of a row of a dataset; empty if it has none.

    Raises:
        DataError: If the value is not text; the message continues a sentence about the row.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"has {article(type(value).__name__)} in column {column!r} instead of text: set "
            f"--data.source.text_column to a column of text"
        )
    return without_mark(value)


def _joined(rows: Iterable[str], start: re.Pattern[str]) -> Iterator[str]:
    """Join rows into documents; each row that matches `start` begins a new one."""
    parts: list[str] = []
    for row in rows:
        if start.match(row) and parts:
            yield "".join(parts)
            parts = []
        parts.append(row)
    if parts:
        yield "".join(parts)


def streams(corpus: object) -> bool:
    """Whether a source of text is streamed."""
    return isinstance(corpus, HuggingFaceText) and corpus.streaming
