"""Settings of the datamodules of pairs for a user's own files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.pairs.folders import TEXT_EXTENSION, PairFolder
from datamodules.pairs.sources import Media, Medium, Pairs, PairSource, PairSplits
from datamodules.pairs.tables import PairTable
from datamodules.pairs.webdataset import WebDatasetPairs
from datamodules.shared.files import glob_files, list_files, list_folders, loose_files
from datamodules.shared.fingerprints import spread
from datamodules.shared.folders import shown
from datamodules.shared.other_data import note_of_training
from datamodules.shared.own_data import (
    FILE_COLUMNS,
    LABEL_COLUMNS,
    SPLIT_COLUMNS,
    absolute,
    check_folder,
    find_columns,
    fitting_batch_size,
    named_splits,
)
from datamodules.shared.table_files import TABLES, header_of

TEXT_COLUMNS = ("text", "caption", "captions", "sentence", "transcript", "description", "title")
"""Column names of texts that are recognized in a table, in order of preference."""

KEPT_OF_TABLES = (
    "val",
    "test",
    "media_folder",
    "val_fraction",
)
KEPT_OF_SHARDS = ("val", "test", "text_field", "cache_dir", "val_fraction")
KEPT_OF_FOLDERS = ("val", "test", "texts", "template", "val_fraction")
"""Arguments of the recipe's source or the command line that also apply to the user's data."""

KEPT_TO_EVALUATE = ("texts", "template", "text_field", "file_column")
"""Settings of a run's source that also apply to other pairs on which it is evaluated."""

NUM_COUNTED = 100
"""Number of images or sounds whose texts are counted."""


class LocatedPairs(NamedTuple):
    """A source of the pairs at a path.

    Attributes:
        source: The source.
        settings: Its arguments.
    """

    source: PairTable | PairFolder | WebDatasetPairs
    settings: dict[str, Any]


class FoundPairs(NamedTuple):
    """The pairs at a path.

    Attributes:
        settings: Arguments of the datamodule, by name.
        splits: The pairs.
        summary: A one-line summary.
    """

    settings: dict[str, Any]
    splits: PairSplits[Any]
    summary: str


def own_pairs(
    path: str, given: Mapping[str, Any], medium: Medium[Media], default_batch_size: int
) -> FoundPairs:
    """Find the pairs in a table, in WebDataset shards, or in a folder with text files beside the
    images or sounds.

    Args:
        path: Path of the folder or table.
        given: Arguments of the recipe for the datamodule.
        medium: The images or sounds that the datamodule reads.
        default_batch_size: The datamodule's batch size if the recipe has none.

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If it has no texts; the message says what it has instead.
    """
    arguments = (given.get("source") or {}).get("init_args") or {}
    source, settings = locate_pairs(path, arguments, medium)
    splits = source.splits(medium)
    _check_texts_differ(path, splits.train)
    class_path = f"datamodules.pairs.{type(source).__name__}"
    found: dict[str, Any] = {
        "source": {"class_path": class_path, "init_args": settings},
        **fitting_batch_size(given, default_batch_size, len(splits.train)),
    }
    return FoundPairs(found, splits, _summary(path, medium.noun, settings, splits))


def pairs_to_evaluate(
    path: str, source: PairSource, medium: Medium[Media], split: str
) -> tuple[Pairs[Media], str]:
    """The pairs of a split at a path or, if there are no splits, all of them, and a summary.

    Args:
        path: Path of the folder or table.
        source: The source of a run, whose settings of texts apply to these pairs, too.
        medium: The images or sounds that the datamodule reads.
        split: `"val"` or `"test"`.

    Raises:
        FileNotFoundError, ValueError: As `own_pairs`, and if there are splits, but not this one.
    """
    note = ""
    given = {name: getattr(source, name) for name in KEPT_TO_EVALUATE if hasattr(source, name)}
    if isinstance(source, PairTable):
        given["text_column"] = source.text_columns
    located, settings = locate_pairs(path, given, medium)
    if not {"val", "test", "split_column"} & settings.keys():
        pairs = located.all_pairs(medium)
        note = note_of_training(located, source)
    elif "split_column" in settings or split in settings:
        pairs = getattr(located.splits(medium), split)
    else:
        raise ValueError(
            f"--data {path} has other splits, but no {split}: give the folder or table to evaluate"
        )
    return pairs, f"{path} has {pairs_in_words(pairs, medium.noun)}{note}"


def locate_pairs(path: str, arguments: Mapping[str, Any], medium: Medium[Media]) -> LocatedPairs:
    """Find the source of the pairs at a path.

    Args:
        path: Path of the folder or table.
        arguments: Arguments of the recipe's source, some of which apply to these pairs.
        medium: The images or sounds that the datamodule reads.

    Raises:
        FileNotFoundError, ValueError: As `own_pairs`.
    """
    whole = absolute(path)

    def kept(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: arguments[name] for name in names if name in arguments}

    if tables := _tables(path, whole):
        settings = {**kept(KEPT_OF_TABLES), **tables}
        settings |= _columns(Path(tables["train"]), arguments, has_splits="val" in settings)
        return LocatedPairs(PairTable(**settings), settings)
    folders = _folders(path, whole)
    if glob_files(folders["train"], "*.tar"):
        settings = {**kept(KEPT_OF_SHARDS), **folders}
        return LocatedPairs(WebDatasetPairs(**settings), settings)
    settings = {**kept(KEPT_OF_FOLDERS), **folders}
    if settings.get("texts", "files") == "files":
        _check_texts(path, Path(settings["train"]), medium)
    return LocatedPairs(PairFolder(**settings), settings)


