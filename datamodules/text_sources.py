"""Where text comes from."""

import hashlib
import re
import sys
import sysconfig
import tokenize as python_source
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datamodules.bad_samples import BadSampleError, BadSamples, Triage
from datamodules.token_documents import (
    Document,
    TokenDocuments,
    key_number,
    read_token_files,
    tokenize,
)
from diffmm.tokenizers import Tokenizer


class Corpus(ABC):
    """Anything that gives tokenized documents.

    Attributes:
        triage: what happens to a file that cannot be read: it is left out where that says so; by
            default it is refused.
    """

    triage: Triage = Triage(BadSamples())

    @abstractmethod
    def load(self, tokenizer: Tokenizer) -> TokenDocuments:
        """All documents as tokens."""

    def __repr__(self) -> str:
        arguments = ", ".join(
            f"{name}={value!r}" for name, value in vars(self).items() if name != "triage"
        )
        return f"{type(self).__name__}({arguments})"


class TextSource(Corpus):
    """A corpus of texts."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Every document, in an order that does not change."""

    @abstractmethod
    def state(self) -> str:
        """What changes when the documents change, for what is cached of them."""

    def fingerprint(self) -> str:
        """Names these documents in a cache."""
        content = f"{self!r} {self.state()}{' tolerant' if self.triage.tolerates else ''}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def load(self, tokenizer: Tokenizer) -> TokenDocuments:
        """All documents as tokens, in memory."""
        return TokenDocuments.in_memory(tokenize(self.documents(), tokenizer))


class StandardLibrary(TextSource):
    """The source files of the running interpreter's own standard library, without its tests.

    Real text that is on every machine: about 11 MiB with Python 3.11. Each file is a document.

    Args:
        max_bytes: leaves out files so that the rest is no larger, a sample of the whole.

    Raises:
        FileNotFoundError: (when read) where the interpreter comes without its sources.
        ValueError: if `max_bytes` is not positive.
    """

    LEFT_OUT = frozenset(
        ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
    )

    def __init__(self, max_bytes: int = 16 * 2**20) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        self.max_bytes = max_bytes

    def documents(self) -> Iterator[Document]:
        root = Path(sysconfig.get_path("stdlib"))
        sizes = {
            path.relative_to(root).as_posix(): path.stat().st_size
            for path in root.rglob("*.py")
            if not self.LEFT_OUT.intersection(path.relative_to(root).parts)
        }
        if not sizes:
            raise FileNotFoundError(
                f"the standard library of this interpreter has no source files in {root}: "
                f"choose another source, such as TextFolder"
            )
        chosen, total = [], 0
        # Not by the number that held-out splits are drawn by, or small samples would be one split.
        for name in sorted(sizes, key=lambda name: key_number(f"sampled {name}")):
            if total + sizes[name] <= self.max_bytes:
                total += sizes[name]
                chosen.append(name)
        for name in sorted(chosen):
            with python_source.open(root / name) as file:  # in the encoding that the file declares
                yield Document(name, file.read())

    def state(self) -> str:
        return sys.version


class TextFolder(TextSource):
    """The text files of a folder, each a document.

    Args:
        path: the folder.
        pattern: which of its files, as in `pathlib`; `**/` also looks into its folders.
        separator: splits each file into documents where this string stands.
        encoding: of the files.

    Raises:
        FileNotFoundError: (when read) if there is no such folder, or no such file in it.
        BadSampleError: (when read) for a file that is not text in this encoding, naming it.
    """

    def __init__(
        self,
        path: str,
        pattern: str = "**/*.txt",
        separator: str | None = None,
        encoding: str = "utf-8",
    ) -> None:
        if separator == "":
            raise ValueError("separator must not be empty; None makes each file a document")
        self.path = path
        self.pattern = pattern
        self.separator = separator
        self.encoding = encoding

    def documents(self) -> Iterator[Document]:
        for number, file in enumerate(self._files()):
            if self.triage.is_quarantined(file):
                continue
            name = file.relative_to(self.path).as_posix()
            self.triage.num_read += 1
            try:
                text = file.read_text(self.encoding)
            except (UnicodeDecodeError, OSError) as error:
                bad = BadSampleError(
                    f"file {number} ({file}) is not {self.encoding} text ({error}): give its "
                    f"encoding, or a pattern that leaves it out",
                    file,
                )
                self.triage.note(bad, instead="it is left out")
                continue
            if self.separator is None:
                yield Document(name, text)
            else:
                for place, part in enumerate(text.split(self.separator)):
                    yield Document(f"{name}#{place}", part)

    def state(self) -> str:
        files = [(str(file), file.stat()) for file in self._files()]
        return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])

    def _files(self) -> list[Path]:
        folder = Path(self.path)
        if not folder.is_dir():
            raise FileNotFoundError(f"text folder {self.path} is not there")
        files = sorted(file for file in folder.glob(self.pattern) if file.is_file())
        if not files:
            raise FileNotFoundError(f"no file in {self.path} matches {self.pattern!r}")
        return files


class HuggingFaceText(TextSource):
    """A text column of a Hugging Face dataset, each row a document.

    A document's key is its text, so that equal documents fall in the same split.

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
            library cannot load, or one without that column.
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

    def _documents(self, rows: Iterable[Mapping[str, str]]) -> Iterator[Document]:
        texts: Iterable[str] = (row[self.text_column] or "" for row in rows)
        if self.document_start is not None:
            texts = _joined(texts, re.compile(self.document_start))
        for text in texts:
            yield Document(text, text)


class TokenFiles(Corpus):
    """Token files, tokenized once by `write_token_file` and mapped into memory.

    Args:
        paths: of the `.bin` files.

    Raises:
        ValueError: if there is none; (when read) for one of another tokenizer.
        BadSampleError: (when read) for one that is damaged.
        FileNotFoundError: (when read) for one that is not there or not finished.
    """

    def __init__(self, paths: list[str]) -> None:
        if not paths:
            raise ValueError("TokenFiles needs at least one path")
        self.paths: Sequence[str] = paths

    def load(self, tokenizer: Tokenizer) -> TokenDocuments:
        return read_token_files(self.paths, tokenizer, self.triage)


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
