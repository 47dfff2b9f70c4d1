"""Settings of `TextData` and `ConversationData` for a user's own texts and conversations."""

import glob
import gzip
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from datamodules.shared.files import (
    extension_of,
    extensions_in_words,
    glob_files,
    list_files,
    skipped_in_words,
)
from datamodules.shared.own_data import (
    OwnData,
    absolute,
    check_folder,
    fitting_batch_size,
    named_splits,
)
from datamodules.text.conversation_source import ENDINGS
from diffmm.checks import counted

PLAIN = (".txt", ".md", ".rst", ".tex", ".html", ".py", ".c", ".cpp", ".java", ".js", ".rs", ".go")
"""Extensions of plain text files. All of those in a folder are read."""

ROWS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".jsonl.gz": "json",
    ".json.gz": "json",
    ".csv.gz": "csv",
}
"""Extensions of files of rows, and the names of their formats in the datasets library. If a folder
has no plain text, the first one in this order is used."""

GIVEN = (
    "pattern",
    "separator",
    "encoding",
    "document_start",
    "text_column",
    "messages_column",
)
"""Arguments of the command line that also apply to the source of the user's texts."""

FEW = 100
"""With fewer texts than this, splits are made by token position instead of by text."""

MOST_LISTED = 2**26
"""Size in bytes above which the rows of a list in JSON are not counted, but taken to be many."""

MOST_PER_TOKEN = 64
"""Number of bytes per token of which more are rare: the samples of files larger than a batch
of such tokens are not counted, since they fill it."""

Data = TypeVar("Data")

NumSamples = Callable[[Mapping[str, Any]], int]
"""Number of training samples of a datamodule, given its arguments."""


class _Texts(NamedTuple):
    """Texts of a split: the config node of their source, a summary, how many there are (`FEW` if
    there are more), and the size of their files."""

    node: dict[str, Any]
    summary: str
    num_texts: int
    num_bytes: int


def own_texts(path: str, given: Mapping[str, Any], num_samples: NumSamples) -> OwnData:
    """Settings for a folder or a file of texts; see `TextData.own_data`.

    Args:
        path: Path of the folder or file.
        given: Arguments of the recipe, and of the command line.
        num_samples: Number of training samples.
    """
    # The recipe's evaluation sources do not apply to these texts.
    settings: dict[str, Any] = {
        name: None for name in ("validation_source", "test_source") if given.get(name) is not None
    }
    arguments = (given.get("source") or {}).get("init_args") or {}
    pattern = arguments.get("pattern")
    whole = absolute(path)
    splits = {"train": str(whole)}
    if not whole.is_file():
        check_folder(whole)
        named = named_splits(path, [entry for entry in whole.iterdir() if entry.is_dir()])
        splits = named if "train" in named and len(named) > 1 else splits
    elif pattern is not None:
        raise ValueError(f"--data {path} is a file: --data.source.pattern is for a folder")
    found = {split: _source(path, Path(place), pattern) for split, place in splits.items()}
    for split, name in (("train", "source"), ("val", "validation_source"), ("test", "test_source")):
        if split in found:
            settings[name] = found[split].node
    is_held_out = "val" not in splits
    if is_held_out and found["train"].num_texts < FEW and not arguments.get("streaming"):
        settings["split_by"] = "position"
    if "val" in splits and "test" not in splits:
        # Do not hold out a test split from the training texts.
        settings["test_fraction"] = 0.0
    if not arguments.get("streaming"):
        settings |= _batch_size(given, settings, 16, found["train"].num_bytes, num_samples)
    summary = "; ".join(
        each.summary if len(found) == 1 else f"{each.summary} for {split}"
        for split, each in found.items()
    )
    by_position = settings.get("split_by") == "position"
    held_out = f"; validation and test use {'the end' if by_position else 'a part'} of them"
    return OwnData(settings, {}, f"{summary}{held_out if is_held_out else ''}")


