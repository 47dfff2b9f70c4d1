"""Pairs of the datasets library, from the Hugging Face hub or from local files."""

import os
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from datamodules.pairs.sources import (
    IMAGES,
    Media,
    Medium,
    Pairs,
    PairSource,
    PairSplits,
    checked_texts,
    hold_out_groups,
)
from datamodules.shared.stored import StoredFile
from diffmm.checks import DataError, did_you_mean, reason_of


class HubPairs(PairSource):
    """Columns of images or sounds and of texts of a Hugging Face dataset.

    Rows are read from the library's files on access, and decoded as image and sound files are. Code
    of a dataset is never run. The library is imported on first use.

    Args:
        name: Name of a dataset on the hub, or `parquet`, `imagefolder` and so on with `data_files`.
        config: Configuration of the dataset, if it has several.
        train: Split for training, in the library's notation (`train`, `train[:10%]`).
        val: Split for validation.
        test: Split for testing; the validation pairs by default.
        media_column: Column of images or sounds.
        text_column: Column of texts or of lists of texts, or several such columns.
        group_column: Without `val`, the name of a column of which every value is held out as a
            whole, such as a speaker. By default every row is.
        data_files: A local file or pattern, several of them, or these by split.
        val_fraction: Without `val`, the fraction of groups to hold out, the same in every run.

    Raises:
        ValueError: If `group_column` is combined with `val`.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        *,
        train: str = "train",
        val: str | None = None,
        test: str | None = None,
        media_column: str = "image",
        text_column: str | Sequence[str] = "text",
        group_column: str | None = None,
        data_files: str | list[str] | dict[str, str | list[str]] | None = None,
        val_fraction: float = 0.1,
    ) -> None:
        if group_column is not None and val is not None:
            raise ValueError(
                f"group_column={group_column!r} holds out validation pairs, but val is {val!r}: "
                f"leave one of them out"
            )
        self.name = name
        self.config = config
        self.train = train
        self.val = val
        self.test = test
        self.media_column = media_column
        self.text_columns = [text_column] if isinstance(text_column, str) else list(text_column)
        self.group_column = group_column
        self.data_files = data_files
        self.val_fraction = val_fraction

    def splits(self, medium: Medium[Media]) -> PairSplits[Media]:
        rows = self._rows(self.train, medium)
        if self.val is None:
            groups = rows[self.group_column][:] if self.group_column else range(len(rows))
            kept, held_out = hold_out_groups(groups, self.val_fraction)
            train = self._pairs(rows.select(kept), self.train, medium)
            val = self._pairs(rows.select(held_out), f"{self.train} (held out)", medium)
        else:
            train = self._pairs(rows, self.train, medium)
            val = self._pairs(self._rows(self.val, medium), self.val, medium)
        if self.test is None:
            return PairSplits(train, val, val)
        return PairSplits(train, val, self._pairs(self._rows(self.test, medium), self.test, medium))

    def _rows(self, split: str, medium: Medium[Any]) -> Any:
        """The rows of a split, with media that are not decoded.

        Raises:
            DataError: If the library cannot load them.
            ValueError: If a column is missing, or has no images or sounds.
        """
        import datasets

        try:
            rows: Any = datasets.load_dataset(
                self.name, self.config, split=split, data_files=self.data_files
            )
        except Exception as error:  # of the hub, the network or a parser
            cause = error.__cause__ or error  # the library wraps errors of parsers
            raise DataError(
                f"the datasets library cannot load split {split!r} of {self.name!r}: "
                f"{type(cause).__name__}: {reason_of(cause)}"
            ) from error
        for argument, column in (
            ("media_column", self.media_column),
            *(("text_column", column) for column in self.text_columns),
            *([("group_column", self.group_column)] if self.group_column else []),
        ):
            if column not in rows.column_names:
                raise ValueError(
                    f"dataset {self.name!r} has no column {column!r}, its columns are "
                    f"{', '.join(rows.column_names)}: set --data.source.{argument}"
                    f"{did_you_mean(column, rows.column_names)}"
                )
        kind = datasets.Image if medium.noun == IMAGES else datasets.Audio
        feature = rows.features[self.media_column]
        if not isinstance(feature, kind):
            raise ValueError(
                f"column {self.media_column!r} of dataset {self.name!r} has no {medium.noun}, but "
                f"{type(feature).__name__}: set --data.source.media_column, or use another "
                f"datamodule"
            )
        return rows.cast_column(self.media_column, kind(decode=False))

    def _pairs(self, rows: Any, split: str, medium: Medium[Media]) -> Pairs[Media]:
        files = Cells(rows.select_columns([self.media_column]), f"{self.name}/{split}")
        texts = ColumnTexts(rows.select_columns(self.text_columns), self.name)
        return Pairs(medium.of_files(files), texts, {"fingerprint of rows": rows._fingerprint})


class Cells(Sequence["Cell"]):
    """The images or sounds of the rows of a dataset with one column.

    Args:
        rows: The rows.
        name: The name of the rows for messages.
    """

    def __init__(self, rows: Any, name: str) -> None:
        self.rows = rows
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator["Cell"]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> "Cell":  # type: ignore[override]
        return Cell(self, index)


class Cell(StoredFile):
    """An image or sound in a row of a dataset."""

    def __init__(self, cells: Cells, index: int) -> None:
        self.cells = cells
        self.index = index

    def __fspath__(self) -> str:
        return f"{self.cells.name}/{self.index}"

    @property
    def container(self) -> Path | None:
        content, path = self._value()
        return path if content is None else None

    def open(self, mode: str = "rb") -> BinaryIO:
        assert mode == "rb"
        content, path = self._value()
        return path.open("rb") if content is None and path is not None else BytesIO(content or b"")

    def _value(self) -> tuple[bytes | None, Path | None]:
        (value,) = self.cells.rows[self.index].values()
        value = value or {}
        path = value.get("path")
        return value.get("bytes"), Path(os.fspath(path)) if path else None


class ColumnTexts(Sequence[list[str]]):
    """The texts in the columns of a dataset, read on access.

    Access raises `BadSampleError` if a column has something else.

    Args:
        rows: The rows, with columns of texts only.
        name: The name of the dataset.
    """

    def __init__(self, rows: Any, name: str) -> None:
        self.rows = rows
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[list[str]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> list[str]:  # type: ignore[override]
        texts: list[str] = []
        for column, value in self.rows[index].items():
            if value:
                name = f"row {index} of dataset {self.name!r}, column {column!r},"
                texts += checked_texts(value, name)
        return texts
