"""COCO captions, Clotho and LibriSpeech, written by the tests as they are distributed."""

import csv
import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from datamodules import AudioTextData, ImageTextData
from datamodules.pairs import Clotho, CocoCaptions, LibriSpeech
from datamodules.pairs.audio_text import Sounds
from datamodules.pairs.image_text import Images


def write_coco(root, split, ids):
    images, annotations = [], []
    (root / split).mkdir(parents=True)
    for number in ids:
        name = f"{number:012d}.jpg"
        Image.new("RGB", (20, 16), (10 * number, 0, 0)).save(root / split / name)
        images.append({"license": 3, "file_name": name, "height": 16, "width": 20, "id": number})
        for part in range(5):
            caption = {"image_id": number, "id": 100 * part + number}
            annotations.append({**caption, "caption": f"Picture {number}, said {part}. \n"})
    images.append({"license": 3, "file_name": "none.jpg", "height": 1, "width": 1, "id": 999})
    annotations.sort(key=lambda each: each["id"])  # those of an image are not together
    (root / "annotations").mkdir(exist_ok=True)
    values = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations}
    (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(values))


def test_coco_has_five_captions_per_image(tmp_path):
    write_coco(tmp_path, "train2017", range(1, 7))
    write_coco(tmp_path, "val2017", range(11, 13))
    data = ImageTextData(CocoCaptions(str(tmp_path)), image_size=16, batch_size=3)
    data.setup()
    assert data.splits.test is data.splits.val
    assert [path.name for path in data.splits.train.media.paths] == [
        f"{number:012d}.jpg" for number in range(1, 7)
    ]
    assert data.splits.train.text(2, lambda count: count - 1) == "Picture 3, said 4."
    batches = list(data.val_dataloader())
    assert sum(len(batch["index"]) for batch in batches) == 10
    assert next(iter(data.train_dataloader()))["images"].shape == (3, 3, 16, 16)


def test_karpathys_splits(tmp_path):
    images = []
    for number, split in enumerate(("train", "restval", "val", "test", "test")):
        folder = "train2014" if split == "train" else "val2014"
        name = f"COCO_{folder}_{number:012d}.jpg"
        sentences = [{"tokens": ["a"], "raw": f"A {split}.", "imgid": number, "sentid": number}]
        images.append(
            {
                "filepath": folder,
                "sentids": [number],
                "filename": name,
                "imgid": number,
                "split": split,
                "sentences": sentences,
                "cocoid": number,
            }
        )
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    source = CocoCaptions(str(tmp_path), split_file=str(path))
    splits = source.splits(Images())
    assert list(splits.train.texts) == [["A train."], ["A restval."]]
    assert [len(pairs) for pairs in (splits.train, splits.val, splits.test)] == [2, 1, 2]
    assert splits.val.media.paths == [tmp_path / "val2014/COCO_val2014_000000000002.jpg"]
    for bad in ({"filename": "a.jpg"}, {"filename": 5}, "a.jpg", {**images[0], "filepath": 1}):
        path.write_text(json.dumps({"images": [bad]}))
        with pytest.raises(ValueError, match="dataset_coco.json is not a file of Karpathy's split"):
            source.splits(Images())


