"""Sources that are CSV files of file names and labels."""

import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from datamodules.shared.files import composed, read_lines, why_no_file
from datamodules.shared.folders import held_out_samples
from datamodules.shared.sources import Labels, Samples, Source, Splits, report_similar
from datamodules.shared.table_files import NamedFiles, read_rows
from diffmm.checks import DataError, check_choice, did_you_mean

_logger = logging.getLogger(__name__)

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}
"""Accepted names of each split, as values of a column or as folders."""


_SHOWN = 8
"""Maximum number of faults in a message."""
_MOST_FILES = 100_000
"""Maximum number of files whose existence is checked for a message."""


class Row(NamedTuple):
    """A row of a table."""

    line: int
    file: Path
    labels: list[str]
    split: str
    """The split of the row: that of its table, or the value of the split column."""


class TableSource(Source[Samples]):
    """CSV files of file names and labels.

    The first line of each file has the column names; other columns are ignored. Values are
    separated by commas, semicolons or tabs (see `delimiter_of`). Labels that differ only in Unicode
    normalization are the same. A file may be in several rows of one split, which are one sample:
    with the same label or, if the data are multi-label, with the labels of all of them.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        *,
        file_column: str = "file",
        label_column: str = "label",
        split_column: str | None = None,
        label_separator: str = ";",
        classes: str | None = None,
        multi_label: bool = False,
        val_fraction: float = 0.1,
    ) -> None:
        check_choice("label_separator", label_separator, (";", ","))
        if split_column is not None and (val is not None or test is not None):
            raise ValueError(
                f"split_column={split_column!r} already defines the splits of train: leave out "
                f"val and test, or split_column"
            )
        self.train = train
        self.val = val
        self.test = test
        self.file_column = file_column
        self.label_column = label_column
        self.split_column = split_column
        self.label_separator = label_separator
        self.classes = classes
        self.multi_label = multi_label
        self.val_fraction = val_fraction

    @abstractmethod
    def samples(self, paths: Sequence[Path], labels: Sequence[Labels]) -> Samples:
        """Create the samples of these files."""

    def splits(self) -> Splits[Samples]:
        tables = {"train": self.train, "val": self.val, "test": self.test}
        files = NamedFiles()
        rows = {
            name: self._rows(table, name, files) if table else [] for name, table in tables.items()
        }
        places = [(path, row) for name, path in tables.items() if path for row in rows[name]]
        faults = [] if self.multi_label else _wrong_labels(places)
        if faults := faults or _in_two_splits(places):
            raise ValueError(_listed([*faults, *_missing_files(places)]))
        if self.split_column is not None:
            rows = {name: [row for row in rows["train"] if row.split == name] for name in rows}
            if not rows["train"]:
                raise ValueError(
                    f"{self.train} has no training rows: column {self.split_column!r} never "
                    f"contains 'train'"
                )
        class_names = self._class_names(rows["train"])
        report_similar(self.classes or self.train, tuple(class_names))
        of = "the training rows" if self.classes is None else self.classes
        train, val, test = (
            self._labelled(tables[name] or self.train, found, class_names, of)
            for name, found in rows.items()
        )
        assert train is not None
        if val is None:
            try:
                training, validation = held_out_samples(
                    self.samples, *train, fraction=self.val_fraction, origin=self.train
                )
            except ValueError as error:
                raise ValueError(_listed([*_missing_files(places), str(error)])) from error
        else:
            training, validation = self.samples(*train), self.samples(*val)
        testing = validation if test is None else self.samples(*test)
        return Splits(class_names, training, validation, testing, self.multi_label)

    def labelled_as(self, class_names: Sequence[str], split: str) -> Samples:
        """The samples of `train`, with the indices of their labels in `class_names`. Classes
        without samples are allowed.

        Args:
            class_names: Names of the classes, in order of their indices.
            split: The split to select if there is a `split_column`; otherwise all rows are.

        Raises:
            FileNotFoundError, ValueError: As `splits`, and if the split has no rows.
        """
        rows = self._rows(self.train, "train", NamedFiles())
        if not self.multi_label and (faults := _wrong_labels([(self.train, r) for r in rows])):
            raise ValueError(_listed(faults))
        if self.split_column is not None:
            rows = [row for row in rows if row.split == split]
        labelled = self._labelled(
            self.train, rows, [composed(name) for name in class_names], "the model"
        )
        if labelled is None:
            raise ValueError(
                f"{self.train} has no rows to evaluate: column {self.split_column!r} never "
                f"contains {split!r}"
            )
        return self.samples(*labelled)

    def _class_names(self, train: list[Row]) -> list[str]:
        if self.classes is None:
            return sorted({label for row in train for label in row.labels})
        lines = read_lines(self.classes, "file of classes")
        class_names = [composed(line.strip()) for line in lines if line.strip()]
        for name, count in Counter(class_names).items():
            if count > 1:
                raise DataError(f"{self.classes} has the class {name!r} {count} times")
        return class_names

    def _rows(self, table: str, split: str, files: NamedFiles) -> list[Row]:
        """Read the rows of a table, which are of `split` unless there is a split column.

        Raises:
            FileNotFoundError: If the table does not exist.
            ValueError: If it is malformed; the message names the table and the problem.
        """
        return list(self._read(Path(table), split, files))

    def _read(self, path: Path, split: str, files: NamedFiles) -> Iterator[Row]:
        columns = (self.file_column, self.label_column, self.split_column)
        splits = {alias: name for name, aliases in SPLIT_NAMES.items() for alias in aliases}
        for line, row in read_rows(path, [column for column in columns if column is not None]):
            file, label = row[self.file_column], row[self.label_column]
            if not file or label is None:
                raise ValueError(f"{path}, line {line}: the file or labels are missing")
            labels = composed(label).split(self.label_separator)
            names = list(dict.fromkeys(label.strip() for label in labels if label.strip()))
            if self.split_column is not None:
                written = row[self.split_column] or ""
                split = splits.get(written.strip().lower(), "")
                if not split:
                    raise ValueError(
                        f"{path}, line {line}: {self.split_column} must be one of "
                        f"{', '.join(splits)}, got {written!r}"
                    )
            yield Row(line, files.find(path.parent, file), names, split)

    def _labelled(
        self, table: str, rows: list[Row], class_names: list[str], of: str
    ) -> tuple[list[Path], list[Labels]] | None:
        """The files of a split and their label indices; `None` without rows. `of` says whose the
        classes are, for the message."""
        rows = _merged(table, rows)
        numbers = {name: number for number, name in enumerate(class_names)}
        labels = []
        for _, file, names, _ in rows:
            for name in names:
                if name not in numbers:
                    raise ValueError(
                        f"{table}: {file} has label {name!r}, which is not one of the "
                        f"{len(class_names)} classes of {of}{did_you_mean(name, class_names)}"
                    )
            labels.append(tuple(numbers[name] for name in names))
        return ([row.file for row in rows], labels) if rows else None


def _wrong_labels(places: Sequence[tuple[str, Row]]) -> list[str]:
    """The rows of tables that have no label or several, or another one than an earlier row of the
    same file."""
    faults = []
    first: dict[Path, tuple[str, Row]] = {}
    for table, row in places:
        place = f"{table}, line {row.line}"
        if not row.labels:
            faults.append(f"{place}: the label is missing")
        elif len(row.labels) > 1:
            faults.append(
                f"{place}: {row.file} has {len(row.labels)} labels, but exactly one is required, "
                f"unless the data are multi-label"
            )
        else:
            earlier, other = first.setdefault(row.file, (table, row))
            if other.labels != row.labels:
                faults.append(
                    f"{row.file} is {other.labels[0]!r} in {earlier}, line {other.line}, and "
                    f"{row.labels[0]!r} in {table}, line {row.line}: keep one of these lines"
                )
    return faults


def _in_two_splits(places: Sequence[tuple[str, Row]]) -> list[str]:
    """The first file of tables that is in two splits, and how many there are."""
    first: dict[Path, tuple[str, Row]] = {}
    shared: dict[Path, str] = {}
    for table, row in places:
        earlier, other = first.setdefault(row.file, (table, row))
        if other.split != row.split:
            shared.setdefault(
                row.file,
                f"in the {other.split} split ({earlier}, line {other.line}) and the {row.split} "
                f"split ({table}, line {row.line})",
            )
    if not shared:
        return []
    file, where = next(iter(shared.items()))
    if len(shared) == 1:
        return [f"{file} is {where}: keep it in one split"]
    return [
        f"{len(shared):,} files are in two splits, such as {file}, which is {where}: keep each "
        f"file in one split"
    ]


def _merged(table: str, rows: Sequence[Row]) -> list[Row]:
    """One row per file, in the order of the first ones, with the labels of all of its rows."""
    by_file: dict[Path, Row] = {}
    for row in rows:
        first = by_file.setdefault(row.file, row)
        if first is not row:
            labels = list(dict.fromkeys([*first.labels, *row.labels]))
            by_file[row.file] = first._replace(labels=labels)
    if repeated := len(rows) - len(by_file):
        _report_repeated(table, rows[0].split, repeated)
    return list(by_file.values())


@lru_cache
def _report_repeated(table: str, split: str, count: int) -> None:
    """Log, once per process, how many rows of a split are of a file that has an earlier one."""
    _logger.warning(
        "%s: %s of the %s rows %s of an earlier row's file: they are one sample",
        *(table, f"{count:,}", split, "is" if count == 1 else "are"),
    )


def _missing_files(places: Sequence[tuple[str, Row]]) -> list[str]:
    """The rows of tables whose files cannot be used."""
    return [
        f"{table}, line {row.line}: {row.file} {fault}"
        for table, row in places[:_MOST_FILES]
        if (fault := why_no_file(row.file))
    ]


def _listed(faults: Sequence[str]) -> str:
    """The first faults in one line, and how many more there are."""
    left = len(faults) - _SHOWN
    more = [f"and {left:,} more"] if left > 0 else []
    return "; ".join([*faults[:_SHOWN], *more])