def _batch_size(
    given: Mapping[str, Any],
    settings: Mapping[str, Any],
    default: int,
    num_bytes: int,
    num_samples: NumSamples,
) -> dict[str, int]:
    """A smaller batch size if there are fewer samples. They are counted if there is little text.

    Mistakes in the settings or the texts are reported later, together with all others.
    """
    size, length = given.get("batch_size", default), given.get("sequence_length", 512)
    if not isinstance(size, int) or not isinstance(length, int):
        return {}
    if num_bytes > MOST_PER_TOKEN * size * length:
        return {}
    source = settings["source"]
    theirs = (given.get("source") or {}).get("init_args") or {}
    kept = {name: theirs[name] for name in GIVEN if name in theirs}
    whole = {**source, "init_args": {**source["init_args"], **kept}}
    with suppress(OSError, TypeError, ValueError):
        count = num_samples({**given, **settings, "source": whole})
        return fitting_batch_size(given, default, count)
    return {}


def made_of(
    datamodule: Callable[..., Data], arguments: Mapping[str, Any], sources: Mapping[str, Any]
) -> Data:
    """A datamodule with the arguments of a recipe, to count its samples.

    It has no cache, which is for the run, and the default way of handling bad samples, which
    changes few of them.

    Args:
        datamodule: Class of the datamodule.
        arguments: Its arguments, in which sources are config nodes.
        sources: Classes of sources by name.
    """
    values = {k: v for k, v in arguments.items() if k not in ("cache_dir", "bad_samples")}
    for name in ("source", "validation_source", "test_source"):
        if (node := values.get(name)) is not None:
            values[name] = sources[node["class_path"].rpartition(".")[2]](**node["init_args"])
    return datamodule(**values)


def _source(path: str, place: Path, pattern: str | list[str] | None) -> _Texts:
    """The texts of a file or a folder."""
    folder = place if place.is_dir() else place.parent
    files = list_files(place, ("",)) if place.is_dir() else [place]
    by_ending: dict[str, list[Path]] = {}
    for file in files:
        by_ending.setdefault(extension_of(file), []).append(file)
    if pattern is not None:
        patterns = [pattern] if isinstance(pattern, str) else pattern
        chosen = sorted({file for each in patterns for file in glob_files(folder, each)})
        if not chosen:
            raise ValueError(
                f"--data {path}: no file in {folder} matches {' or '.join(map(repr, patterns))}"
            )
        return _plain(path, folder, files, chosen, pattern, is_given=True)
    if endings := [ending for ending in PLAIN if ending in by_ending]:
        chosen = sorted(file for ending in endings for file in by_ending[ending])
        if len(chosen) == 1:
            pattern = glob.escape(chosen[0].relative_to(folder).as_posix())
        else:  # Patterns are case-sensitive.
            found = [f"**/*{_any_case(ending, by_ending[ending])}" for ending in endings]
            pattern = found[0] if len(found) == 1 else found
        return _plain(path, folder, files, chosen, pattern, is_given=False)
    ending = next((ending for ending in ROWS if ending in by_ending), None)
    if ending is None:
        raise ValueError(_why_no_text(path, place, by_ending))
    chosen = by_ending[ending]
    arguments = {"name": ROWS[ending], "data_files": list(map(str, chosen))}
    node = {"class_path": "datamodules.text.HuggingFaceText", "init_args": arguments}
    num_texts = 0
    for file in chosen:
        num_texts += _num_rows(file, ending, FEW - num_texts) if num_texts < FEW else 0
    count = f"{'at least ' if num_texts >= FEW else ''}{counted(min(num_texts, FEW), 'row')}"
    return _Texts(
        node,
        _summary(path, count, files, chosen, advises=False),
        min(num_texts, FEW),
        sum(file.stat().st_size for file in chosen),
    )


def _plain(
    path: str,
    folder: Path,
    files: Sequence[Path],
    chosen: Sequence[Path],
    pattern: str | list[str],
    *,
    is_given: bool,
) -> _Texts:
    """The plain texts among the files of a folder."""
    arguments = {"root": str(folder), "pattern": pattern}
    node = {"class_path": "datamodules.text.TextFolder", "init_args": arguments}
    size = sum(file.stat().st_size for file in chosen)
    summary = _summary(path, counted(len(chosen), "text"), files, chosen, advises=not is_given)
    return _Texts(node, summary, len(chosen), size)


