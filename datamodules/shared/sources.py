"""Sources of labeled samples: splits, class folders and held-out fractions."""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from datamodules.shared.files import (
    composed,
    extension_of,
    is_hidden,
    list_files,
    loose_files,
    skipped_in_words,
)
from datamodules.shared.fingerprints import Fingerprint, digest, of_files
from datamodules.shared.stored import AnyFile

_logger = logging.getLogger(__name__)

Labels = tuple[int, ...]
"""The classes of one sample: exactly one, unless the splits are `multi_label`."""


class Labelled(ABC):
    """Labeled samples whose files have not been read yet.

    Attributes:
        labels: The classes of each sample.
    """

    labels: Sequence[Labels]

    @abstractmethod
    def describe(self, index: int) -> str:
        """A description of a sample for messages: its index, and its file if it has one."""

    def file(self, index: int) -> AnyFile | None:
        """The file of a sample, if it has its own."""
        return None

    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the samples: their number, labels and files."""
        count = len(self.labels)
        files = [file for file in map(self.file, range(count)) if file is not None]
        labels = digest(str(tuple(sample)) for sample in self.labels)
        return {"samples": count, "labels": labels, **(of_files(files) if files else {})}


Samples = TypeVar("Samples", bound=Labelled)


@dataclass(frozen=True)
class Splits(Generic[Samples]):
    """The training, validation and test samples of a source.

    Attributes:
        class_names: The names of the classes, in order of their indices.
        train: Training samples.
        val: Validation samples.
        test: Test samples; the same as `val` if a source has no test split.
        multi_label: Whether a sample may have any number of classes.

    Raises:
        ValueError: If a split has no samples, a label is out of range, or a sample does not have
            exactly one label although `multi_label` is false.
    """

    class_names: Sequence[str]
    train: Samples
    val: Samples
    test: Samples
    multi_label: bool = False

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            samples: Samples = getattr(self, name)
            if not samples.labels:
                raise ValueError(f"the {name} split has no samples")
            for index, labels in enumerate(samples.labels):
                if not self.multi_label and len(labels) != 1:
                    raise ValueError(
                        f"{samples.describe(index)} of the {name} split has {len(labels)} labels: "
                        f"exactly one is required, unless the data are multi-label"
                    )
                for label in labels:
                    if not 0 <= label < len(self.class_names):
                        raise ValueError(
                            f"{samples.describe(index)} of the {name} split has label {label}, "
                            f"outside the {len(self.class_names)} classes"
                        )

    def target(self, labels: Labels) -> Tensor:
        """The target of a sample: `[]` int64, or `[num_classes]` float32 if multi-label."""
        if not self.multi_label:
            return torch.tensor(labels[0])
        target = torch.zeros(len(self.class_names))
        target[list(labels)] = 1.0
        return target


class Source(ABC, Generic[Samples]):
    """A source of labeled samples."""

    def prepare(self) -> None:
        """Download missing files. Called in one process, before any process calls `splits`."""

    @abstractmethod
    def splits(self) -> Splits[Samples]:
        """List the samples, reading as little as possible.

        Raises:
            FileNotFoundError: If a path does not exist.
            ValueError: If a split is empty, a file is malformed or a label is unknown.
        """


class EmptyClassesError(ValueError):
    """Classes have no files.

    Args:
        message: Names the folders.
        paths: The files of the other classes.
    """

    def __init__(self, message: str, paths: Sequence[Path]) -> None:
        super().__init__(message)
        self.paths = paths


class ClassFolder(NamedTuple):
    """The files in `folder/<class name>/`, sorted by name."""

    class_names: list[str]
    paths: list[Path]
    labels: list[Labels]

    @classmethod
    def read(cls, folder: str | Path, extensions: Sequence[str]) -> "ClassFolder":
        """List the files in `folder`, whose subfolders are the classes, at any depth.

        Hidden files and folders are skipped, and so are files beside the folders of the classes,
        which are logged once. Names are in Unicode's composed form, so folders whose
        names differ only in normalization are one class.

        Raises:
            FileNotFoundError: If `folder` is not a folder.
            ValueError: If there are no classes.
            EmptyClassesError: If classes have no files of `extensions`; the message names all.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"folder {folder} does not exist")
        folders: dict[str, list[Path]] = {}
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not is_hidden(Path(entry.name)):
                folders.setdefault(composed(entry.name), []).append(entry)
        if not folders:
            raise ValueError(f"{folder} has no subfolders: each class needs one with its name")
        _report_loose(folder, tuple(extensions))
        classes = cls(sorted(folders), [], [])
        empty = []
        others: Counter[str] = Counter()
        ends = tuple(extensions)
        for number, name in enumerate(classes.class_names):
            listed = [path for part in folders[name] for path in list_files(part, ("",))]
            found = [path for path in listed if path.name.lower().endswith(ends)]
            if not found:
                empty.append(str(folder / name))
            classes.paths.extend(found)
            classes.labels.extend([(number,)] * len(found))
            others.update(
                extension_of(path) for path in listed if not path.name.lower().endswith(ends)
            )
        if empty:
            also = f" ({folder} has {skipped_in_words(others)})" if others else ""
            raise EmptyClassesError(
                f"{' and '.join(empty)} {'has' if len(empty) == 1 else 'have'} no files ending in "
                f"{', '.join(extensions)}{also}",
                classes.paths,
            )
        if others:
            _report_skipped(folder, skipped_in_words(others))
        return classes


