"""LibriSpeech: English audiobooks with transcripts."""

from collections.abc import Sequence
from pathlib import Path

from datamodules.pairs.sources import SOUNDS, Media, Medium, Pairs, PairSource, PairSplits
from datamodules.shared.files import list_files, read_lines
from diffmm.checks import DataError, check_choice

SUBSETS = (
    "train-clean-100",
    "train-clean-360",
    "train-other-500",
    "dev-clean",
    "dev-other",
    "test-clean",
    "test-other",
)


class LibriSpeech(PairSource):
    """LibriSpeech (Panayotov et al., 2015): read English at 16 kHz, with transcripts; no speaker is
    in two of training, validation and testing.

    The layout is that of the distributed archives and of torchaudio's download:
    `root/LibriSpeech/train-clean-100/<speaker>/<chapter>/*.flac`, with a `*.trans.txt` per chapter.

    Args:
        root: The folder that contains `LibriSpeech`.
        train: Subsets for training (100 hours by default).
        val: Subsets for validation.
        test: Subsets for testing.
        lower_case: Whether to convert the transcripts, which are in capitals, to lower case.
        download: Whether to download missing subsets (6.3 GB for 100 hours).

    Raises:
        ValueError: If a subset is unknown, or used twice.
    """

    kinds = (SOUNDS,)

    def __init__(
        self,
        root: str,
        *,
        train: Sequence[str] = ("train-clean-100",),
        val: Sequence[str] = ("dev-clean",),
        test: Sequence[str] = ("test-clean",),
        lower_case: bool = True,
        download: bool = False,
    ) -> None:
        for name, subsets in (("train", train), ("val", val), ("test", test)):
            if isinstance(subsets, str) or not subsets:
                raise ValueError(f"{name} must be a list of at least one subset, got {subsets!r}")
            for subset in subsets:
                check_choice(name, subset, SUBSETS)
        subsets = [*train, *val, *test]
        if shared := sorted({subset for subset in subsets if subsets.count(subset) > 1}):
            raise ValueError(f"subset {shared[0]} is used twice: a split must have its own")
        self.root = root
        self.train = list(train)
        self.val = list(val)
        self.test = list(test)
        self.lower_case = lower_case
        self.download = download

    def prepare(self) -> None:
        if self.download:
            # Imported here, because nothing else needs torchaudio.
            from torchaudio.datasets import LIBRISPEECH

            Path(self.root).mkdir(parents=True, exist_ok=True)
            for subset in (*self.train, *self.val, *self.test):
                LIBRISPEECH(self.root, url=subset, download=True)

    def splits(self, medium: Medium[Media]) -> PairSplits[Media]:
        train, val, test = (
            self._pairs(medium, subsets) for subsets in (self.train, self.val, self.test)
        )
        return PairSplits(train, val, test)

    def _pairs(self, medium: Medium[Media], subsets: Sequence[str]) -> Pairs[Media]:
        files: list[Path] = []
        texts: list[list[str]] = []
        for subset in subsets:
            folder = Path(self.root, "LibriSpeech", subset)
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"folder {folder} does not exist: set --data.source.root to an existing copy, "
                    f"or --data.source.download true"
                )
            chapters = list_files(folder, (".trans.txt",))
            if not chapters:
                raise ValueError(f"{folder} has no transcripts (files ending in .trans.txt)")
            for chapter in chapters:
                for number, line in enumerate(read_lines(chapter, "file of transcripts"), 1):
                    name, _, text = line.partition(" ")
                    if not text.strip():
                        raise DataError(f"{chapter}, line {number}: a name and a text are needed")
                    files.append(chapter.parent / f"{name}.flac")
                    texts.append([text.lower() if self.lower_case else text])
        return Pairs(medium.of_files(files), texts)