def _summary(
    path: str, count: str, files: Sequence[Path], chosen: Sequence[Path], *, advises: bool
) -> str:
    """Which files are read, and which are not."""
    endings = extensions_in_words(Counter(map(extension_of, chosen)))
    size = _in_words(sum(file.stat().st_size for file in chosen))
    text = f"{path} has {count} ({endings}, {size})"
    read = set(chosen)
    others = Counter(extension_of(file) for file in files if file not in read)
    if others:
        text += f", and {skipped_in_words(others)}"
        plain = Counter({e: count for e, count in others.items() if e not in ROWS})
        if advises and plain:
            which = "those instead" if plain.most_common(1)[0][0] else "all files"
            text += f"; --data.source.pattern {_example(plain)} reads {which}"
    return text


def _why_no_text(path: str, place: Path, by_ending: Mapping[str, Sequence[Path]]) -> str:
    """The message that there is no file of a known kind, and what to do."""
    known = ", ".join((*PLAIN, *ROWS))
    if by_ending and all(ending.endswith(".gz") for ending in by_ending):
        return f"--data {path}: {', '.join(by_ending)} files are not read: unpack them (gunzip)"
    if place.is_file():
        return (
            f"--data {path}: the file ends in none of {known}: if it is plain text, rename it so "
            f"that it ends in .txt"
        )
    counts = Counter({ending: len(files) for ending, files in by_ending.items()})
    if not counts:
        return f"--data {path}: {place} has no files; texts end in one of {known}"
    return (
        f"--data {path}: no file in {place} ends in one of {known} (there are {counts.total():,} "
        f"others: {extensions_in_words(counts)}): if they are plain text, set "
        f"--data.source.pattern {_example(counts)}"
    )


def _example(endings: Counter[str]) -> str:
    """A pattern of the most frequent extension, as an example."""
    ending = endings.most_common(1)[0][0]
    return f"'**/*{ending}'"


def _num_rows(file: Path, ending: str, most: int) -> int:
    """The number of rows of a file, up to `most`; also `most` if the file is damaged, of which the
    datasets library reports more."""
    with suppress(OSError, ValueError, EOFError):
        if ending == ".parquet":
            from pyarrow.parquet import read_metadata

            return min(most, int(read_metadata(file).num_rows))
        if ROWS[ending] == "csv":
            from pandas import read_csv

            return len(read_csv(file, nrows=most, usecols=[0]))
        with (gzip.open if ending.endswith(".gz") else open)(
            file, "rt", encoding="utf-8-sig"
        ) as text:
            is_list = text.read(1) == "["
            if is_list and file.stat().st_size > MOST_LISTED:
                return most
            text.seek(0)
            if is_list:
                return min(most, len(json.load(text)))
            count = 0
            for line in text:
                count += bool(line.strip())
                if count == most:
                    break
            return count
    return most


def _any_case(ending: str, files: Sequence[Path]) -> str:
    """An extension as a pattern; case-insensitive if a file has another case."""
    if all(file.suffix == ending for file in files):
        return ending
    return "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in ending)


def _in_words(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.4g} {unit}"
        size = size / 1024
    raise AssertionError


def own_conversations(path: str, given: Mapping[str, Any], num_samples: NumSamples) -> OwnData:
    """Settings for a file of conversations, or a folder of `train` and `val` files; see
    `ConversationData.own_data`. Arguments as in `own_texts`."""
    whole = absolute(path)
    files = [whole] if whole.is_file() else sorted(whole.iterdir())
    files = [file for file in files if file.suffix.lower() in ENDINGS]
    splits = named_splits(path, files) if whole.is_dir() else {}
    if not files or (whole.is_dir() and "train" not in splits):
        packed = ", unpacked" if whole.suffix.lower() == ".gz" else ""
        raise ValueError(
            f"--data {path} must be a file of conversations ({', '.join(ENDINGS)}{packed}), or a "
            f"folder with such a file called train and perhaps one called val"
        )
    train = Path(splits.get("train", str(files[0])))
    settings: dict[str, Any] = {"source": _conversations(str(train))}
    if "val" in splits:
        settings["validation_source"] = _conversations(splits["val"])
    settings |= _batch_size(given, settings, 8, train.stat().st_size, num_samples)
    num_bytes = sum(file.stat().st_size for file in files)
    return OwnData(settings, {}, f"{path} has {len(splits) or 1} file(s), {num_bytes:,} bytes")


def _conversations(file: str) -> dict[str, Any]:
    """The config node of a source of this file."""
    arguments = {"name": ENDINGS[Path(file).suffix.lower()], "data_files": [file]}
    return {"class_path": "datamodules.text.Conversations", "init_args": arguments}