@lru_cache
def _report_skipped(folder: Path, skipped: str) -> None:
    """Log, once per process, which files in the folders of classes are not read."""
    _logger.warning("%s has %s", folder, skipped)


@lru_cache
def _report_loose(folder: Path, extensions: tuple[str, ...]) -> None:
    """Log, once per process, that files beside the folders of the classes are ignored."""
    if loose := loose_files(folder, extensions):
        _logger.warning(
            "%s has %s files that are in no folder of a class, such as %s: they are ignored",
            folder,
            f"{len(loose):,}",
            loose[0].name,
        )


@lru_cache
def report_similar(origin: str, class_names: tuple[str, ...]) -> None:
    """Log, once per process, which classes differ only in case."""
    by_name: dict[str, list[str]] = {}
    for name in class_names:
        by_name.setdefault(name.casefold(), []).append(name)
    similar = [" and ".join(map(repr, names)) for names in by_name.values() if len(names) > 1]
    if similar:
        _logger.warning("%s has classes that differ only in case: %s", origin, "; ".join(similar))


def check_same_classes(
    reference: str, expected: Sequence[str], other: str, got: Sequence[str]
) -> None:
    """Check that two splits have the same classes.

    Raises:
        ValueError: If they do not; the message names the classes that only one of them has.
    """
    if missing := sorted(set(expected) - set(got)):
        raise ValueError(f"{other} lacks classes that {reference} has: {', '.join(missing)}")
    if extra := sorted(set(got) - set(expected)):
        raise ValueError(f"{other} has classes that {reference} lacks: {', '.join(extra)}")


def hold_out(labels: Sequence[Labels], fraction: float) -> tuple[list[int], list[int]]:
    """Split sample indices into two lists, with `fraction` of each class (rounded) in the second:
    at least one, and never all of them.

    The split depends only on the arguments, so every run holds out the same samples, whatever its
    seed. A sample with several classes counts for its first one.

    Raises:
        ValueError: If `fraction` is not between 0 and 1.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"the held-out fraction must be between 0 and 1, got {fraction}")
    by_class: dict[Labels, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label[:1], []).append(index)
    rng = np.random.default_rng(0)
    held_out: set[int] = set()
    for label in sorted(by_class):
        members = rng.permutation(by_class[label])
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out.update(members[:count].tolist())
    kept = [index for index in range(len(labels)) if index not in held_out]
    return kept, sorted(held_out)
