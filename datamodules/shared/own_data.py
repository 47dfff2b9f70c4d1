"""Settings of a datamodule for a user's own folder or table: `diffmm fit --data PATH`.

A datamodule that supports `--data` has a class method
`own_data(path, given, *, inputs_may_change)`, which inspects the path and returns an `OwnData`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.shared.bad_samples import BadSampleError
from datamodules.shared.files import check_file, list_files, list_folders, loose_files
from datamodules.shared.sources import EmptyClassesError, Labelled, Samples, Source, Splits
from datamodules.shared.table_files import TABLES, header_of
from datamodules.shared.tables import SPLIT_NAMES
from diffmm.checks import did_you_mean, shown_name

FILE_COLUMNS = ("file", "path", "filename", "file_name", "filepath", "image", "audio", "sound")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target")
SPLIT_COLUMNS = ("split", "set", "subset", "partition")
"""Column names that are recognized in a table, in order of preference."""

KEPT = (
    "val",
    "test",
    "val_fraction",
    "max_pixels",
    "file_column",
    "label_column",
    "split_column",
    "label_separator",
    "classes",
    "multi_label",
)
"""Arguments of the recipe's source or the command line that also apply to the user's data."""

NUM_LOOKED_AT = 32
"""Number of samples that are opened to determine their properties."""


class OwnData(NamedTuple):
    """The data at a path.

    Attributes:
        settings: Arguments of the datamodule, by name.
        facts: Properties that the model must match: `num_classes`, `channels`, `sample_rate_hz`.
        summary: A one-line summary.
    """

    settings: dict[str, Any]
    facts: dict[str, int]
    summary: str


class Located(NamedTuple):
    """The location of the splits.

    Attributes:
        is_table: Whether the splits are CSV files instead of folders by class.
        arguments: `train`, `val` and `test` if they exist, and the columns of a table.
    """

    is_table: bool
    arguments: dict[str, str]


def absolute(path: str) -> Path:
    """The absolute path of an existing file or folder.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If a recipe would interpret the name as a reference.
    """
    whole = Path(os.path.abspath(Path(path).expanduser()))
    if not whole.exists():
        raise FileNotFoundError(
            f"--data {path}: no such file or folder (to use another datamodule class, set "
            f"--data.class_path)"
        )
    if "${" in str(whole):
        raise ValueError(
            f"--data {path}: the name contains ${{, which recipes use for references: rename it"
        )
    return whole


def locate(path: str, noun: str, extensions: Sequence[str], given: Mapping[str, Any]) -> Located:
    """Find the labeled samples of each split in a folder or a table.

    Args:
        path: The folder or the CSV file.
        noun: The name of the samples in messages, such as `"images"`.
        extensions: File extensions of the samples.
        given: Arguments of the recipe's source.

    Raises:
        FileNotFoundError: If `path` does not exist.
        ValueError: If it has no supported structure; the message says what is missing.
    """
    whole = absolute(path)
    if whole.is_file():
        if whole.suffix.lower() not in TABLES:
            raise ValueError(
                f"--data {path} is a single file: use a folder with one folder of {noun} per "
                f"class, or a CSV file of files and labels"
            )
        return Located(True, {"train": str(whole), **_columns(whole, given)})
    check_folder(whole)
    tables = named_splits(path, loose_files(whole, TABLES))
    if "train" in tables:
        columns = _columns(Path(tables["train"]), given)
        columns.pop("split_column", None)
        return Located(True, {**tables, **columns})
    folders = list_folders(whole)
    splits = named_splits(path, [folder for folder in folders if list_folders(folder)])
    if "train" in splits and (len(splits) > 1 or len(folders) == 1):
        return Located(False, splits)
    if not folders:
        found = list_files(whole, extensions)
        how = f"{len(found)} {noun} but no folders" if found else f"no folders and no {noun}"
        raise ValueError(
            f"--data {path} has {how}: use one folder per class, or a CSV file with the columns "
            f"file and label (extensions of {noun}: {', '.join(extensions)})"
        )
    loose = loose_files(whole, extensions)
    num_inside = len(list_files(whole, extensions)) - len(loose)
    if loose and (len(folders) == 1 or len(loose) > num_inside):
        names = ", ".join(sorted(folder.name for folder in folders)[:5])
        raise ValueError(
            f"--data {path} has {len(loose):,} {noun} that are in no folder (such as "
            f"{loose[0].name}), and {num_inside:,} in folders ({names}): move them into one folder "
            f"per class, or use a CSV file with the columns file and label"
        )
    return Located(False, {"train": str(whole)})


def check_folder(folder: Path) -> None:
    """Check that a path is a folder or a regular file."""
    if not folder.is_dir():
        check_file(folder, "folder or table")


def named_splits(path: str, entries: Sequence[Path]) -> dict[str, str]:
    """The files or folders that have the name of a split, by split.

    Raises:
        ValueError: If two names stand for the same split.
    """
    found: dict[str, str] = {}
    for entry in sorted(entries):
        for split, names in SPLIT_NAMES.items():
            if entry.stem.lower() in names:
                if split in found:
                    raise ValueError(
                        f"--data {path} has both {Path(found[split]).name} and {entry.name}: "
                        f"rename one of them"
                    )
                found[split] = str(entry)
    return found


def _columns(table: Path, given: Mapping[str, Any]) -> dict[str, str]:
    """The columns of a table of labels."""
    return find_columns(
        header_of(table),
        given,
        table,
        file_column=FILE_COLUMNS,
        label_column=LABEL_COLUMNS,
        split_column=SPLIT_COLUMNS,
    )


def find_columns(
    header: Sequence[str], given: Mapping[str, Any], table: Path, **names_of: Sequence[str]
) -> dict[str, str]:
    """The columns of a table: the given ones if they exist, otherwise those with common names.

    Args:
        header: The names of the table's columns.
        given: Arguments of the recipe's source.
        table: The table, for the message.
        names_of: The common names of each column, by argument. `split_column` may be missing.

    Raises:
        ValueError: If another column is missing.
    """
    columns = {}
    separators = "tabs" if table.suffix.lower() == ".tsv" else "commas, semicolons or tabs"
    for argument, names in names_of.items():
        # The only column is a whole line, if other characters separate them.
        near = did_you_mean(names[0], header) if len(header) > 1 else ""
        by_name = {column.strip().lower(): column for column in reversed(header)}
        column = next((by_name[name] for name in names if name in by_name), None)
        if given.get(argument) in header:
            column = given[argument]
        if column is not None:
            columns[argument] = column
        elif argument != "split_column":
            raise ValueError(
                f"table {table} needs a column {names[0]!r} (or {', '.join(names[1:])}), separated "
                f"by {separators}; its first line is {', '.join(header)!r}{near}; for another "
                f"name, set --data.source.{argument}"
            )
    return columns


def splits_of(source: Source[Samples], read: Callable[[Path], object]) -> Splits[Samples]:
    """The splits of a source. If classes are empty, some files of the others are read as well, so
    that one error names all faults.

    Args:
        source: The source.
        read: Reads a file, or raises `BadSampleError`.

    Raises:
        FileNotFoundError, ValueError: As `Source.splits`.
    """
    try:
        return source.splits()
    except EmptyClassesError as error:
        faults = []
        for number in looked_at_numbers(len(error.paths), NUM_LOOKED_AT):
            try:
                read(error.paths[number])
            except BadSampleError as fault:
                faults.append(str(fault))
        raise ValueError("; ".join([str(error), *faults])) from error


def looked_at(samples: Labelled, count: int = NUM_LOOKED_AT) -> list[int]:
    """Indices of some samples, as in `looked_at_numbers`."""
    return looked_at_numbers(len(samples.labels), count)


def looked_at_numbers(total: int, count: int) -> list[int]:
    """At most `count` evenly spaced indices below `total`, including the first and the last."""
    if not total:
        return []
    return sorted({round(i * (total - 1) / max(1, count - 1)) for i in range(count)})


def describe_splits(path: str, noun: str, settings: Mapping[str, Any], splits: Splits[Any]) -> str:
    """A one-line summary of the splits."""
    names = list(splits.class_names)
    listed = ", ".join(map(shown_name, names[:5])) + (
        f" and {len(names) - 5} more" if len(names) > 5 else ""
    )
    train, val = len(splits.train.labels), len(splits.val.labels)
    total = train + val + (len(splits.test.labels) if splits.test is not splits.val else 0)
    is_held_out = not {"val", "split_column"} & settings.keys()
    text = (
        f"{path} has {total:,} {noun} of {len(names)} class{'es' if len(names) != 1 else ''} "
        f"({listed}): {train:,} for training, {val:,} "
        f"{'held out ' if is_held_out else ''}for validation"
    )
    if splits.test is not splits.val:
        text += f", {len(splits.test.labels):,} for testing"
    return text


def fitting_batch_size(given: Mapping[str, Any], default: int, num_samples: int) -> dict[str, int]:
    """A smaller `batch_size`, a power of two, if there are fewer samples than the recipe's."""
    size = given.get("batch_size", default)
    if not isinstance(size, int) or size <= num_samples:
        return {}
    return {"batch_size": 1 << (num_samples.bit_length() - 1)}
