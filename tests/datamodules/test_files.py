"""Which files are data: no hidden files, and only regular files."""

import os
import socket
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from datamodules.audio.augment import AudioAugment, Augmenter
from datamodules.audio.clips import FileClips
from datamodules.audio.evaluation import AudioReader
from datamodules.audio.own_data import own_sounds
from datamodules.audio.sources import SoundFolder, SoundTable, SpeechCommands
from datamodules.image.files import EXTENSIONS as IMAGE_EXTENSIONS
from datamodules.image.files import read_image
from datamodules.image.reader import ImageReader
from datamodules.image.sources import FileImages, ImageFolder
from datamodules.shared.bad_samples import BadSampleError, BadSamples, Triage
from datamodules.shared.examination import examine_labelled
from datamodules.shared.files import (
    check_file,
    glob_files,
    list_files,
    read_lines,
    walk_files,
    why_no_file,
)
from datamodules.text.data import StandardLibrary, TextFolder, TokenFiles, write_token_file
from diffmm.tokenizers import load_tokenizer

pytestmark = pytest.mark.usefixtures("within_a_minute")

NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 8000)
BYTES = load_tokenizer("bytes")
ACCENTED = "café"
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, ACCENTED) for form in ("NFC", "NFD"))

HIDDEN = ("._a", ".ipynb_checkpoints/a-checkpoint", "deep/.cache/a", "deep/._b")


