"""Settings of `TextData` and `ConversationData` for a user's own texts and conversations."""

import glob
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.shared.files import list_files
from datamodules.shared.own_data import OwnData, absolute, check_folder, named_splits
from datamodules.text.conversation_source import ENDINGS

PLAIN = (".txt", ".md", ".rst", ".tex", ".html", ".py", ".c", ".cpp", ".java", ".js", ".rs", ".go")
"""Extensions of plain text files; if a folder has several, the first one in this order is used."""

ROWS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Extensions of files of rows, and the names of their formats in the datasets library."""

FEW = 100
"""With fewer files than this, splits are made by token position instead of by file."""


def own_texts(path: str, given: Mapping[str, Any]) -> OwnData:
    """Settings for a folder or a file of texts; see `TextData.own_data`."""
    # The recipe's evaluation sources do not apply to these texts.
    settings: dict[str, Any] = {
        name: None for name in ("validation_source", "test_source") if given.get(name) is not None
    }
    whole = absolute(path)
    if whole.is_file():
        node, summary, is_plain = _source(path, whole.parent, [whole])
        by_position = {"split_by": "position"} if is_plain else {}
        settings |= {"source": node, **by_position}
        return OwnData(settings, {}, f"{summary}; {_held_out(by_position)}")
    check_folder(whole)
    splits = named_splits(path, [entry for entry in whole.iterdir() if entry.is_dir()])
    if "train" not in splits or len(splits) == 1:
        splits = {"train": str(whole)}
    parts = []
    num_files = 0
    for split, name in (("train", "source"), ("val", "validation_source"), ("test", "test_source")):
        if split in splits:
            folder = Path(splits[split])
            files = list_files(folder, (*PLAIN, *ROWS))
            settings[name], summary, is_plain = _source(path, folder, files)
            parts.append(summary if len(splits) == 1 else f"{summary} for {split}")
            num_files = num_files or (len(files) if is_plain else FEW)
    if num_files < FEW and "val" not in splits:
        settings["split_by"] = "position"
    if "val" in splits and "test" not in splits:
        # Do not hold out a test split from the training texts.
        settings["test_fraction"] = 0.0
    held_out = "" if "val" in splits else f"; {_held_out(settings)}"
    return OwnData(settings, {}, f"{'; '.join(parts)}{held_out}")


def _source(path: str, folder: Path, files: Sequence[Path]) -> tuple[dict[str, Any], str, bool]:
    """The config node of a source of these files, a summary, and whether they are plain text."""
    counts = Counter(file.suffix.lower() for file in files)
    ending = next((e for e in (*PLAIN, *ROWS) if e in counts), None)
    if ending is None:
        raise ValueError(
            f"--data {path}: no file in {folder} ends in one of {', '.join((*PLAIN, *ROWS))}"
        )
    chosen = [file for file in files if file.suffix.lower() == ending]
    size = sum(file.stat().st_size for file in chosen)
    texts = "text" if len(chosen) == 1 else "texts"
    summary = f"{path} has {len(chosen):,} {texts} ({ending}, {_in_words(size)})"
    if len(counts) > 1:
        others = ", ".join(sorted(other for other in counts if other != ending))
        summary += f", and other files that are skipped ({others})"
    if ending in ROWS:
        arguments: dict[str, Any] = {"name": ROWS[ending], "data_files": list(map(str, chosen))}
        node = {"class_path": "datamodules.text.HuggingFaceText", "init_args": arguments}
        return node, summary, False
    # Patterns are case-sensitive.
    if len(chosen) == 1:
        pattern = glob.escape(chosen[0].relative_to(folder).as_posix())
    else:
        pattern = f"**/*{_any_case(ending, chosen)}"
    arguments = {"root": str(folder), "pattern": pattern}
    return {"class_path": "datamodules.text.TextFolder", "init_args": arguments}, summary, True


def _any_case(ending: str, files: Sequence[Path]) -> str:
    """An extension as a pattern; case-insensitive if a file has another case."""
    if all(file.suffix == ending for file in files):
        return ending
    return "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in ending)


def _held_out(settings: dict[str, Any]) -> str:
    by_position = settings.get("split_by") == "position"
    return f"validation and test use {'the end' if by_position else 'a part'} of them"


def _in_words(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.4g} {unit}"
        size = size / 1024
    raise AssertionError


def own_conversations(path: str) -> OwnData:
    """Settings for a file of conversations, or a folder of `train` and `val` files; see
    `ConversationData.own_data`."""
    whole = absolute(path)
    files = [whole] if whole.is_file() else sorted(whole.iterdir())
    files = [file for file in files if file.suffix.lower() in ENDINGS]
    splits = named_splits(path, files) if whole.is_dir() else {}
    if not files or (whole.is_dir() and "train" not in splits):
        raise ValueError(
            f"--data {path} must be a file of conversations ({', '.join(ENDINGS)}), or a folder "
            f"with such a file called train and perhaps one called val"
        )
    settings: dict[str, Any] = {"source": _conversations(splits.get("train", str(files[0])))}
    if "val" in splits:
        settings["validation_source"] = _conversations(splits["val"])
    num_bytes = sum(file.stat().st_size for file in files)
    return OwnData(settings, {}, f"{path} has {len(splits) or 1} file(s), {num_bytes:,} bytes")


def _conversations(file: str) -> dict[str, Any]:
    """The config node of a source of this file."""
    arguments = {"name": ENDINGS[Path(file).suffix.lower()], "data_files": [file]}
    return {"class_path": "datamodules.text.Conversations", "init_args": arguments}
