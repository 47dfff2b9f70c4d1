"""Sources of audio clips: folders by class, Speech Commands, and CSV tables."""

from collections.abc import Sequence
from pathlib import Path

from datamodules.audio.clips import EXTENSIONS, AudioClips, FileClips
from datamodules.shared.files import list_files, read_lines
from datamodules.shared.folders import FolderSource
from datamodules.shared.sources import Labels, Source, Splits
from datamodules.shared.tables import TableSource


class AudioSource(Source[AudioClips]):
    """Clips in training, validation and test splits."""


class SoundFolder(FolderSource[AudioClips], AudioSource):
    """WAV, FLAC, OGG or MP3 files in one folder per class: `train/<class>/.../*.wav`.

    Hidden files and folders are skipped. Folders whose names differ only in Unicode normalization
    are one class, as they would be one folder on some file systems. `FileClips` documents how files
    are read.

    Args:
        train: Folder of the training clips and, without `val`, of the validation clips.
        val: Folder of the validation clips, with the same classes.
        test: Folder of the test clips, with the same classes; the validation clips by default.
        val_fraction: Without `val`, the fraction of each class to hold out for validation, the
            same clips in every run.
    """

    extensions = EXTENSIONS

    def samples(self, paths: Sequence[Path], labels: Sequence[Labels]) -> FileClips:
        return FileClips(paths, labels)


class SpeechCommands(AudioSource):
    """Speech Commands v2 (Warden, 2018): 105,829 spoken words of 35 classes, 1 second at 16 kHz.

    The layout is that of torchaudio's download:
    `root/SpeechCommands/speech_commands_v0.02/<word>/*.wav`, with `validation_list.txt` and
    `testing_list.txt`. The folder `_background_noise_` is not a class; it can be used as
    `noise_folder` of `AudioAugment`.

    Args:
        root: The folder that contains `SpeechCommands`.
        download: Whether to download the data set (2.3 GB) if it does not exist.
    """

    def __init__(self, root: str, *, download: bool = False) -> None:
        self.root = root
        self.download = download

    @property
    def folder(self) -> Path:
        """The folder of words."""
        return Path(self.root, "SpeechCommands", "speech_commands_v0.02")

    def prepare(self) -> None:
        if self.download:
            # Imported here, because nothing else needs torchaudio.
            from torchaudio.datasets import SPEECHCOMMANDS

            Path(self.root).mkdir(parents=True, exist_ok=True)
            SPEECHCOMMANDS(self.root, url=self.folder.name, download=True)

    def splits(self) -> Splits[AudioClips]:
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"folder {self.folder} does not exist: set --data.source.root to an existing "
                f"copy, or --data.source.download true"
            )
        words: dict[str, list[Path]] = {
            entry.name: list_files(entry, (".wav",))
            for entry in sorted(self.folder.iterdir())
            if entry.is_dir() and not entry.name.startswith(("_", "."))
        }
        if not words:
            raise ValueError(f"{self.folder} has no subfolders: each word needs its own")
        for word, paths in words.items():
            if not paths:
                raise ValueError(f"{self.folder / word} has no .wav files")
        files = [path for paths in words.values() for path in paths]
        clips = FileClips(
            files,
            [(number,) for number, paths in enumerate(words.values()) for _ in paths],
        )
        val_names, test_names = self._names("validation_list.txt"), self._names("testing_list.txt")
        train: list[int] = []
        val: list[int] = []
        test: list[int] = []
        for index, path in enumerate(files):
            name = f"{path.parent.name}/{path.name}"
            split = val if name in val_names else test if name in test_names else train
            split.append(index)
        return Splits(list(words), clips.subset(train), clips.subset(val), clips.subset(test))

    def _names(self, file_name: str) -> set[str]:
        lines = read_lines(self.folder / file_name, "list of held-out clips")
        return {line.strip() for line in lines}


class SoundTable(TableSource[AudioClips], AudioSource):
    """CSV files of sound files and their labels, with one label per clip or several (as in
    AudioSet).

    The first line has the column names; other columns are ignored. Labels that differ only in
    Unicode normalization are the same.

    Args:
        train: CSV file of the training clips, in UTF-8. Paths in it are relative to its folder.
        val: CSV file of the validation clips.
        test: CSV file of the test clips; the validation clips by default.
        file_column: Name of the column of file paths.
        label_column: Name of the column of labels.
        split_column: Name of a column of `train` with the value `train`, `val` or `test` (or
            `training`, `validation`, `valid`, `dev`, `testing`), instead of separate files.
        label_separator: Separator of several labels, `";"` or `","` (in a quoted field).
        classes: A text file of class names, one per line, in the order of their indices. By
            default the sorted labels of the training clips.
        multi_label: Whether a clip may have any number of labels; otherwise exactly one.
        val_fraction: Without validation clips, the fraction of each class to hold out, the same
            clips in every run.

    Raises:
        ValueError: If the separator is unknown, or `split_column` is combined with `val` or
            `test`.
    """

    def samples(self, paths: Sequence[Path], labels: Sequence[Labels]) -> FileClips:
        return FileClips(paths, labels)