def test_faults_of_coco_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="set --data.source.root to the folder of COCO"):
        CocoCaptions(str(tmp_path / "none")).splits(Images())
    with pytest.raises(FileNotFoundError, match="captions_train2014.json does not exist"):
        CocoCaptions(str(tmp_path), year="2014").splits(Images())
    path = tmp_path / "annotations/captions_train2017.json"
    path.parent.mkdir()
    for content, message in (
        ("{", "is not a JSON file"),
        ('{"images": []}', "is not a file of COCO captions: KeyError"),
        (
            '{"images": [], "annotations": [{"image_id": 7, "caption": "a"}]}',
            "has captions of unknown images, such as 7",
        ),
        (
            '{"images": [{"id": 1, "file_name": 5}], "annotations": []}',
            "is not a file of COCO captions: .*file_name must be a text, got 5",
        ),
        (
            '{"images": [], "annotations": [{"image_id": 1, "caption": null}]}',
            "is not a file of COCO captions: .*caption must be a text, got None",
        ),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            CocoCaptions(str(tmp_path)).splits(Images())
    with pytest.raises(ValueError, match="year must be one of '2017', '2014', got '2015'"):
        CocoCaptions("root", year="2015")


@pytest.mark.parametrize("nested", [False, True])
def test_clotho(tmp_path, nested):
    for number, split in enumerate(("development", "validation", "evaluation")):
        table = tmp_path / ("clotho_csv_files" if nested else "") / f"clotho_captions_{split}.csv"
        sounds = tmp_path / ("clotho_audio_files" if nested else "") / split
        sounds.mkdir(parents=True)
        table.parent.mkdir(exist_ok=True)
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", *(f"caption_{n}" for n in range(1, 6))])
            for index in range(3 - number):
                name = f"{split} {index} (1).wav"
                soundfile.write(sounds / name, np.full(4410, 0.1 * (index + 1)), 44100)
                writer.writerow([name, *(f"A {split}, {index}{letter}." for letter in "abcde")])
    data = AudioTextData(Clotho(str(tmp_path)), sample_rate_hz=44100, batch_size=2)
    data.setup()
    splits = data.splits
    assert [len(pairs) for pairs in (splits.train, splits.val, splits.test)] == [3, 2, 1]
    assert splits.train.texts[1] == [f"A development, 1{letter}." for letter in "abcde"]
    batches = list(data.test_dataloader())
    assert [batch["waveforms"].shape for batch in batches] == [(2, 4410), (2, 4410), (1, 4410)]
    with pytest.raises(FileNotFoundError, match="clotho_captions_development.csv does not exist"):
        Clotho(str(tmp_path / "none")).splits(Sounds())


def write_libri(root, subset, chapters):
    for speaker, chapter, texts in chapters:
        folder = root / "LibriSpeech" / subset / speaker / chapter
        folder.mkdir(parents=True)
        lines = []
        for number, text in enumerate(texts):
            name = f"{speaker}-{chapter}-{number:04d}"
            soundfile.write(folder / f"{name}.flac", np.full(1600 + 100 * number, 0.1), 16000)
            lines.append(f"{name} {text}\n")
        (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))


def test_librispeech(tmp_path):
    spoken = ["CHAPTER ONE", "MISSUS RACHEL LYNDE IS SURPRISED", "IT'S"]
    write_libri(tmp_path, "train-clean-100", [("103", "1240", spoken), ("1034", "121119", ["YES"])])
    write_libri(tmp_path, "dev-clean", [("84", "121123", ["GO"])])
    write_libri(tmp_path, "test-clean", [("61", "70968", ["STOP"])])
    data = AudioTextData(LibriSpeech(str(tmp_path)), batch_size=2)
    data.prepare_data()
    data.setup()
    splits = data.splits
    assert splits.train.texts == [*([text.lower()] for text in spoken), ["yes"]]
    assert splits.train.media.paths[1].name == "103-1240-0001.flac"
    assert (splits.val.texts, splits.test.texts) == ([["go"]], [["stop"]])
    (batch,) = data.val_dataloader()
    assert batch["num_samples"].tolist() == [1600]
    source = LibriSpeech(str(tmp_path), lower_case=False)
    assert source.splits(Sounds()).val.texts == [["GO"]]
    chapter = tmp_path / "LibriSpeech/dev-clean/84/121123/84-121123.trans.txt"
    chapter.write_text("84-121123-0000\n")
    with pytest.raises(ValueError, match="trans.txt, line 1: a name and a text are needed"):
        source.splits(Sounds())
    chapter.unlink()
    with pytest.raises(ValueError, match=r"dev-clean has no transcripts"):
        source.splits(Sounds())
    with pytest.raises(
        FileNotFoundError, match="train-other-500 .* or --data.source.download true"
    ):
        LibriSpeech(str(tmp_path), train=["train-other-500"]).splits(Sounds())
    with pytest.raises(ValueError, match="train must be one of 'train-clean-100', .* got 'clean'"):
        LibriSpeech("root", train=["clean"])
    with pytest.raises(ValueError, match="subset dev-clean is used twice"):
        LibriSpeech("root", test=["dev-clean"])


def test_librispeech_is_downloaded_only_if_asked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "torchaudio.datasets.LIBRISPEECH",
        lambda root, url, download: asked.append((root, url, download)),
    )
    root = str(tmp_path / "new")
    AudioTextData(LibriSpeech(root)).prepare_data()
    other = AudioTextData(LibriSpeech(root, download=True), sample_rate_hz=8000)
    soundfile.write(tmp_path / "hum.wav", np.full(800, 0.1), 8000)
    (tmp_path / "hum.txt").write_text("hum")
    other.evaluate_on_pairs(str(tmp_path), split="val")
    other.prepare_data()
    assert asked == []
    AudioTextData(LibriSpeech(root, download=True)).prepare_data()
    subsets = ("train-clean-100", "dev-clean", "test-clean")
    assert asked == [(root, subset, True) for subset in subsets]
    assert (tmp_path / "new").is_dir()
