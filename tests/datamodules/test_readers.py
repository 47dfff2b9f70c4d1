"""Readers: inputs of a model in evaluation, from files and from objects in memory."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from datamodules import AudioData, ImageData, TextData
from datamodules.audio import AudioReader, SoundFolder
from datamodules.image import ImageFolder, ImageReader, ImageTransform
from datamodules.shared import files
from datamodules.shared.files import list_files, walk_files
from datamodules.text import TextReader
from diffmm.checks import DataError
from diffmm.models.tokenizer_files import byte_definition, tokenizer_files

RATE_HZ = 8000


def again(reader):
    """A reader created from its description in a checkpoint."""
    described = json.loads(json.dumps(reader.describe()))
    assert described["class_path"] == type(reader).class_path
    made = type(reader)(**described["init_args"])
    assert made == reader or isinstance(reader, TextReader)
    return made


@pytest.fixture
def photos(tmp_path):
    """Folders of two classes, with images of several sizes and kinds."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, (name, mode) in enumerate(
            [("a/1.png", "L"), ("a/2.jpg", "RGB"), ("b/3.png", "RGBA"), ("b/4.png", "P")]
        ):
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (20 + 9 * number, 50, 3), np.uint8)
            Image.fromarray(pixels).convert(mode).save(path)
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "transform", [None, ImageTransform(interpolation="random", crop_pct=0.8, crop_mode="squash")]
)
def test_pictures_are_read_as_in_evaluation(photos, channels, transform):
    source = ImageFolder(str(photos / "train"), str(photos / "val"), max_pixels=5000)
    data = ImageData(source, image_size=(24, 16), channels=channels, transform=transform)
    data.setup()
    inputs = data.describe_inputs()
    assert inputs["class_names"] == ["a", "b"]
    assert inputs["reader"]["init_args"]["max_pixels"] == 5000
    reader = again(data.evaluation_reader)
    (batch,) = data.val_dataloader()
    paths = list(reader.files(photos / "val"))
    read = reader.collate([reader.read(path) for path in paths])
    assert read.keys() == {"images"}
    assert read["images"].equal(batch["images"])
    assert read["images"].shape == (4, channels, 24, 16)
    in_memory = [reader.read(Image.open(path))["images"] for path in paths]
    assert torch.stack(in_memory).equal(batch["images"])


