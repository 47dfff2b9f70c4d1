"""Where sounds come from: folders by class, Speech Commands, manifests of several labels a clip."""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datamodules.audio.clips import EXTENSIONS, AudioClips, FileClips
from datamodules.shared.files import check_file, composed, list_files, read_lines
from datamodules.shared.sources import ClassFolder, Source, Splits, check_same_classes, hold_out
from diffmm.checks import DataError, check_choice, did_you_mean


class AudioSource(Source[AudioClips]):
    """Clips in training, validation and test splits."""


class SoundFolder(AudioSource):
    """WAV, FLAC or OGG files in a folder a class: `folder/<class>/.../*.wav`.

    Hidden files and folders are left out. Folders whose names differ in Unicode form alone are one
    class, as they are one folder on other systems. See `FileClips` for how files are read.

    Args:
        folder: training clips and, without `val`, validation clips.
        val: a folder of validation clips, of the same classes.
        test: a folder of test clips, of the same classes; the validation clips by default.
        val_fraction: without `val`, this share of each class is held out for validation, the same
            clips in every run.
    """

    def __init__(
        self,
        folder: str,
        *,
        val: str | None = None,
        test: str | None = None,
        val_fraction: float = 0.1,
    ) -> None:
        self.folder = folder
        self.val = val
        self.test = test
        self.val_fraction = val_fraction

    def splits(self) -> Splits[AudioClips]:
        class_names, paths, labels = ClassFolder.read(self.folder, EXTENSIONS)
        train_clips = FileClips(paths, labels)
        if self.val is None:
            train, held_out = hold_out(labels, self.val_fraction)
            train_clips, val_clips = train_clips.subset(train), train_clips.subset(held_out)
        else:
            val_clips = self._evaluation_clips(self.val, class_names)
        test_clips = self._evaluation_clips(self.test, class_names) if self.test else val_clips
        return Splits(class_names, train_clips, val_clips, test_clips)

    def _evaluation_clips(self, folder: str, expected: list[str]) -> FileClips:
        class_names, paths, labels = ClassFolder.read(folder, EXTENSIONS)
        check_same_classes(self.folder, expected, folder, class_names)
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


class Manifest(AudioSource):
    """CSV files that name sound files and their labels, several a clip (as AudioSet's).

    The first line names the columns; others than `path_column` and `labels_column` are ignored.
    Labels that differ in Unicode form alone are one.

    Args:
        train, val: CSV files in UTF-8. Relative paths in them are relative to the CSV's folder.
        test: CSV file of the test clips; the validation clips by default.
        path_column: the column of the sound files' paths.
        labels_column: the column of the labels.
        label_separator: what stands between labels, `";"` or `","` (in a quoted field).
        classes: a text file of class names, one a line, in the order of their numbers. By default
            the sorted labels of `train`.
        multi_label: whether a clip may have several labels, or none; otherwise exactly one.
    """

    def __init__(
        self,
        train: str,
        val: str,
        test: str | None = None,
        *,
        path_column: str = "path",
        labels_column: str = "labels",
        label_separator: str = ";",
        classes: str | None = None,
        multi_label: bool = True,
    ) -> None:
        check_choice("label_separator", label_separator, (";", ","))
        self.train = train
        self.val = val
        self.test = test
        self.path_column = path_column
        self.labels_column = labels_column
        self.label_separator = label_separator
        self.classes = classes
        self.multi_label = multi_label

    def splits(self) -> Splits[AudioClips]:
        train = self._rows(self.train)
        if self.classes is None:
            class_names = sorted({label for _, labels in train for label in labels})
        else:
            lines = read_lines(self.classes, "file of classes")
            class_names = [composed(line.strip()) for line in lines if line.strip()]
            for name, count in Counter(class_names).items():
                if count > 1:
                    raise DataError(f"{self.classes} has the class {name!r} {count} times")
        train_clips = self._clips(self.train, train, class_names)
        val_clips = self._clips(self.val, self._rows(self.val), class_names)
        test_clips = val_clips
        if self.test is not None:
            test_clips = self._clips(self.test, self._rows(self.test), class_names)
        return Splits(class_names, train_clips, val_clips, test_clips, self.multi_label)

    def _rows(self, manifest: str) -> list[tuple[Path, list[str]]]:
        """The path and the labels of each line."""
        path = Path(manifest)
        check_file(path, "manifest")
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = list(self._read(path, csv.DictReader(file)))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"manifest {path} is no CSV file in UTF-8: {error}") from error
        if not rows:
            raise ValueError(f"{path} names no clips")
        return rows

    def _read(self, path: Path, reader: "csv.DictReader[str]") -> Iterator[tuple[Path, list[str]]]:
        columns = reader.fieldnames or []
        for column in (self.path_column, self.labels_column):
            if column not in columns:
                raise ValueError(
                    f"{path} has no column {column!r}, only {', '.join(columns) or 'nothing'}"
                )
        for row in reader:
            if not row[self.path_column] or row[self.labels_column] is None:
                raise ValueError(f"{path}, line {reader.line_num}: a path or labels are missing")
            labels = composed(row[self.labels_column]).split(self.label_separator)
            names = list(dict.fromkeys(label.strip() for label in labels if label.strip()))
            yield path.parent / row[self.path_column], names

    def _clips(
        self, manifest: str, rows: list[tuple[Path, list[str]]], class_names: list[str]
    ) -> FileClips:
        numbers = {name: number for number, name in enumerate(class_names)}
        labels = []
        for path, names in rows:
            for name in names:
                if name not in numbers:
                    raise ValueError(
                        f"{manifest}: {path} has label {name!r}, which is none of the "
                        f"{len(class_names)} classes{did_you_mean(name, class_names)}"
                    )
            labels.append(tuple(numbers[name] for name in names))
        return FileClips([path for path, _ in rows], labels)
