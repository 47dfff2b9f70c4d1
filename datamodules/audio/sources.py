"""Where sounds come from: folders by class, Speech Commands, tables of files and labels."""

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
    """WAV, FLAC or OGG files in a folder per class: `train/<class>/.../*.wav`.

    Hidden files and folders are left out. Folders whose names differ in Unicode form alone are one
    class, as they are one folder on other systems. See `FileClips` for how files are read.

    Args:
        train: folder of the training clips and, without `val`, of the validation clips.
        val: folder of the validation clips, of the same classes.
        test: folder of the test clips, of the same classes; the validation clips by default.
        val_fraction: without `val`, this share of each class is held out for validation, the same
            clips in every run.
    """

    extensions = EXTENSIONS

    def samples(self, paths: Sequence[Path], labels: Sequence[Labels]) -> FileClips:
        return FileClips(paths, labels)


class SpeechCommands(AudioSource):
    """Speech Commands v2 (Warden, 2018): 105,829 spoken words of 35 classes, 1 second at 16 kHz.

    As torchaudio downloads it: `root/SpeechCommands/speech_commands_v0.02/<word>/*.wav`, with
    `validation_list.txt` and `testing_list.txt`. `_background_noise_` there is no class; it serves
    as `noise_folder` of `AudioAugment`.

    Args:
        root: the folder that holds `SpeechCommands`.
        download: fetch it (2.3 GB) if it is not there.
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
            # Imported here, since the rest needs no torchaudio.
            from torchaudio.datasets import SPEECHCOMMANDS

            Path(self.root).mkdir(parents=True, exist_ok=True)
            SPEECHCOMMANDS(self.root, url=self.folder.name, download=True)

    def splits(self) -> Splits[AudioClips]:
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"no folder {self.folder}: give the root of an existing copy, or download: true"
            )
        words: dict[str, list[Path]] = {
            entry.name: list_files(entry, (".wav",))
            for entry in sorted(self.folder.iterdir())
            if entry.is_dir() and not entry.name.startswith(("_", "."))
        }
        if not words:
            raise ValueError(f"{self.folder} has no subfolders: each word needs one")
        for word, paths in words.items():
            if not paths:
                raise ValueError(f"{self.folder / word} has no .wav files")
        clips = FileClips(
            [path for paths in words.values() for path in paths],
            [(number,) for number, paths in enumerate(words.values()) for _ in paths],
        )
        val_names, test_names = self._names("validation_list.txt"), self._names("testing_list.txt")
        train: list[int] = []
        val: list[int] = []
        test: list[int] = []
        for index, path in enumerate(clips.paths):
            name = f"{path.parent.name}/{path.name}"
            split = val if name in val_names else test if name in test_names else train
            split.append(index)
        return Splits(list(words), clips.subset(train), clips.subset(val), clips.subset(test))

    def _names(self, file_name: str) -> set[str]:
        lines = read_lines(self.folder / file_name, "list of held-out clips")
        return {line.strip() for line in lines}


class SoundTable(TableSource[AudioClips], AudioSource):
    """CSV files that name sound files and their labels, one label per clip or several (as
    AudioSet's).

    The first line names the columns; others than the ones given here are ignored. Labels that
    differ in Unicode form alone are one.

    Args:
        train: CSV file of the training clips, in UTF-8. Relative paths in it are relative to its
            folder.
        val: CSV file of the validation clips.
        test: CSV file of the test clips; the validation clips by default.
        file_column: the column of the sound files' paths.
        label_column: the column of the labels.
        split_column: the column of `train` that says `train`, `val` or `test` (or `training`,
            `validation`, `valid`, `dev`, `testing`), in place of files for these.
        label_separator: what stands between labels where `multi_label`, `";"` or `","` (in a
            quoted field).
        classes: a text file of class names, one per line, in the order of their numbers. By
            default the sorted labels of the training clips.
        multi_label: whether a clip may have several labels, or none; otherwise exactly one.
        val_fraction: without validation clips, this share of each class is held out, the same
            clips in every run.

    Raises:
        ValueError: for another separator, or a `split_column` beside `val` or `test`.
    """

    def samples(self, paths: Sequence[Path], labels: Sequence[Labels]) -> FileClips:
        return FileClips(paths, labels)