def _tables(path: str, whole: Path) -> dict[str, str]:
    """The tables of the splits at a path; a folder may also have one table (`metadata.csv`)."""
    if whole.is_file():
        if whole.suffix.lower() not in TABLES:
            raise ValueError(
                f"--data {path} is a single file: use a folder of files with a text file beside "
                f"each, or a table (.csv or .tsv) of files and texts"
            )
        return {"train": str(whole)}
    check_folder(whole)
    tables = [entry for entry in whole.iterdir() if entry.suffix.lower() in TABLES]
    named = named_splits(path, tables)
    if "train" in named:
        return named
    return {"train": str(tables[0])} if len(tables) == 1 else {}


def _folders(path: str, whole: Path) -> dict[str, str]:
    splits = named_splits(path, list_folders(whole))
    return splits if "train" in splits else {"train": str(whole)}


def _columns(table: Path, arguments: Mapping[str, Any], *, has_splits: bool) -> dict[str, Any]:
    """The columns of a table: the given ones if they exist, otherwise those with common names."""
    header = header_of(table)
    given = arguments.get("text_column")
    is_given = given is not None and set([given] if isinstance(given, str) else given) <= {*header}
    wanted = {"file_column": FILE_COLUMNS, "text_column": TEXT_COLUMNS}
    if is_given:
        del wanted["text_column"]
    elif not has_any(header, TEXT_COLUMNS) and (label := has_any(header, LABEL_COLUMNS)):
        raise ValueError(
            f"table {table} has labels (column {label!r}) but no texts: use a recipe of a "
            f"classifier (diffmm recipes), or set --data.source.text_column {label} if they are "
            f"texts"
        )
    columns: dict[str, Any] = {"text_column": given} if is_given else {}
    group = arguments.get("group_column")
    if group in header and not has_splits:
        columns["group_column"] = group
    elif not has_splits:
        wanted["split_column"] = SPLIT_COLUMNS
    return {**find_columns(header, arguments, table, **wanted), **columns}


def has_any(header: list[str], names: tuple[str, ...]) -> str | None:
    """The first column of a table with one of these names, in any case."""
    return next((column for column in header if column.strip().lower() in names), None)


def _check_texts(path: str, folder: Path, medium: Medium[Any]) -> None:
    """Check that there are text files.

    Raises:
        ValueError: If there are none; the message says what there is instead.
    """
    if list_files(folder, (TEXT_EXTENSION,)):
        return
    if tables := loose_files(folder, TABLES):
        raise ValueError(
            f"--data {path} has {len(tables)} tables ({shown([t.name for t in tables], 5)}): give "
            f"one of them, or name those of the splits train.csv and val.csv"
        )
    media, noun = list_files(folder, medium.extensions), medium.noun
    if not media:
        raise ValueError(
            f"--data {path} has no {noun} (extensions of {noun}: {', '.join(medium.extensions)})"
        )
    if any(file.parent == folder for file in media):
        raise ValueError(
            f"--data {path} has {len(media):,} {noun} but no texts: write a text file beside each "
            f"file ({media[0].with_suffix(TEXT_EXTENSION).name}), use a table with the columns "
            f"file and text, or set --data.source.texts names if the names of files are the texts"
        )
    classes = sorted({file.parent.name for file in media})
    raise ValueError(
        f"--data {path} has {noun} in folders ({shown(classes, 5)}) but no texts: "
        f"use a recipe of a classifier (diffmm recipes), write a text file beside each file, or "
        f"set --data.source.texts to names or folders, if the texts are their names"
    )


def _check_texts_differ(path: str, pairs: Pairs[Any]) -> None:
    """Check that not all texts are the same. Only texts up to the first other one are read."""
    texts = (text.strip() for index in range(len(pairs)) for text in pairs.known_texts(index))
    first = next(texts, None)
    if len(pairs) > 1 and first is not None and all(text == first for text in texts):
        raise ValueError(
            f"--data {path}: all {len(pairs):,} training texts are {first!r:.60}, from which "
            f"nothing can be learned: write texts that differ"
        )


def _summary(path: str, noun: str, settings: Mapping[str, Any], splits: PairSplits[Any]) -> str:
    train, val, test = splits.train, splits.val, splits.test
    total = len(train) + len(val) + (len(test) if test is not val else 0)
    is_held_out = not {"val", "split_column"} & settings.keys()
    text = (
        f"{path} has {pairs_in_words(train, noun, total)}: {len(train):,} for training, "
        f"{len(val):,} {'held out ' if is_held_out else ''}for validation"
    )
    return text if test is val else f"{text}, {len(test):,} for testing"


def pairs_in_words(pairs: Pairs[Any], noun: str, total: int | None = None) -> str:
    """How many images or sounds there are, and how many texts some of these have, in words.

    Args:
        pairs: The pairs.
        noun: Name of the images or sounds.
        total: Their number, if there are others like these.
    """
    total = len(pairs) if total is None else total
    counts = [pairs.num_texts(index) for index in spread(range(len(pairs)), NUM_COUNTED)]
    low, high = min(counts), max(counts)
    texts = f"{low if low == high else f'{low} to {high}'} text{'' if high == 1 else 's'}"
    return f"1 {noun[:-1]} with {texts}" if total == 1 else f"{total:,} {noun} with {texts} each"
