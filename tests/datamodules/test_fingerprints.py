"""A checkpoint records its data: differences are named, and a copy in another folder is the
same."""

import os
import shutil

import numpy as np
import pytest
import soundfile
from PIL import Image

from datamodules import AudioData, ImageData, TextData
from datamodules.audio.sound_events import SoundEvents
from datamodules.audio.sources import SoundFolder
from datamodules.image.sources import ImageFolder
from datamodules.image.transform import ImageTransform
from datamodules.shared.fingerprints import NUM_BEGINNINGS, changes, of_files
from datamodules.text.data import HuggingFaceText, TextFolder, TokenFiles, write_token_file
from datamodules.text.token_documents import Document
from diffmm.tokenizers import load_tokenizer


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        for number in range(4):
            for modality in ("images", "sounds"):
                (tmp_path / modality / name).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
            sound = rng.uniform(-0.5, 0.5, 400)
            soundfile.write(tmp_path / "sounds" / name / f"{number}.wav", sound, 4000)
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Text {number} of thirty. " * 9)
    return tmp_path


def module(modality, folder, **settings):
    if modality == "images":
        source = ImageFolder(str(folder / "images"), str(folder / "images"))
        return ImageData(source, batch_size=2, **{"image_size": 8, **settings})
    if modality == "sounds":
        return AudioData(
            SoundFolder(str(folder / "sounds"), val_fraction=0.25),
            batch_size=2,
            **{"sample_rate_hz": 4000, **settings},
        )
    return TextData(
        TextFolder(str(folder / "texts")),
        batch_size=2,
        **{"sequence_length": 16, "validation_fraction": 0.3, **settings},
    )


def fingerprint(data):
    data.setup("fit")
    data.train_dataloader()
    return data.fingerprint()


MODALITIES = ("images", "sounds", "texts")


def a_file(modality, folder, number=0):
    """The fingerprint of the training data."""
    module_ = module(modality, folder)
    module_.setup("fit")
    if modality != "texts":
        return module_.splits.train.file(number)
    return folder / "texts" / "3.txt"


@pytest.mark.parametrize("modality", MODALITIES)
def test_data_that_were_copied_are_the_same(data, modality, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere") / "deeper"
    shutil.copytree(data, other, copy_function=shutil.copyfile)
    os.utime(a_file(modality, other), (0, 0))
    assert fingerprint(module(modality, data)) == fingerprint(module(modality, other))


def longer(path):
    path.write_bytes(path.read_bytes() + b"and more of it")


def other_beginning(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def renamed(path):
    path.rename(path.with_stem("another"))


def gone(path):
    path.unlink()


@pytest.mark.parametrize(
    ("modality", "change", "told"),
    [
        ("images", longer, "sizes of files differ"),
        ("images", other_beginning, "contents of files differ"),
        ("images", renamed, "names of files differ"),
        ("images", gone, "samples: 8, now 7"),
        ("sounds", longer, "sizes of files differ"),
        ("sounds", other_beginning, "contents of files differ"),
        ("sounds", renamed, "names of files differ"),
        ("texts", longer, "sizes of documents differ"),
        ("texts", other_beginning, "contents of documents differ"),
        ("texts", gone, "documents: 23, now 22"),
    ],
)
def test_what_changed_is_told(data, modality, change, told):
    then = fingerprint(module(modality, data))
    change(a_file(modality, data))
    assert told in changes(then, fingerprint(module(modality, data)))


@pytest.mark.parametrize(
    ("modality", "settings", "told"),
    [
        ("images", {"image_size": 6}, "image_size: (8, 8), now (6, 6)"),
        ("images", {"transform": ImageTransform(hflip=0.0)}, "hflip=0.0"),
        ("sounds", {"clip_seconds": 0.05}, "clip_samples: None, now 200"),
        ("sounds", {"batching": "bucketed"}, "batching: padded, now bucketed"),
        ("texts", {"sequence_length": 8}, "sequence_length: 16, now 8"),
        ("texts", {"objective": "masked"}, "objective: causal, now masked"),
        ("texts", {"document_mask": False}, "document_mask: True, now False"),
        ("texts", {"test_fraction": 0.4}, "names of documents differ"),
    ],
)
def test_a_changed_setting_is_told(data, modality, settings, told):
    then = fingerprint(module(modality, data))
    assert told in "; ".join(changes(then, fingerprint(module(modality, data, **settings))))


def test_synthetic_sounds_are_known_by_their_arguments():
    prints = [
        fingerprint(AudioData(SoundEvents(num_clips=40, num_val_clips=10, seed=seed)))
        for seed in (0, 0, 1)
    ]
    assert prints[0] == prints[1] != prints[2]


def test_token_files_are_known_by_their_tokens(tmp_path):
    tokenizer = load_tokenizer("bytes")
    prints = []
    for word in ("some", "some", "what"):
        path = tmp_path / f"{len(prints)}.bin"
        documents = [Document(f"{number}", f"{word} {number}") for number in range(40)]
        write_token_file(path, documents, tokenizer)
        source = TokenFiles([str(path)])
        prints.append(fingerprint(TextData(source, sequence_length=8, batch_size=2)))
    assert prints[0] == prints[1]
    assert changes(prints[0], prints[2]) == ["contents of documents differ"]


def test_a_stream_knows_its_files(data):
    source = HuggingFaceText("text", data_files=str(data / "texts" / "*.txt"), streaming=True)
    whole = {"validation_fraction": 0.0, "test_fraction": 0.0}
    then = fingerprint(TextData(source, sequence_length=8, batch_size=2, **whole))
    longer(data / "texts" / "3.txt")
    assert "sizes of files differ" in changes(then, of_files(sorted((data / "texts").iterdir())))


def test_many_files_are_looked_into_here_and_there(tmp_path):
    paths = [tmp_path / f"{number:04}" for number in range(5 * NUM_BEGINNINGS)]
    for path in paths:
        path.write_text("same")
    then = of_files(paths)
    paths[0].write_text("Same")
    assert changes(then, of_files(paths)) == ["contents of files differ"]
    paths[0].write_text("same")
    paths[1].write_text("five!")
    assert changes(then, of_files(paths)) == ["sizes of files differ"]


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert of_files([tmp_path / "pipe.png", tmp_path / "gone.png"])["files"] == 2


def test_earlier_checkpoints_know_less(data):
    now = fingerprint(module("images", data))
    assert changes({}, now) == []
