"""A report on data before training: `diffmm check --read-data`.

A datamodule that supports it has a method `examine(limit)`, which returns an `Examined`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from datamodules.shared.bad_samples import BadSampleError
from datamodules.shared.files import why_no_file
from datamodules.shared.own_data import looked_at
from datamodules.shared.sources import Labelled, Splits
from diffmm.checks import counted, shown_name

MANY_CLASSES = 12
"""With this many classes or more, only the largest and the smallest one are named."""
MOST_FILES = 100_000
"""Maximum number of files per split whose existence is checked; far fewer are read."""
SHOWN = 5
"""Maximum number of faults of one kind that are listed individually."""


class Examined(NamedTuple):
    """The result of examining data.

    Attributes:
        lines: The contents of each split, and how many samples were read.
        faults: Problems that would stop a run or prevent it from learning.
        doubts: Possible mistakes.
        num_classes: Number of classes of labeled data.
        multi_label: Whether a sample of labeled data may have several classes.
    """

    lines: dict[str, str]
    faults: list[str]
    doubts: list[str]
    num_classes: int | None = None
    multi_label: bool = False


def examine_labelled(
    splits: Splits[Any], read: Callable[[Labelled, int], Any], *, limit: int, tolerates: bool
) -> Examined:
    """Count the samples of each split and class, and read some of them.

    Args:
        splits: Splits of the source.
        read: A function of the samples and an index that returns the model's input.
        limit: Number of samples to read per split.
        tolerates: Whether a run continues after a bad sample.
    """
    lines: dict[str, str] = {}
    faults: list[str] = []
    doubts: list[str] = []
    names = list(splits.class_names)
    parts = {"train": splits.train, "val": splits.val}
    if splits.test is not splits.val:
        parts["test"] = splits.test
    num_read = 0
    for split, samples in parts.items():
        counts = Counter(label for labels in samples.labels for label in labels)
        lines[split] = f"{counted(len(samples.labels), 'sample')}: {_by_class(counts, names)}"
        if missing := [name for number, name in enumerate(names) if not counts[number]]:
            message = f"the {split} split has no samples of {_listed(missing)}"
            (faults if split == "train" else doubts).append(message)
        bad, count = read_some(samples, read, limit)
        num_read += count
        (doubts if tolerates else faults).extend(f"{split}: {message}" for message in bad)
    lines["read"] = f"{counted(num_read, 'sample')}, including the first and the last of each split"
    return Examined(lines, faults, doubts, len(names), splits.multi_label)


def read_some(
    samples: Labelled, read: Callable[[Labelled, int], Any], limit: int
) -> tuple[list[str], int]:
    """Faults of missing files and of the samples that were read, and the number of the latter."""
    gone = {}
    for index in range(min(len(samples.labels), MOST_FILES)):
        file = samples.file(index)
        if file is not None and (fault := why_no_file(file)):
            gone[index] = f"{samples.describe(index)} {fault}"
    bad, count = [], 0
    for index in looked_at(samples, limit):
        if index in gone:
            continue
        count += 1
        try:
            read(samples, index)
        except (BadSampleError, ValueError) as error:
            bad.append(str(error))
    return [*_some(list(gone.values()), "files"), *_some(bad, "samples")], count


def _some(faults: Sequence[str], noun: str) -> list[str]:
    """The first faults of one kind, and how many more there are."""
    more = [f"and {len(faults) - SHOWN:,} more {noun}"] if len(faults) > SHOWN else []
    return [*faults[:SHOWN], *more]


def _by_class(counts: Counter[int], names: Sequence[str]) -> str:
    if len(names) < MANY_CLASSES:
        return "; ".join(
            f"{counts[number]:,} {shown_name(name)}" for number, name in enumerate(names)
        )
    ordered = sorted(range(len(names)), key=lambda number: counts[number])
    least, most = ordered[0], ordered[-1]
    return (
        f"{len(names):,} classes, from {counts[least]:,} ({shown_name(names[least])}) to "
        f"{counts[most]:,} ({shown_name(names[most])})"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more classes" if len(names) > SHOWN else ""
    return f"{', '.join(map(shown_name, names[:SHOWN]))}{more}"
