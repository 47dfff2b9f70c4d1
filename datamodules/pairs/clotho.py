"""Clotho: sounds with five captions each."""

from pathlib import Path

from datamodules.pairs.sources import SOUNDS, Media, Medium, PairSource, PairSplits
from datamodules.pairs.tables import PairTable

SPLITS = {"train": "development", "val": "validation", "test": "evaluation"}
NUM_CAPTIONS = 5


class Clotho(PairSource):
    """Clotho 2.1 (Drossos et al., 2020): 3,839 training, 1,045 validation and 1,045 test sounds of
    15 to 30 seconds at 44.1 kHz, with five captions each.

    The layout is that of the distributed archives: `root/clotho_captions_development.csv`, and the
    sounds in `root/development`, and so on for `validation` and `evaluation`. The files may also be
    in `root/clotho_csv_files` and the folders in `root/clotho_audio_files`.

    Args:
        root: The folder of the files.
    """

    kinds = (SOUNDS,)

    def __init__(self, root: str) -> None:
        self.root = root

    def splits(self, medium: Medium[Media]) -> PairSplits[Media]:
        train, val, test = (self._table(split).all_pairs(medium) for split in SPLITS.values())
        return PairSplits(train, val, test)

    def _table(self, split: str) -> PairTable:
        name = f"clotho_captions_{split}.csv"
        table = _existing(Path(self.root), "clotho_csv_files", name)
        folder = _existing(Path(self.root), "clotho_audio_files", split)
        return PairTable(
            str(table),
            file_column="file_name",
            text_column=[f"caption_{number + 1}" for number in range(NUM_CAPTIONS)],
            media_folder=str(folder),
        )


def _existing(root: Path, folder: str, name: str) -> Path:
    """A file or folder in `root`, or in a folder of it.

    Raises:
        FileNotFoundError: If it is in neither.
    """
    for path in (root / name, root / folder / name):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{root / name} does not exist: set --data.source.root to the folder of Clotho's files"
    )
