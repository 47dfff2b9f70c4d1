"""Sources with one folder per class, for each split or with a held-out fraction."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from datamodules.shared.files import composed
from datamodules.shared.sources import (
    ClassFolder,
    Labels,
    Samples,
    Source,
    Splits,
    check_same_classes,
    hold_out,
    report_similar,
)
from diffmm.checks import did_you_mean


class FolderSource(Source[Samples]):
    """Files in one folder per class: `train/<class>/.../*`.

    Hidden files and folders are skipped. Folders whose names differ only in Unicode normalization
    are one class, as they would be one folder on some file systems.

    Attributes:
        extensions: File extensions, in lower case.
    """

    extensions: ClassVar[Sequence[str]]

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        *,
        val_fraction: float = 0.1,
    ) -> None:
        self.train = train
        self.val = val
        self.test = test
        self.val_fraction = val_fraction

    @abstractmethod
    def samples(self, paths: Sequence[Path], labels: Sequence[Labels]) -> Samples:
        """Create the samples of these files."""

    def splits(self) -> Splits[Samples]:
        class_names, paths, labels = ClassFolder.read(self.train, self.extensions)
        report_similar(self.train, tuple(class_names))
        if self.val is None:
            train, val = held_out_samples(
                self.samples, paths, labels, fraction=self.val_fraction, origin=self.train
            )
        else:
            train = self.samples(paths, labels)
            val = self._evaluation_samples(self.val, class_names)
        test = val if self.test is None else self._evaluation_samples(self.test, class_names)
        return Splits(class_names, train, val, test)

    def labelled_as(self, class_names: Sequence[str], split: str) -> Samples:
        """All samples of `train`, with the indices of their labels in `class_names`. Classes
        without samples are allowed.

        Args:
            class_names: Names of the classes, in order of their indices.
            split: Unused, because a folder has no splits; see `TableSource.labelled_as`.

        Raises:
            FileNotFoundError, ValueError: As `splits`, and if a folder is not one of the classes.
        """
        found, paths, labels = ClassFolder.read(self.train, self.extensions)
        numbers = {composed(name): number for number, name in enumerate(class_names)}
        if unknown := [name for name in found if name not in numbers]:
            raise ValueError(
                f"{self.train} has classes that the model does not: {shown(unknown)}; the model's "
                f"are {shown(class_names)}{did_you_mean(unknown[0], numbers)}"
            )
        return self.samples(paths, [(numbers[found[label]],) for (label,) in labels])

    def _evaluation_samples(self, folder: str, expected: list[str]) -> Samples:
        class_names, paths, labels = ClassFolder.read(folder, self.extensions)
        check_same_classes(self.train, expected, folder, class_names)
        return self.samples(paths, labels)


def shown(names: Sequence[str], limit: int = 10) -> str:
    """The first names as text, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def held_out_samples(
    samples: Callable[[Sequence[Path], Sequence[Labels]], Samples],
    paths: Sequence[Path],
    labels: Sequence[Labels],
    *,
    fraction: float,
    origin: str,
) -> tuple[Samples, Samples]:
    """Split samples into training and validation samples, with `fraction` of each class in the
    latter.

    Args:
        samples: Creates samples from files and their labels.
        paths: Paths of all files.
        labels: Labels of all files.
        fraction: As in `hold_out`.
        origin: Origin of the files, for the message.

    Raises:
        ValueError: If no class has more than one sample; the message names `origin`.
    """
    kept, held_out = hold_out(labels, fraction)
    if not held_out:
        raise ValueError(
            f"the val split has no samples, because no class of {origin} has more than one: add "
            f"samples or set --data.source.val"
        )
    train, val = (
        samples([paths[i] for i in indices], [labels[i] for i in indices])
        for indices in (kept, held_out)
    )
    return train, val
