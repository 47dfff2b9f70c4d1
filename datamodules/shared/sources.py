"""What the sources of labelled samples share: splits, class folders, held-out shares."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from datamodules.shared.files import composed, is_hidden, list_files
from datamodules.shared.fingerprints import Fingerprint, digest, of_files

Labels = tuple[int, ...]
"""The classes of one sample: exactly one of them, unless the splits are `multi_label`."""


class Labelled(ABC):
    """Samples of known classes, before anything has been read.

    Attributes:
        labels: the classes of each sample.
    """

    labels: Sequence[Labels]

    @abstractmethod
    def describe(self, index: int) -> str:
        """Where a sample comes from, for messages: its number, and its file if it has one."""

    def file(self, index: int) -> Path | None:
        """The file of a sample, if it has one of its own."""
        return None

    def fingerprint(self) -> Fingerprint:
        """What the samples are, cheaply: their number, labels and files."""
        count = len(self.labels)
        files = [file for file in map(self.file, range(count)) if file is not None]
        labels = digest(str(tuple(sample)) for sample in self.labels)
        return {"samples": count, "labels": labels, **(of_files(files) if files else {})}


Samples = TypeVar("Samples", bound=Labelled)


@dataclass(frozen=True)
class Splits(Generic[Samples]):
    """A source's training, validation and test samples.

    Attributes:
        class_names: the name of class `i` is `class_names[i]`.
        train, val, test: the samples. A source without a test split of its own gives `val` twice.
        multi_label: whether a sample may have several classes, or none.

    Raises:
        ValueError: for a split without samples, a label that is none of the classes, or more or
            less than one label where `multi_label` is false, naming the sample.
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
                        f"exactly one is needed, unless the data is multi-label"
                    )
                for label in labels:
                    if not 0 <= label < len(self.class_names):
                        raise ValueError(
                            f"{samples.describe(index)} of the {name} split has label {label}, "
                            f"outside the {len(self.class_names)} classes"
                        )

    def target(self, labels: Labels) -> Tensor:
        """A sample's classes as in a batch: `[]` int64, or multi-label `[num_classes]` float32."""
        if not self.multi_label:
            return torch.tensor(labels[0])
        target = torch.zeros(len(self.class_names))
        target[list(labels)] = 1.0
        return target


class Source(ABC, Generic[Samples]):
    """Where labelled samples come from."""

    def prepare(self) -> None:
        """Download what is missing. Called in one process, before any calls `splits`."""

    @abstractmethod
    def splits(self) -> Splits[Samples]:
        """List the samples, reading as little of them as that needs.

        Raises:
            FileNotFoundError: naming the path that does not exist.
            ValueError: naming what is empty, malformed or outside the classes.
        """


class ClassFolder(NamedTuple):
    """The files under `folder/<class name>/`, in order of their names."""

    class_names: list[str]
    paths: list[Path]
    labels: list[Labels]

    @classmethod
    def read(cls, folder: str | Path, extensions: Sequence[str]) -> "ClassFolder":
        """List `folder`, whose subfolders are the classes, to any depth below them.

        Hidden files and folders are passed over. Names are in Unicode's composed form: folders
        whose names differ in form alone are one class.

        Raises:
            FileNotFoundError: if `folder` is none.
            ValueError: naming the folder in which no class, or no file of `extensions`, is found.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}")
        folders: dict[str, list[Path]] = {}
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not is_hidden(Path(entry.name)):
                folders.setdefault(composed(entry.name), []).append(entry)
        if not folders:
            raise ValueError(f"{folder} has no subfolders: each class needs one of its name")
        classes = cls(sorted(folders), [], [])
        for number, name in enumerate(classes.class_names):
            found = [path for part in folders[name] for path in list_files(part, extensions)]
            if not found:
                raise ValueError(f"{folder / name} has no files of {', '.join(extensions)}")
            classes.paths.extend(found)
            classes.labels.extend([(number,)] * len(found))
        return classes


def check_same_classes(
    reference: str, expected: Sequence[str], other: str, got: Sequence[str]
) -> None:
    """Refuse two splits whose classes differ.

    Raises:
        ValueError: naming the classes that only one of them has.
    """
    if missing := sorted(set(expected) - set(got)):
        raise ValueError(f"{other} lacks classes that {reference} has: {', '.join(missing)}")
    if extra := sorted(set(got) - set(expected)):
        raise ValueError(f"{other} has classes that {reference} lacks: {', '.join(extra)}")


def hold_out(labels: Sequence[Labels], fraction: float) -> tuple[list[int], list[int]]:
    """Split sample numbers in two, `fraction` of each class (rounded) in the second.

    The split is a function of the arguments alone: every run, whatever its seed, holds out the
    same samples. A sample of several classes counts for its first.

    Raises:
        ValueError: if `fraction` is not between 0 and 1.
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
        held_out.update(members[: round(fraction * len(members))].tolist())
    kept = [index for index in range(len(labels)) if index not in held_out]
    return kept, sorted(held_out)