def write(path: Path) -> Path:
    """A small file of the kind that its extension names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.new("L", (4, 4)).save(path)
    elif path.suffix == ".wav":
        soundfile.write(path, np.full(80, 0.5), 8000)
    else:
        path.write_text(path.name)
    return path


@pytest.fixture
def tree(tmp_path: Path):
    """Two classes, `a` and `b`, with two files each, and hidden files at every depth."""

    def build(suffix: str, name: str = "data") -> Path:
        folder = tmp_path / name
        for label in "ab":
            write(folder / label / f"0{suffix}")
            write(folder / label / "deep" / f"1{suffix}")
            for hidden in HIDDEN:
                write(folder / label / f"{hidden}{suffix}")
        write(folder / ".ipynb_checkpoints" / f"0{suffix}")
        return folder

    return build


@pytest.mark.parametrize("name", ["__MACOSX", "Thumbs.db", "desktop.ini"])
def test_what_systems_add_is_no_data(tree, name) -> None:
    folder = tree(".wav")
    write(folder / name / "0.wav")
    write(folder / "a" / name / "1.wav")
    assert SoundFolder(str(folder)).splits().class_names == ["a", "b"]
    assert len(list_files(folder, ("",))) == len(list(walk_files(folder, ("",)))) == 4
    assert not [path for path in glob_files(folder, "**/*") if name in path.parts]
    assert "2 classes (a, b)" in own_sounds(str(folder), {}, inputs_may_change=True).summary


def test_sounds_of_all_formats_are_found_in_folders_and_others_are_counted(tmp_path, caplog):
    for name in ("0.wav", "1.MP3", "2.ogg", "3.flac", "4.opus"):
        for label in "ab":
            path = tmp_path / label / name
            path.parent.mkdir(exist_ok=True)
            subtype = "OPUS" if path.suffix == ".opus" else None
            format = "OGG" if path.suffix == ".opus" else path.suffix[1:].upper()
            soundfile.write(path, NOISE, 8000, subtype, format=format)
    for name in ("a/5.m4a", "b/5.m4a", "b/notes.txt", "b/LICENSE"):
        write(tmp_path / name)
    splits = SoundFolder(str(tmp_path)).splits()
    assert len(splits.train.labels) + len(splits.val.labels) == 10
    said = f"{tmp_path} has 4 other files that are skipped (.m4a, no extension, .txt)"
    assert [record.message for record in caplog.records] == [said]
    reader = AudioReader(sample_rate_hz=8000)
    assert len(list(reader.files(tmp_path))) == 10
    assert reader.skipped(tmp_path) == said.partition(" has ")[2]
    (tmp_path / "c").mkdir()
    write(tmp_path / "c" / "0.m4a")
    with pytest.raises(ValueError, match=r"c has no files ending in .* 5 other files .*\.m4a"):
        SoundFolder(str(tmp_path)).splits()


@pytest.mark.parametrize("extension", IMAGE_EXTENSIONS)
def test_images_of_all_extensions_are_found_and_read(tmp_path, extension) -> None:
    Image.new("1" if extension == ".pbm" else "L", (4, 4)).save(tmp_path / f"0{extension}")
    (file,) = list_files(tmp_path, ImageReader.extensions)
    assert read_image(file).size == (4, 4)


def names(paths, folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_hidden_files_are_no_samples(tree) -> None:
    pictures, sounds, texts = tree(".png", "pictures"), tree(".wav", "sounds"), tree(".txt", "txt")
    images = ImageFolder(str(pictures), str(pictures)).splits()
    clips = SoundFolder(str(sounds), val=str(sounds)).splits()
    for splits, folder, suffix in ((images, pictures, "png"), (clips, sounds, "wav")):
        assert splits.class_names == ["a", "b"]
        expected = [f"{label}/{rest}.{suffix}" for label in "ab" for rest in ("0", "deep/1")]
        assert names(splits.train.paths, folder) == expected
    documents = [document.key for document in TextFolder(str(texts)).documents()]
    assert documents == ["a/0.txt", "a/deep/1.txt", "b/0.txt", "b/deep/1.txt"]
    noises = Augmenter(
        AudioAugment(snr_db=(0.0, 1.0), noise_folder=str(sounds)),
        sample_rate_hz=8000,
        resample=False,
    ).noises
    assert names(noises.clips.paths, sounds) == names(clips.train.paths, sounds)


def test_a_hidden_folder_above_hides_nothing(tmp_path: Path) -> None:
    write(tmp_path / ".cache" / "a" / "0.png")
    assert len(list_files(tmp_path / ".cache", (".png",))) == 1
    assert len(glob_files(tmp_path / ".cache", "**/*.png")) == 1


def test_hidden_files_are_no_words(tmp_path: Path) -> None:
    source = SpeechCommands(str(tmp_path))
    for word in ("no", "yes", ".ipynb_checkpoints", "_background_noise_"):
        for name in ("0.wav", "1.wav", "2.wav", "._0.wav"):
            write(source.folder / word / name)
    (source.folder / "validation_list.txt").write_text("﻿yes/1.wav\nno/1.wav\n", "utf-8")
    (source.folder / "testing_list.txt").write_text("no/2.wav\n")
    splits = source.splits()
    assert splits.class_names == ["no", "yes"]
    assert [len(clips.paths) for clips in (splits.train, splits.val, splits.test)] == [3, 2, 1]


def test_names_that_look_the_same_are_one_class(tmp_path: Path) -> None:
    train, val = tmp_path / "train", tmp_path / "val"
    for number, form in enumerate((COMPOSED, DECOMPOSED)):
        write(train / form / f"{number}.png")
    write(train / "cafz" / "0.png")
    write(val / DECOMPOSED / "0.png")
    write(val / "cafz" / "0.png")
    if len(list(train.iterdir())) == 2:
        pytest.skip("this file system treats the names as equal")
    splits = ImageFolder(str(train), str(val)).splits()
    assert splits.class_names == ["cafz", COMPOSED]
    assert splits.train.labels == [(0,), (1,), (1,)]
    assert splits.val.labels == [(0,), (1,)]


def test_labels_that_look_the_same_are_one_class(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.wav")
    manifest = tmp_path / "train.csv"
    manifest.write_text(f"file,label\n0.wav,{COMPOSED}\n1.wav,{DECOMPOSED}\n", "utf-8")
    other = tmp_path / "val.csv"
    other.write_text(f"file,label\n2.wav,{DECOMPOSED}\n", "utf-8")
    classes = tmp_path / "classes.txt"
    classes.write_text(f"\N{ZERO WIDTH NO-BREAK SPACE}{DECOMPOSED}\n", "utf-8")
    for named in (None, str(classes)):
        splits = SoundTable(str(manifest), str(other), classes=named).splits()
        assert splits.class_names == [COMPOSED]
        assert splits.train.labels == [(0,), (0,)]
    classes.write_text(f"{COMPOSED}\n{DECOMPOSED}\n", "utf-8")
    with pytest.raises(ValueError, match=rf"classes.txt has the class '{COMPOSED}' 2 times"):
        SoundTable(str(manifest), str(other), classes=str(classes)).splits()


def test_texts_fall_in_the_same_split_on_all_systems(tmp_path: Path) -> None:
    keys = []
    for name in (COMPOSED, DECOMPOSED):
        write(tmp_path / name / f"{name}.txt")
        keys.append([document.key for document in TextFolder(str(tmp_path / name)).documents()])
    assert keys[0] == keys[1]


def test_tables_that_are_no_text_are_named(tmp_path: Path) -> None:
    for name, content in (
        ("utf16.csv", "file,label\na.wav,b".encode("utf-16")),
        ("long.csv", b'file,label\na.wav,"' + b"b" * 200_000 + b'"'),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"table .*{name} is not a UTF-8 CSV file: "):
            SoundTable(str(tmp_path / name), str(tmp_path / name)).splits()
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"list .*latin.txt is not UTF-8 text: "):
        read_lines(tmp_path / "latin.txt", "list")


def test_links_are_followed_but_not_around(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "0.png")
    folder = tmp_path / "data" / "a"
    write(folder / "1.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "around").symlink_to(folder)
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "2.png").symlink_to(folder / "1.png")
    (folder / "ring.png").symlink_to("ring.png")
    (folder / "broken.png").symlink_to("gone.png")
    found = names(list_files(folder, (".png",)), folder)
    assert found == ["1.png", "2.png", "broken.png", "ring.png", "link/0.png"]
    images = FileImages(list_files(folder, (".png",)), [(0,)] * 5)
    assert images.read(1).size == (4, 4)
    with pytest.raises(BadSampleError, match=r"broken.png\) does not exist"):
        images.read(2)
    with pytest.raises(BadSampleError, match=r"ring.png\) cannot be opened: Too many levels"):
        images.read(3)


@pytest.fixture(params=["a named pipe", "a socket", "a device", "a folder"])
def irregular(request: pytest.FixtureRequest, tmp_path: Path):
    """Create a file that is not a regular file, and return its kind."""
    sockets = []

    def put(path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        if request.param == "a named pipe":
            os.mkfifo(path)
        elif request.param == "a socket":
            sockets.append(socket.socket(socket.AF_UNIX))
            here = Path.cwd()
            os.chdir(path.parent)  # a socket's name must be short
            sockets[-1].bind(path.name)
            os.chdir(here)
        elif request.param == "a device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        return f"is {request.param}, not a regular file"

    yield put
    for each in sockets:
        each.close()


def test_only_regular_files_are_opened(irregular, tmp_path: Path) -> None:
    """A reader of a named pipe would wait for a writer, and could not be interrupted by signals."""
    words = irregular(tmp_path / "a.png")
    assert why_no_file(tmp_path / "a.png") == words
    with pytest.raises(BadSampleError, match=rf"image 0 \(.*a.png\) {words}"):
        FileImages([tmp_path / "a.png"], [(0,)]).read(0)
    irregular(tmp_path / "a.wav")
    clips = FileClips([tmp_path / "a.wav"], [(0,)])
    for read in (clips.read, clips.info):
        with pytest.raises(BadSampleError, match=rf"clip 0 \(.*a.wav\) {words}"):
            read(0)
    irregular(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=rf"table .*a.csv {words}"):
        SoundTable(str(tmp_path / "a.csv"), str(tmp_path / "a.csv")).splits()
    irregular(tmp_path / "classes.txt")
    write(tmp_path / "b.wav")
    (tmp_path / "b.csv").write_text("file,label\nb.wav,x\n")
    csv = str(tmp_path / "b.csv")
    with pytest.raises(ValueError, match=rf"file of classes .*classes.txt {words}"):
        SoundTable(csv, classes=str(tmp_path / "classes.txt")).splits()
    irregular(tmp_path / "quarantine.txt")
    with pytest.raises(ValueError, match=rf"quarantine_file .*quarantine.txt {words}"):
        Triage(BadSamples("quarantine"), tmp_path)
    if "folder" in words:  # it would be a word
        return
    source = SpeechCommands(str(tmp_path))
    write(source.folder / "yes" / "0.wav")
    irregular(source.folder / "validation_list.txt")
    with pytest.raises(ValueError, match=rf"list of held-out clips .*validation_list.txt {words}"):
        source.splits()


def test_no_irregular_noise_is_opened(irregular, tmp_path: Path) -> None:
    words = irregular(tmp_path / "noise" / "a.wav")
    augment = AudioAugment(snr_db=(0.0, 1.0), noise_folder=str(tmp_path / "noise"))
    if "folder" in words:
        with pytest.raises(ValueError, match="noise has no files ending in .wav"):
            Augmenter(augment, sample_rate_hz=8000, resample=False)
        return
    augmenter = Augmenter(augment, sample_rate_hz=8000, resample=False)
    with pytest.raises(BadSampleError, match=rf"a.wav\) {words}"):
        augmenter(np.ones(80, np.float32), np.random.default_rng(0))


def test_no_irregular_text_is_opened(irregular, tmp_path: Path) -> None:
    write(tmp_path / "texts" / "0.txt")
    words = irregular(tmp_path / "texts" / "1.txt")
    source = TextFolder(str(tmp_path / "texts"))
    assert source.fingerprint() == TextFolder(str(tmp_path / "texts")).fingerprint()
    if "folder" in words:
        assert len(list(source.documents())) == 1
        return
    with pytest.raises(BadSampleError, match=rf"file 1 \(.*1.txt\) {words}"):
        list(source.documents())
    source.triage = Triage(BadSamples("substitute", max_bad_fraction=1.0))
    assert [document.text for document in source.documents()] == ["0.txt"]


def test_no_irregular_source_is_opened(irregular, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    write(tmp_path / "a.py")
    irregular(tmp_path / "b.py")
    (tmp_path / "c.py").symlink_to("gone.py")
    assert [document.key for document in StandardLibrary().documents()] == ["a.py"]


@pytest.mark.parametrize("suffix", [".bin", ".json", ".documents.npy"])
def test_no_irregular_token_file_is_opened(irregular, tmp_path: Path, suffix: str) -> None:
    texts = TextFolder(str(write(tmp_path / "texts" / "0.txt").parent))
    path = write_token_file(tmp_path / "a.bin", texts.documents(), BYTES)
    path.with_suffix(suffix).unlink()
    words = irregular(path.with_suffix(suffix))
    source = TokenFiles([str(path)])
    with pytest.raises(
        BadSampleError, match=rf"token file 0 \(.*a.bin\) needs .*a{suffix}, which {words}"
    ):
        source.load(BYTES)
    source.triage = Triage(BadSamples("substitute", max_bad_fraction=1.0))
    assert len(source.load(BYTES)) == 0


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"table .*gone.csv does not exist"):
        check_file(tmp_path / "gone.csv", "table")
    assert why_no_file(write(tmp_path / "a.txt")) is None
    assert why_no_file(tmp_path / "a.txt" / "b") == "does not exist"
    from_windows = f"{tmp_path.parent}\\{tmp_path.name}\\a.txt"
    told = "does not exist, but it does with / in place of \\"
    assert why_no_file(from_windows) == told
    with pytest.raises(FileNotFoundError, match=r"in place of \\"):
        check_file(from_windows, "table")
    assert "null" in why_no_file(f"{tmp_path}/a\0b")


def test_several_sample_rates_are_listed_as_a_sentence(tmp_path):
    for number, rate in enumerate((8000, 16000, 44100) * 2):
        for name in "ab":
            (tmp_path / name).mkdir(exist_ok=True)
            soundfile.write(tmp_path / name / f"{number}.wav", np.zeros(rate), rate)
    summary = own_sounds(str(tmp_path), {}, inputs_may_change=True).summary
    assert summary.endswith("; 8,000; 16,000 and 44,100 Hz, 1 to 1 s")


def test_class_names_with_commas_are_quoted_where_classes_are_listed(tmp_path):
    for name in ("cat, big", "dog"):
        (tmp_path / name).mkdir()
        for number in range(2):
            soundfile.write(tmp_path / name / f"{number}.wav", np.zeros(80), 8000)
    assert (
        '2 classes ("cat, big", dog)'
        in own_sounds(str(tmp_path), {}, inputs_may_change=True).summary
    )
    splits = SoundFolder(str(tmp_path), val_fraction=0.5).splits()
    lines = examine_labelled(splits, lambda clips, index: None, limit=1, tolerates=False).lines
    assert lines["train"] == '2 samples: 1 "cat, big"; 1 dog'
