"""Labeled data other than those of a run, to evaluate it on: `diffmm validate RUN --data PATH`."""

import os
from pathlib import Path
from typing import Any

from datamodules.shared.own_data import Located
from datamodules.shared.sources import Source


def to_evaluate(path: str, located: Located, split: str) -> dict[str, str]:
    """The arguments of a source whose `train` is the folder or table to evaluate: that of the
    split or, if there are no splits, all of it.

    Args:
        path: Path as given, for the message.
        located: The splits at the path.
        split: `"val"` or `"test"`.

    Raises:
        ValueError: If there are splits, but not this one.
    """
    names = ("train", "val", "test")
    splits = {name: located.arguments[name] for name in names if name in located.arguments}
    columns = {name: v for name, v in located.arguments.items() if name not in names}
    if len(splits) > 1 and split not in splits:
        raise ValueError(
            f"--data {path} has {' and '.join(splits)}, but no {split}: give the folder or table "
            f"to evaluate"
        )
    return {"train": splits.get(split, splits["train"]), **columns}


def table_settings(source: Source[Any]) -> dict[str, Any]:
    """The settings of a run's source that say how the labels of a table are written."""
    names = ("label_separator", "multi_label")
    return {name: getattr(source, name) for name in names if hasattr(source, name)}


def note_of_training(evaluated: Any, source: Any) -> str:
    """The end of a summary of evaluated data if a run was trained on them; otherwise empty.

    Args:
        evaluated: The source whose `train` is the folder or table that is evaluated.
        source: The source of the run.
    """
    if type(source) is not type(evaluated) or getattr(evaluated, "split_column", None) is not None:
        return ""
    theirs = os.path.realpath(evaluated.train)
    if not Path(theirs).exists() or os.path.realpath(source.train) != theirs:
        return ""
    has_own = source.val is not None or getattr(source, "split_column", None) is not None
    rest = "" if has_own else ", except for what it held out (leave out --data to evaluate that)"
    return f"; the run was trained on them{rest}"
