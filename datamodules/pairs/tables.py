"""CSV files of image or sound files and their texts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.pairs.sources import (
    Media,
    Medium,
    Pairs,
    PairSource,
    PairSplits,
    check_apart,
    hold_out_groups,
)
from datamodules.shared.table_files import NamedFiles, read_rows
from datamodules.shared.tables import SPLIT_NAMES


class PairRow(NamedTuple):
    """A row of a table."""

    file: Path
    texts: list[str]
    split: str
    group: str


class PairTable(PairSource):
    """Tables of files and their texts, separated by commas, semicolons or tabs (`.csv`; which of
    them, the first line tells), or by tabs (`.tsv`).

    The first line has the names of the columns; other columns are ignored. Several rows of the same
    file are several texts of it, also under another name (`../photos/a.png`).

    Args:
        train: Table of the training pairs, in UTF-8.
        val: Table of the validation pairs.
        test: Table of the test pairs; the validation pairs by default.
        file_column: Name of the column of file paths.
        text_column: Name of the column of texts, or of several such columns, of which some may be
            empty in a row.
        split_column: Name of a column of `train` with the value `train`, `val` or `test` (or
            `training`, `validation`, `valid`, `dev`, `testing`), instead of separate files.
        group_column: Without validation pairs, the name of a column of which every value is held
            out as a whole, such as a speaker or a sentence. By default every file is.
        media_folder: The folder that paths in the tables are relative to; by default that of the
            table.
        val_fraction: Without validation pairs, the fraction of groups to hold out, the same in
            every run.

    Raises:
        ValueError: If `split_column` is combined with `val`, `test` or `group_column`.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        *,
        file_column: str = "file",
        text_column: str | Sequence[str] = "text",
        split_column: str | None = None,
        group_column: str | None = None,
        media_folder: str | None = None,
        val_fraction: float = 0.1,
    ) -> None:
        if split_column is not None and (val is not None or test is not None):
            raise ValueError(
                f"split_column={split_column!r} already defines the splits of train: leave out "
                f"val and test, or split_column"
            )
        if group_column is not None and (split_column is not None or val is not None):
            raise ValueError(
                f"group_column={group_column!r} holds out validation pairs, but there are some: "
                f"leave it out, or leave out val and split_column"
            )
        self.train = train
        self.val = val
        self.test = test
        self.file_column = file_column
        self.text_columns = [text_column] if isinstance(text_column, str) else list(text_column)
        self.split_column = split_column
        self.group_column = group_column
        self.media_folder = media_folder
        self.val_fraction = val_fraction

    def splits(self, medium: Medium[Media]) -> PairSplits[Media]:
        tables = {"train": self.train, "val": self.val, "test": self.test}
        files = NamedFiles()
        rows = {
            name: list(self._rows(table, files)) if table else [] for name, table in tables.items()
        }
        if self.split_column is not None:
            rows = {name: [row for row in rows["train"] if row.split == name] for name in rows}
            if not rows["train"]:
                raise ValueError(
                    f"{self.train} has no training rows: column {self.split_column!r} never "
                    f"contains 'train'"
                )
        if not rows["val"]:
            kept, held_out = hold_out_groups(
                _connected(rows["train"], self.group_column is not None), self.val_fraction
            )
            rows["val"] = [rows["train"][index] for index in held_out]
            rows["train"] = [rows["train"][index] for index in kept]
        train, val = paired(medium, rows["train"]), paired(medium, rows["val"])
        test = paired(medium, rows["test"]) if rows["test"] else val
        for name in ("val", "test"):
            check_apart([r.file for r in rows["train"]], [r.file for r in rows[name]], name)
        return PairSplits(train, val, test)

    def all_pairs(self, medium: Medium[Media]) -> Pairs[Media]:
        """All pairs of `train`, without splitting them.

        Raises:
            FileNotFoundError, ValueError: As `splits`.
        """
        return paired(medium, list(self._rows(self.train, NamedFiles())))

    def _rows(self, table: str, files: NamedFiles) -> Iterator[PairRow]:
        """Read the rows of a table.

        Raises:
            FileNotFoundError: If the table does not exist.
            ValueError: If it is malformed; the message names the table and the problem.
        """
        path = Path(table)
        columns = (self.file_column, *self.text_columns, self.split_column, self.group_column)
        splits = {alias: name for name, aliases in SPLIT_NAMES.items() for alias in aliases}
        folder = Path(self.media_folder or path.parent)
        for line, row in read_rows(path, [column for column in columns if column is not None]):
            texts = [(row[column] or "").strip() for column in self.text_columns]
            texts = [text for text in texts if text]
            name = row[self.file_column]
            if not name or not texts:
                raise ValueError(f"{path}, line {line}: the file or the text is missing")
            split = "train"
            if self.split_column is not None:
                written = row[self.split_column] or ""
                split = splits.get(written.strip().lower(), "")
                if not split:
                    raise ValueError(
                        f"{path}, line {line}: {self.split_column} must be one of "
                        f"{', '.join(splits)}, got {written!r}"
                    )
            group = ""
            if self.group_column is not None:
                group = (row[self.group_column] or "").strip()
                if not group:
                    raise ValueError(
                        f"{path}, line {line}: {self.group_column} is missing, so that it is "
                        f"unknown what is held out with this row"
                    )
            yield PairRow(files.find(folder, name), texts, split, group)


def paired(medium: Medium[Media], rows: Sequence[PairRow]) -> Pairs[Media]:
    """The files of some rows, in the order of their first row, each with all its texts."""
    texts: dict[Path, list[str]] = {}
    for row in rows:
        texts.setdefault(row.file, []).extend(row.texts)
    return Pairs(
        medium.of_files(list(texts)), [list(dict.fromkeys(each)) for each in texts.values()]
    )


def _connected(rows: Sequence[PairRow], has_groups: bool) -> list[Any]:
    """The group of each row: its file or, with groups, the first group of its file."""
    if not has_groups:
        return [row.file for row in rows]
    first: dict[Path, str] = {}
    for row in rows:
        first.setdefault(row.file, row.group)
        if first[row.file] != row.group:
            raise ValueError(
                f"{row.file} is in the groups {first[row.file]!r} and {row.group!r}, but a file "
                f"can only be in one"
            )
    return [row.group for row in rows]