def test_a_picture_in_memory_is_turned_and_bounded_as_a_file(tmp_path):
    reader = ImageData(image_size=8, channels=1).evaluation_reader
    upright = np.zeros((20, 20), np.uint8)
    upright[:10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated
    picture = Image.fromarray(np.rot90(upright)).convert("RGB")
    picture.save(tmp_path / "turned.png", exif=exif)
    of_file = reader.read(tmp_path / "turned.png")["images"]
    assert of_file.equal(reader.read(Image.open(tmp_path / "turned.png"))["images"])
    assert of_file.equal(reader.read(upright)["images"])
    small = ImageReader(**{**again(reader).describe()["init_args"], "max_pixels": 399})
    with pytest.raises(DataError, match=r"^an image has 20 x 20 pixels, which exceeds max_pixels"):
        small.read(picture)
    with pytest.raises(DataError, match="turned.png has 20 x 20 pixels, which exceeds max_pixels"):
        small.read(tmp_path / "turned.png")


@pytest.fixture
def sounds(tmp_path):
    """Sounds of two classes and several lengths, in two folders."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, name in enumerate(("a/1.wav", "a/2.wav", "b/3.wav", "b/4.wav")):
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            waveform = rng.uniform(-1, 1, (1000 + 900 * number, 2))
            soundfile.write(path, waveform, RATE_HZ, subtype="FLOAT")
    return tmp_path


@pytest.mark.parametrize(
    ("eval_crop", "batching"),
    [("start", "padded"), ("center", "padded"), ("full", "padded"), ("center", "fixed")],
)
def test_sounds_are_read_as_in_evaluation(sounds, eval_crop, batching):
    source = SoundFolder(str(sounds / "train"), val=str(sounds / "val"))
    settings = {"clip_seconds": 0.25, "eval_crop": eval_crop, "batching": batching}
    data = AudioData(source, sample_rate_hz=RATE_HZ, **settings)
    data.setup()
    reader = again(data.evaluation_reader)
    (batch,) = data.val_dataloader()
    paths = list(reader.files(sounds / "val"))
    read = reader.collate([reader.read(str(path)) for path in paths])
    assert read.keys() == {"waveforms", "num_samples"}
    for name, tensor in read.items():
        assert tensor.equal(batch[name])
    waveforms = [soundfile.read(path, dtype="float32")[0].T for path in paths]
    in_memory = reader.collate([reader.read((w, RATE_HZ)) for w in waveforms])
    assert in_memory["waveforms"].equal(read["waveforms"])


@pytest.mark.parametrize("channels", [1, 2, 6, 32])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_a_waveform_may_have_the_channels_first_or_last(channels, kind, tmp_path):
    path = tmp_path / "a.wav"
    waveform = np.random.default_rng(0).uniform(-0.9, 0.9, (400, channels))
    soundfile.write(path, waveform, RATE_HZ, subtype="FLOAT")
    reader = AudioReader(sample_rate_hz=RATE_HZ)
    expected = reader.read(path)["waveforms"]
    samples, rate_hz = soundfile.read(path, always_2d=True)
    assert samples.shape == (400, channels)
    for array in (samples, samples.T):
        read = reader.read((kind(array), rate_hz))["waveforms"]
        np.testing.assert_allclose(read, expected, atol=1e-6)


def test_a_sound_of_another_rate_is_converted_though_training_refuses_it(sounds):
    data = AudioData(SoundFolder(str(sounds / "train")), sample_rate_hz=4000)
    assert not data.resample
    read = data.evaluation_reader.read(sounds / "train/a/1.wav")
    assert read["num_samples"] == 500


def test_a_datamodule_without_a_reader_says_so():
    class Own(ImageData):
        evaluation_reader = None

    data = Own(image_size=8, channels=1)
    data.setup()
    assert data.describe_inputs() == {"reader": None, "class_names": [str(n) for n in range(10)]}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (np.zeros(8), "a sound must be a path or a pair (waveform, sample_rate_hz)"),
        ((np.zeros(8), 0), "sample_rate_hz must be an integer of at least 1, got 0"),
        ((np.zeros(8), 8e3), "sample_rate_hz must be an integer"),
        ((np.zeros(8, np.int16), 8000), "must be floats [S], [S, C] or [C, S]"),
        ((np.zeros((2, 3, 4)), 8000), "got (2, 3, 4) in float64"),
        ((np.zeros((2, 2)), 8000), "a waveform [2, 2] is too short to tell its samples from"),
        ((np.zeros((32, 1)), 8000), "a waveform [32, 1] is too short"),
        ((np.zeros((90, 33)), 8000), "would have 33 channels, but at most 32 are read"),
        ((np.zeros(0), 8000), "with at least one sample"),
        ((torch.full((8,), torch.nan), 8000), "a waveform has samples that are not finite"),
        ((np.full(8, np.inf), 8000), "a waveform has samples that are not finite"),
        ((np.full(8, 3e4), 8000), "samples up to 30000, but full scale is 1"),
        ("nowhere.wav", "nowhere.wav does not exist"),
    ],
)
def test_what_is_no_sound_is_refused(item, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        AudioReader(sample_rate_hz=8000).read(item)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_rate_hz": 0}, "sample_rate_hz must be an integer of at least 1, got 0"),
        ({"clip_samples": 0.5}, "clip_samples must be an integer of at least 1, got 0.5"),
        ({"crop": "centre"}, "crop must be one of .*did you mean 'center'"),
        ({"pad": True}, "pad needs clip_samples"),
    ],
)
def test_sound_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        AudioReader(**{"sample_rate_hz": 8000, **settings})


@pytest.fixture
def tokenizer_file(tmp_path):
    inner = Tokenizer(WordLevel({"[UNK]": 0, "one": 1, "two": 2, "</s>": 3}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_tokenizer_travels_whole(tokenizer_file):
    data = TextData(tokenizer=str(tokenizer_file))
    fingerprint = data.tokenizer.fingerprint
    described = data.describe_inputs()
    tokenizer_file.unlink()
    reader = TextReader(**described["reader"]["init_args"])
    assert reader.encoder.fingerprint == fingerprint
    assert reader.read("two one two")["tokens"].tolist() == [2, 1, 2]
    assert reader.describe() == described["reader"]
    with pytest.raises(FileNotFoundError):
        _ = TextReader(tokenizer=str(tokenizer_file)).encoder


def test_the_tokens_that_end_an_answer_travel(tmp_path):
    inner = Tokenizer.from_str(byte_definition())
    inner.add_special_tokens(["<|im_end|>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    name, end = str(tmp_path / "tokenizer.json"), inner.token_to_id("<|im_end|>")
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    described = TextReader(tokenizer=name, chat_template=template).describe()
    assert described["init_args"]["stop_ids"] == [end, 256]
    assert TextReader(**described["init_args"]).describe() == described
    _, ids = tokenizer_files({"reader": described}, max_length=8)
    assert ids == {"eos_token_id": [end, 256], "pad_token_id": 258}
    plain = TextReader(tokenizer=name).describe()
    assert plain["init_args"]["stop_ids"] == []
    assert tokenizer_files({"reader": plain}, max_length=8).ids["eos_token_id"] == 256
    refusing = "{{ raise_exception('no system message') }}"
    with pytest.raises(ValueError, match="unknown what ends an answer: .* no system message"):
        TextReader(tokenizer=name, chat_template=refusing).describe()


def test_prompts_are_text_or_files_of_it(tmp_path):
    reader = TextReader(tokenizer="bytes")
    (tmp_path / "prompt.txt").write_text("ab")
    short, long = reader.read(tmp_path / "prompt.txt"), reader.read("abcd")
    batch = reader.collate([short, long])
    assert batch["tokens"].tolist() == [[256, 256, 97, 98], [97, 98, 99, 100]]
    assert batch["key_padding"].tolist() == [[False, False, True, True], [True] * 4]
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    for item, message in (
        ("", "the prompt is empty: it needs at least one character"),
        (3, "a prompt must be a string or a Path, got int"),
        (tmp_path / "nowhere.txt", "text .*nowhere.txt does not exist"),
        (tmp_path / "binary.txt", "binary.txt is not UTF-8"),
    ):
        with pytest.raises(ValueError, match=message):
            reader.read(item)
    with pytest.raises(ValueError, match=r"stop_ids must be a list of integers, got \['a'\]"):
        TextReader(tokenizer="bytes", stop_ids=["a"])
    for settings in ({"tokenizer": 3}, {"tokenizer": "bytes", "definition": 3}):
        with pytest.raises(ValueError, match="must be a string, got 3"):
            TextReader(**settings)
    with pytest.raises(ValueError, match="the definition of tokenizer 'mine' is invalid"):
        _ = TextReader(tokenizer="mine", definition="{}").encoder


@pytest.fixture
def tree(tmp_path):
    for name in (
        "b.png",
        "a.PNG",
        "c.txt",
        "d/e.png",
        "d/f/g.png",
        ".hidden/h.png",
        "z.png",
        ".i.png",
    ):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "tree/d/around").symlink_to(tmp_path / "tree")
    return tmp_path / "tree"


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_a_folder_is_walked_in_order(tree, at_once, monkeypatch):
    monkeypatch.setattr(files, "_AT_ONCE", at_once)
    walked = [path.relative_to(tree).as_posix() for path in walk_files(tree, (".png",))]
    assert walked == ["a.PNG", "b.png", "d/e.png", "d/f/g.png", "z.png"]
    assert sorted(map(Path, map(tree.joinpath, walked))) == sorted(list_files(tree, (".png",)))


def test_a_folder_is_walked_as_files_are_taken(tree, monkeypatch):
    """Only a few names are kept in memory, and later folders are not listed in advance."""
    looked_into, scandir = [], os.scandir
    monkeypatch.setattr(files, "_AT_ONCE", 2)
    monkeypatch.setattr(
        "os.scandir", lambda folder: looked_into.append(Path(folder).name) or scandir(folder)
    )
    walk = walk_files(tree, (".png",))
    assert looked_into == []
    assert next(walk).name == "a.PNG"
    assert next(walk).name == "b.png"
    assert looked_into == ["tree"]
    assert next(walk).name == "e.png"
    assert looked_into == ["tree", "tree", "d"]
