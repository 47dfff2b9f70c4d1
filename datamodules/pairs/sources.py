"""Sources of pairs: images or sounds, and the texts that describe them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from datamodules.shared.bad_samples import BadSampleError
from datamodules.shared.fingerprints import Fingerprint, digest, spread
from datamodules.shared.sources import Labelled
from datamodules.shared.stored import AnyFile

Media = TypeVar("Media", bound=Labelled)
"""Images (`LabelledImages`) or sounds (`AudioClips`); their labels are empty."""

IMAGES, SOUNDS = "images", "sounds"

NUM_LOOKED_AT = 10_000
"""Maximum number of images or sounds whose texts are read before training begins."""


class Medium(ABC, Generic[Media]):
    """What the files of a datamodule are: images or sounds.

    Attributes:
        noun: `IMAGES` or `SOUNDS`.
        extensions: Extensions of the files to find in a folder, in lower case.
    """

    noun: ClassVar[str]
    extensions: ClassVar[tuple[str, ...]]

    @abstractmethod
    def of_files(self, files: Sequence[AnyFile]) -> Media:
        """The images or sounds in these files, without labels."""


@dataclass(frozen=True)
class Pairs(Generic[Media]):
    """The images or sounds of one split, with their texts.

    Attributes:
        media: The images or sounds, which have not been read yet.
        texts: At least one text for each of them. It may read them on access, and then raises
            `BadSampleError` if it cannot.
        files: The fingerprint of the files, if there is a quicker one than that of every file.

    Raises:
        ValueError: If the numbers of media and texts differ.
    """

    media: Media
    texts: Sequence[Sequence[str]]
    files: Fingerprint | None = None

    def __post_init__(self) -> None:
        if len(self.media.labels) != len(self.texts):
            raise ValueError(
                f"{len(self.media.labels)} images or sounds have {len(self.texts)} lists of texts"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def num_texts(self, index: int) -> int:
        """Number of texts of an image or sound; 1 if they cannot be read, which is handled when
        this sample is."""
        try:
            return max(1, len(self.texts[index]))
        except BadSampleError:
            return 1

    def text(self, index: int, choose: Callable[[int], int]) -> str:
        """Read a text of an image or sound, without surrounding spaces.

        Args:
            index: Index of the image or sound.
            choose: The index of the text, as a function of the number of texts.

        Raises:
            BadSampleError: If it cannot be read, is empty or no valid Unicode.
        """
        file = self.media.file(index)
        try:
            texts = self.texts[index]
        except BadSampleError as error:
            raise BadSampleError(str(error), file) from error
        text = texts[choose(len(texts))].strip() if texts else ""
        if not text:
            raise BadSampleError(f"{self.media.describe(index)} has an empty text", file)
        if not _is_unicode(text):
            raise BadSampleError(
                f"{self.media.describe(index)} has a text that is no valid Unicode: {text!a:.60}",
                file,
            )
        return text

    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the media, and of the texts of some of them."""
        looked_at = spread(range(len(self)), NUM_LOOKED_AT)
        texts = digest(text for index in looked_at for text in self.known_texts(index))
        media = self.media.fingerprint() if self.files is None else self.files
        media = {name: value for name, value in media.items() if name != "labels"}
        return {"samples": len(self), **media, "contents of texts": texts}

    def known_texts(self, index: int) -> Sequence[str]:
        """The texts of an image or sound that are valid; none if they cannot be read."""
        try:
            return [text for text in self.texts[index] if _is_unicode(text)]
        except BadSampleError:
            return ()


@dataclass(frozen=True)
class PairSplits(Generic[Media]):
    """The pairs of a source for training, validation and testing.

    Attributes:
        train: Training pairs.
        val: Validation pairs.
        test: Test pairs; the same as `val` if a source has no test split.

    Raises:
        ValueError: If a split is empty.
    """

    train: Pairs[Media]
    val: Pairs[Media]
    test: Pairs[Media]

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            if not len(getattr(self, name)):
                raise ValueError(f"the {name} split has no pairs")


class PairSource(ABC):
    """A source of images or sounds and their texts.

    No image or sound of the training split is in another split.

    Attributes:
        kinds: Whether it has `IMAGES`, `SOUNDS`, or whatever the datamodule reads.
    """

    kinds: ClassVar[tuple[str, ...]] = (IMAGES, SOUNDS)

    def prepare(self) -> None:  # noqa: B027
        """Create or download missing files. Called in one process, before any calls `splits`."""

    @abstractmethod
    def splits(self, medium: Medium[Any]) -> PairSplits[Any]:
        """List the pairs, reading as little as possible.

        Args:
            medium: The images or sounds that the datamodule reads.

        Raises:
            FileNotFoundError: If a path does not exist.
            ValueError: If a split is empty or a file is malformed.
        """


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded, unlike half of a surrogate pair in JSON, or the name of a file
    that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def checked_texts(value: Any, name: str) -> list[str]:
    """The texts of a field that has one text or a list of texts.

    Raises:
        BadSampleError: If it has something else; the message begins with `name`.
    """
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise BadSampleError(f"{name} must be a text or a list of texts, got {value!r:.60}")
    return texts


def hold_out_groups(groups: Sequence[Hashable], fraction: float) -> tuple[list[int], list[int]]:
    """Split indices into two lists, with `fraction` of the groups (rounded, at least one) in the
    second. The split depends only on the arguments.

    Args:
        groups: The group of each index; indices of the same group are in the same list.
        fraction: The fraction to hold out.

    Raises:
        ValueError: If `fraction` is not between 0 and 1, or there are fewer than two groups.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"the held-out fraction must be between 0 and 1, got {fraction}")
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        raise ValueError(
            f"{len(groups)} pairs are in {len(names)} group(s), but at least two are needed to "
            f"hold out one for validation: use more data, or set --data.source.val"
        )
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    chosen = np.random.default_rng(0).permutation(len(names))[:count]
    held_out = {names[number] for number in chosen}
    lists: tuple[list[int], list[int]] = ([], [])
    for index, group in enumerate(groups):
        lists[group in held_out].append(index)
    return lists


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Check the fractions of `three_splits`.

    Raises:
        ValueError: If one is not above 0, or nothing is left for training.
    """
    if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
        raise ValueError(
            f"val_fraction and test_fraction must be above 0 and below 1 together, got "
            f"{val_fraction} and {test_fraction}"
        )


def three_splits(
    groups: Sequence[Hashable], val_fraction: float, test_fraction: float
) -> tuple[list[int], list[int], list[int]]:
    """Split indices for training, validation and testing as `hold_out_groups` does, with the
    fractions of all groups.

    Raises:
        ValueError: If there are too few groups.
    """
    rest, test = hold_out_groups(groups, test_fraction)
    fraction = val_fraction / (1 - test_fraction)
    train, val = hold_out_groups([groups[i] for i in rest], fraction)
    return [rest[i] for i in train], [rest[i] for i in val], test


def check_apart(train: Sequence[Path], others: Sequence[Path], split: str) -> None:
    """Check that no file of the training split is in another split.

    Raises:
        ValueError: If one is; the message names it.
    """
    if shared := set(train) & set(others):
        raise ValueError(
            f"{len(shared):,} files are in both the train and the {split} split, such as "
            f"{min(shared)}: a split must have files of its own"
        )
