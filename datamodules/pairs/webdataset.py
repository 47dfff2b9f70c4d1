"""WebDataset shards of images or sounds and their texts."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from datamodules.pairs.shards import (
    ShardIndex,
    Shards,
    indexed,
    list_shards,
    report_incomplete,
    text_of,
)
from datamodules.pairs.sources import (
    Media,
    Medium,
    Pairs,
    PairSource,
    PairSplits,
    checked_texts,
    hold_out_groups,
)
from datamodules.shared.bad_samples import BadSampleError
from datamodules.shared.fingerprints import of_files
from datamodules.shared.stored import Member
from diffmm.checks import DataError


class WebDatasetPairs(PairSource):
    """Tar archives of images or sounds and texts, as img2dataset and tools for audio write them.

    The members of a sample have the same name up to the first dot: an image (`000012.jpg`) or sound
    (`000012.flac`) and a text (`000012.txt`, or a field of `000012.json`); others are not read, and
    samples without one of the two are left out, which is logged. Shards are local, uncompressed
    files. Their samples are read in a random order, as those of folders, and runs resume exactly.

    Args:
        train: Shards of the training pairs: a folder, a shard, or a pattern with wildcards or one
            range of numbers (`cc3m/{00000..00331}.tar`).
        val: Shards of the validation pairs.
        test: Shards of the test pairs; the validation pairs by default.
        text_field: Name of the field of JSON members that has the text or a list of texts. By
            default the members `.txt` are the texts.
        val_fraction: Without `val`, the fraction of samples to hold out, the same in every run.
        cache_dir: Folder in which to keep the indices of shards, so that the headers in a shard are
            read once. By default they are read by each process, when it starts.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        *,
        text_field: str | None = None,
        val_fraction: float = 0.1,
        cache_dir: str | None = None,
    ) -> None:
        self.train = train
        self.val = val
        self.test = test
        self.text_field = text_field
        self.extension = ".txt" if text_field is None else ".json"
        self.val_fraction = val_fraction
        self.cache_dir = cache_dir

    def splits(self, medium: Medium[Media]) -> PairSplits[Media]:
        paths, indices = self._indexed(self.train, "train", medium)
        if self.val is None:
            total = sum(len(index.media) for index in indices)
            train, val = (
                self._pairs(medium, paths, _subset(indices, np.array(chosen)))
                for chosen in hold_out_groups(range(total), self.val_fraction)
            )
        else:
            train = self._pairs(medium, paths, indices)
            val = self._pairs(medium, *self._apart(self.val, "val", medium, paths))
        if self.test is None:
            return PairSplits(train, val, val)
        return PairSplits(
            train, val, self._pairs(medium, *self._apart(self.test, "test", medium, paths))
        )

    def all_pairs(self, medium: Medium[Media]) -> Pairs[Media]:
        """All pairs of `train`, without splitting them.

        Raises:
            FileNotFoundError, ValueError: As `splits`.
        """
        return self._pairs(medium, *self._indexed(self.train, "train", medium))

    def _apart(
        self, pattern: str, argument: str, medium: Medium[Media], train: Sequence[Path]
    ) -> tuple[list[Path], list[ShardIndex]]:
        paths, indices = self._indexed(pattern, argument, medium)
        if shared := set(paths) & set(train):
            raise ValueError(f"shard {min(shared)} is in both train and {argument}")
        return paths, indices

    def _indexed(
        self, pattern: str, argument: str, medium: Medium[Media]
    ) -> tuple[list[Path], list[ShardIndex]]:
        paths = list_shards(pattern, argument)
        extensions = medium.extensions
        indices = [indexed(path, extensions, self.extension, self.cache_dir) for path in paths]
        report_incomplete(paths, indices, self.extension)
        if not any(len(index.media) for index in indices):
            raise ValueError(
                f"{argument}: the shards in {pattern} have no samples with {medium.noun} "
                f"({', '.join(extensions)}) and texts ({self.extension})"
                f"{self._hint(paths[0], extensions)}"
            )
        return paths, indices

    def _hint(self, path: Path, extensions: Sequence[str]) -> str:
        """The end of a message if a shard has texts of the other kind; otherwise empty."""
        other = ".json" if self.text_field is None else ".txt"
        if not len(indexed(path, extensions, other, None).media):
            return ""
        if self.text_field is None:
            return ", but with .json: set --data.source.text_field to the field of the text in them"
        return f", but with .txt: leave out text_field ({self.text_field!r}) to use these"

    def _pairs(
        self, medium: Medium[Media], paths: Sequence[Path], indices: Sequence[ShardIndex]
    ) -> Pairs[Media]:
        media = medium.of_files(Shards(paths, [index.media for index in indices]))
        texts = MemberTexts(Shards(paths, [index.texts for index in indices]), self.text_field)
        return Pairs(media, texts, of_files(paths))


def _subset(indices: Sequence[ShardIndex], chosen: np.ndarray) -> list[ShardIndex]:
    """The samples with these numbers, counted over all shards."""
    parts, first = [], 0
    for index in indices:
        last = first + len(index.media)
        inside = chosen[(chosen >= first) & (chosen < last)] - first
        parts.append(ShardIndex(index.media[inside], index.texts[inside], index.num_incomplete))
        first = last
    return parts


class MemberTexts(Sequence[list[str]]):
    """The texts in members of shards, read on access.

    Access raises `BadSampleError` if a text cannot be read.

    Args:
        members: The members.
        field: The field of JSON members; `None` if the member is the text.
    """

    def __init__(self, members: Sequence[Member], field: str | None) -> None:
        self.members = members
        self.field = field

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[list[str]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> list[str]:  # type: ignore[override]
        member = self.members[index]
        try:
            text = text_of(member)
        except (DataError, OSError) as error:
            raise BadSampleError(str(error)) from error
        if self.field is None:
            return [" ".join(text.split())]
        try:
            value = json.loads(text)[self.field]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise BadSampleError(f"{member} is not JSON with field {self.field!r}") from error
        return checked_texts(value, f"field {self.field!r} of {member}")
