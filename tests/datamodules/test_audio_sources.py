"""Sources of sounds, with small folders in the formats of the data sets."""

import csv
import os

import numpy as np
import pytest
import soundfile

from datamodules.audio.clips import FileClips
from datamodules.audio.sources import SoundFolder, SoundTable, SpeechCommands


def write_sound(path, seconds=0.1, rate_hz=16000, channels=1, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *os.fsencode(path.name)])
    waveform = rng.uniform(-0.5, 0.5, (int(seconds * rate_hz), channels)).astype(np.float32)
    soundfile.write(path, waveform, rate_hz)
    return waveform


def write_csv(path, rows, columns=("file", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


@pytest.fixture
def animals(tmp_path):
    folder = tmp_path / "animals"
    for name in ("cat", "dog"):
        for number in range(10):
            extension = (".wav", ".flac", ".ogg", ".WAV")[number % 4]
            write_sound(folder / name / f"{number}{extension}", channels=1 + number % 2)
    write_sound(folder / "dog" / "puppies" / "small.flac")
    (folder / "cat" / "notes.txt").write_text("not a sound")
    return folder


def test_a_folder_of_sounds_holds_out_some_of_each_class(animals):
    splits = SoundFolder(str(animals), val_fraction=0.2).splits()
    assert splits.class_names == ["cat", "dog"]
    assert not splits.multi_label
    assert (len(splits.train.labels), len(splits.val.labels)) == (17, 4)
    assert sorted(splits.val.labels) == [(0,), (0,), (1,), (1,)]
    assert not set(splits.train.paths) & set(splits.val.paths)
    assert splits.val.paths == SoundFolder(str(animals), val_fraction=0.2).splits().val.paths
    for clips in (splits.train, splits.val):
        for path, (label,) in zip(clips.paths, clips.labels, strict=True):
            assert path.relative_to(animals).parts[0] == splits.class_names[label]


def test_a_folder_of_sounds_with_folders_to_evaluate_on(animals, tmp_path):
    for name in ("cat", "dog"):
        write_sound(tmp_path / "val" / name / "0.wav")
        write_sound(tmp_path / "test" / name / "1.wav")
    splits = SoundFolder(
        str(animals), val=str(tmp_path / "val"), test=str(tmp_path / "test")
    ).splits()
    assert [len(clips.labels) for clips in (splits.train, splits.val, splits.test)] == [21, 2, 2]
    assert [path.name for path in splits.test.paths] == ["1.wav", "1.wav"]


def test_folders_with_other_classes_are_refused(animals, tmp_path):
    for name in ("cat", "cow"):
        write_sound(tmp_path / "val" / name / "0.wav")
    with pytest.raises(ValueError, match=r"val lacks classes that .*animals has: dog"):
        SoundFolder(str(animals), val=str(tmp_path / "val")).splits()
    write_sound(tmp_path / "val" / "dog" / "0.wav")
    with pytest.raises(ValueError, match=r"val has classes that .*animals lacks: cow"):
        SoundFolder(str(animals), val=str(tmp_path / "val")).splits()


def test_missing_and_empty_folders_are_named(animals, tmp_path):
    with pytest.raises(FileNotFoundError, match="folder .*nowhere does not exist"):
        SoundFolder(str(tmp_path / "nowhere")).splits()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no subfolders"):
        SoundFolder(str(tmp_path / "empty")).splits()
    (animals / "bird").mkdir()
    with pytest.raises(ValueError, match=r"animals.bird has no files ending in .wav, .flac, .ogg"):
        SoundFolder(str(animals)).splits()


def test_a_held_out_share_must_be_one(animals):
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1.5"):
        SoundFolder(str(animals), val_fraction=1.5).splits()


def test_reading_a_stretch_and_the_mean_of_channels(tmp_path):
    waveform = write_sound(tmp_path / "a.flac", channels=2)
    clips = FileClips([tmp_path / "a.flac"], [(0,)])
    assert clips.info(0) == (1600, 16000)
    mono = waveform.mean(axis=1)
    np.testing.assert_allclose(clips.read(0), mono, atol=1e-4)
    np.testing.assert_array_equal(clips.read(0, 100, 50), clips.read(0)[100:150])
    assert clips.read(0).dtype == np.float32


def test_unreadable_sounds_are_named(tmp_path):
    (tmp_path / "text.wav").write_text("this is no sound")
    (tmp_path / "text.mp3").write_text("this is no sound" * 100)
    (tmp_path / "nothing.flac").write_bytes(b"")
    soundfile.write(tmp_path / "silent.wav", np.zeros(0), 16000)
    write_sound(tmp_path / "whole.flac", seconds=1.0)
    content = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
    expected = {
        "text.wav": "is not a readable sound file: Format not recognised$",
        "text.mp3": "is not a readable sound file: Format not recognised$",
        "nothing.flac": "is not a readable sound",
        "silent.wav": "has no samples",
        "cut.flac": "cannot be decoded|ends after",
        "nan.wav": "has samples that are not finite",
        "gone.wav": "does not exist",
    }
    clips = FileClips([tmp_path / name for name in expected], [(0,)] * len(expected))
    for index, (name, message) in enumerate(expected.items()):
        with pytest.raises(ValueError, match=rf"clip {index} \(.*{name}\) ({message})"):
            clips.read(index)


@pytest.fixture
def commands(tmp_path):
    folder = tmp_path / "SpeechCommands" / "speech_commands_v0.02"
    for word in ("yes", "no", "marvin"):
        for speaker in ("0a1b2c3d", "ffee0011", "12345678"):
            for number in range(2):
                write_sound(folder / word / f"{speaker}_nohash_{number}.wav")
    write_sound(folder / "_background_noise_" / "running_tap.wav", seconds=1.0)
    (folder / "validation_list.txt").write_text(
        "yes/ffee0011_nohash_0.wav\nno/ffee0011_nohash_0.wav\nno/ffee0011_nohash_1.wav\n"
    )
    (folder / "testing_list.txt").write_text("marvin/12345678_nohash_0.wav\n")
    (folder / "README.md").write_text("Speech Commands Data Set v0.02")
    (folder / "LICENSE").write_text("CC BY 4.0")
    return tmp_path


def test_speech_commands_are_split_as_torchaudio_splits_them(commands):
    from torchaudio.datasets import SPEECHCOMMANDS

    source = SpeechCommands(str(commands), download=True)
    source.prepare()  # it exists already, so nothing is downloaded
    splits = source.splits()
    assert splits.class_names == ["marvin", "no", "yes"]
    names = {"train": "training", "val": "validation", "test": "testing"}
    for split, torchaudio_name in names.items():
        clips = getattr(splits, split)
        theirs = SPEECHCOMMANDS(str(commands), subset=torchaudio_name)
        expected = sorted(theirs.get_metadata(i)[::2][:2] for i in range(len(theirs)))
        root = source.folder.parent
        ours = sorted(
            (str(path.relative_to(root)), splits.class_names[label])
            for path, (label,) in zip(clips.paths, clips.labels, strict=True)
        )
        assert ours == expected, split
    assert [len(getattr(splits, split).labels) for split in names] == [14, 3, 1]


def test_incomplete_speech_commands_are_named(commands):
    source = SpeechCommands(str(commands))
    (source.folder / "testing_list.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"list of held-out clips .*testing_list.txt does not exist"
    ):
        source.splits()
    (source.folder / "zero").mkdir()
    with pytest.raises(ValueError, match=r"zero has no .wav files"):
        source.splits()
    with pytest.raises(
        FileNotFoundError,
        match="v0.02 does not exist: .*--data.source.download true",
    ):
        SpeechCommands(str(commands / "elsewhere")).splits()


@pytest.fixture
def tables(tmp_path):
    for name in ("a", "b", "c"):
        write_sound(tmp_path / "clips" / f"{name}.flac")
    train = [
        ("clips/a.flac", "Speech; Music", "x"),
        ("clips/b.flac", "", "y"),
        (str(tmp_path / "clips" / "c.flac"), "Dog;Dog;", "z"),
    ]
    columns = ("file", "label", "origin")
    return (
        write_csv(tmp_path / "train.csv", train, columns),
        write_csv(tmp_path / "val.csv", [("clips/d.flac", "Speech; Music", "x")], columns),
    )


def test_a_table_gives_each_clip_its_labels(tables):
    splits = SoundTable(*tables, multi_label=True).splits()
    assert splits.multi_label
    assert splits.class_names == ["Dog", "Music", "Speech"]
    assert splits.train.labels == [(2, 1), (), (0,)]
    assert splits.val.labels == splits.test.labels == [(2, 1)]
    assert [len(splits.train.read(index)) for index in range(3)] == [1600] * 3
    assert splits.target(()).tolist() == [0, 0, 0]


def test_a_table_with_other_columns_separators_and_classes(tmp_path):
    (tmp_path / "classes.txt").write_text("/m/09x0r\n/m/04rlf\n\n/m/0bt9lr\n")
    rows = [("/m/04rlf,/m/09x0r", "a.wav"), ("/m/04rlf", "b.wav")]
    train = write_csv(tmp_path / "train.csv", rows, ("positive_labels", "path"))
    splits = SoundTable(
        train,
        write_csv(tmp_path / "val.csv", [("/m/0bt9lr", "c.wav")], ("positive_labels", "path")),
        file_column="path",
        label_column="positive_labels",
        multi_label=True,
        label_separator=",",
        classes=str(tmp_path / "classes.txt"),
    ).splits()
    assert splits.class_names == ["/m/09x0r", "/m/04rlf", "/m/0bt9lr"]
    assert splits.train.labels == [(1, 0), (1,)]


def test_a_table_of_one_label_a_clip(tables, tmp_path):
    with pytest.raises(ValueError, match=r"train.csv, line 2: \S*a.flac has 2 labels, but exactly"):
        SoundTable(*tables).splits()
    one = write_csv(tmp_path / "one.csv", [("clips/a.flac", "Dog"), ("clips/b.flac", "Cat")])
    other = write_csv(tmp_path / "other.csv", [("clips/c.flac", "Dog")])
    splits = SoundTable(one, other).splits()
    assert splits.target(splits.train.labels[0]).item() == 1


def test_bad_tables_are_named(tables, tmp_path):
    train, _ = tables
    with pytest.raises(FileNotFoundError, match=r"table .*gone.csv does not exist"):
        SoundTable(train, str(tmp_path / "gone.csv")).splits()
    with pytest.raises(ValueError, match=r"train.csv has no column 'path', only file, label"):
        SoundTable(train, train, file_column="path").splits()
    with pytest.raises(ValueError, match="label_separator must be one of ';', ',', got '|'"):
        SoundTable(train, train, label_separator="|")
    other = write_csv(tmp_path / "other.csv", [("clips/d.flac", "Musik")])
    with pytest.raises(ValueError, match=r"other.csv: .*d.flac has label 'Musik'.*'Music'\?"):
        SoundTable(train, other, multi_label=True).splits()
    with pytest.raises(ValueError, match=r"empty.csv has no rows"):
        SoundTable(train, write_csv(tmp_path / "empty.csv", [])).splits()
    short = write_csv(tmp_path / "short.csv", [("clips/a.flac", "Dog"), ("clips/b.flac",)])
    with pytest.raises(ValueError, match=r"short.csv, line 3: the file or labels are missing"):
        SoundTable(train, short).splits()
    (tmp_path / "zero.csv").write_text("")
    with pytest.raises(ValueError, match=r"zero.csv has no column 'file', only nothing"):
        SoundTable(train, str(tmp_path / "zero.csv")).splits()
