"""Conversations in files or on the Hugging Face hub, as rows with a list of messages."""

import json
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from datamodules.shared.bad_samples import BadSampleError
from datamodules.shared.files import lines_of

ENDINGS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""Extensions of files of conversations, and their formats in the datasets library."""


class Conversations:
    """Conversations in local files or, by the datasets library, on the Hugging Face hub: rows with
    a list of messages, `{"role": "user", "content": "..."}`.

    Args:
        name: Name of a dataset on the hub; or `json`, for files with a row per line or a list of
            rows; or `parquet`.
        config: Configuration of the dataset, if it has several.
        split: Split of the dataset, in the library's notation (`train`, `train[:1%]`).
        messages_column: Name of the column of messages.
        data_files: One local file, several files, or a pattern; required for `json` and `parquet`.

    Raises:
        ValueError: If `json` or `parquet` has no `data_files`.
    """

    def __init__(
        self,
        name: str = "json",
        config: str | None = None,
        split: str = "train",
        messages_column: str = "messages",
        data_files: str | list[str] | None = None,
    ) -> None:
        if name in ENDINGS.values() and not data_files:
            raise ValueError(f"name={name!r} needs data_files, the files to read")
        self.name = name
        self.config = config
        self.split = split
        self.messages_column = messages_column
        self.data_files = data_files

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"

    def load(self) -> list[tuple[str, Any]]:
        """Read all conversations. Their messages are not checked yet.

        Returns:
            The place of each in its file or dataset, for messages, and its list of messages.

        Raises:
            FileNotFoundError: If a file does not exist.
            BadSampleError: If a file or the dataset cannot be read; the message names it.
            ValueError: If a row has no such column.
        """
        return list(self._in_json() if self.name == "json" else self._in_dataset())

    def _in_json(self) -> Iterator[tuple[str, Any]]:
        """The conversations of local files. The library would give all rows the same columns and
        types."""
        given = [self.data_files] if isinstance(self.data_files, str) else self.data_files or []
        for file in [file for name in given for file in _files(name)]:
            for where, row in _rows(file):
                if not isinstance(row, dict) or self.messages_column not in row:
                    columns = list(row) if isinstance(row, dict) else [type(row).__name__]
                    raise ValueError(self._without_column(where, columns))
                yield where, row[self.messages_column]

    def _in_dataset(self) -> Iterator[tuple[str, Any]]:
        """The conversations of a dataset that the library reads."""
        import datasets

        where = f"dataset {self.name!r}" if self.data_files is None else str(self.data_files)
        try:
            rows = datasets.load_dataset(
                self.name, self.config, split=self.split, data_files=self.data_files
            )
        except Exception as error:  # of the hub, the network or a parser
            cause = error.__cause__ or error  # the library wraps errors of parsers
            raise BadSampleError(
                f"the datasets library cannot read {where}: {type(cause).__name__}: {cause}"
            ) from error
        if self.messages_column not in rows.column_names:
            raise ValueError(self._without_column(where, rows.column_names))
        for number, messages in enumerate(rows[self.messages_column]):
            yield f"row {number} of {where}", _without_missing(messages)

    def _without_column(self, where: str, columns: Sequence[str]) -> str:
        return (
            f"{where} has no column {self.messages_column!r}, its columns are "
            f"{', '.join(columns)}: set --data.source.messages_column"
        )


def _files(name: str) -> list[Path]:
    """The files that a path or a pattern names."""
    files = [Path(name)] if Path(name).is_file() else sorted(map(Path, glob(name)))
    if not files:
        raise FileNotFoundError(f"there is no file of conversations at {name}")
    return files


def _rows(file: Path) -> list[tuple[str, Any]]:
    """The rows of a file in JSON, one per line or in a list, with their places."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError(f"{file} is not UTF-8: {error}", file) from error
    if text.lstrip().startswith("["):
        rows = [(f"row {n} of {file}", row) for n, row in enumerate(_parsed(text, str(file)))]
    else:
        rows = [
            (f"line {number} of {file}", _parsed(line, f"line {number} of {file}"))
            for number, line in enumerate(lines_of(text), 1)
            if line.strip()
        ]
    if not rows:
        raise BadSampleError(f"{file} is empty", file)
    return rows


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadSampleError(f"{where} is not JSON: {error}") from error


def _without_missing(messages: Any) -> Any:
    """Messages without the keys that only others have: the library gives every message the keys of
    all of them."""
    if not isinstance(messages, list):
        return messages
    return [
        {key: value for key, value in message.items() if value is not None}
        if isinstance(message, dict)
        else message
        for message in messages
    ]
