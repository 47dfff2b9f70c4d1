"""Pairs of the datasets library, from local parquet files as they are on the hub."""

import io
import json

import datasets
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from datamodules import AudioTextData, ImageTextData
from datamodules.pairs import HubPairs
from datamodules.pairs.audio_text import Sounds
from datamodules.pairs.image_text import Images
from datamodules.shared.bad_samples import BadSampleError, BadSamples


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(level):
    stream = io.BytesIO()
    Image.new("RGB", (12, 10), (level, level, level)).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": f"{level}.png"}


def wav(length):
    stream = io.BytesIO()
    soundfile.write(stream, np.full(length, 0.25), 8000, format="WAV")
    return {"bytes": stream.getvalue(), "path": f"{length}.wav"}


def parquet(path, media, **columns):
    feature = datasets.Image() if "image" in media else datasets.Audio()
    (name,) = media
    rows = datasets.Dataset.from_dict({**media, **columns})
    rows.cast_column(name, feature).to_parquet(path)
    return str(path)


def test_rows_are_images_with_texts(tmp_path):
    file = parquet(
        tmp_path / "a.parquet",
        {"image": [png(10 * n) for n in range(8)]},
        caption=[[f"caption {n}", f"again {n}"] for n in range(8)],
        alt=[f"alt {n}" if n % 2 else None for n in range(8)],
        author=[f"author {n // 2}" for n in range(8)],
    )
    source = HubPairs(
        "parquet",
        text_column=["caption", "alt"],
        group_column="author",
        val_fraction=0.25,
        data_files=file,
    )
    data = ImageTextData(source, image_size=8, batch_size=3)
    data.setup()
    splits = data.splits
    assert (len(splits.train), len(splits.val)) == (6, 2)
    numbers = set()
    for pairs in (splits.train, splits.val):
        for index in range(len(pairs)):
            number = pairs.media.read(index).getpixel((0, 0))[0] // 10
            numbers.add(number)
            alt = [f"alt {number}"] if number % 2 else []
            assert pairs.texts[index] == [f"caption {number}", f"again {number}", *alt]
    assert numbers == set(range(8))
    first, second = (splits.val.media.read(i).getpixel((0, 0))[0] // 10 for i in range(2))
    assert first // 2 == second // 2
    assert [len(batch["index"]) for batch in data.val_dataloader()] == [3, 2]
    loaded = [batch["images"] for batch in data.train_dataloader()]
    again = ImageTextData(source, image_size=8, batch_size=3, num_workers=1)
    again.setup()
    assert all(
        torch.equal(a, b["images"]) for a, b in zip(loaded, again.train_dataloader(), strict=True)
    )
    assert data.fingerprint() == again.fingerprint()


def test_rows_are_sounds_with_texts(tmp_path):
    files = {
        name: parquet(
            tmp_path / f"{name}.parquet",
            {"audio": [wav(400 * (n + 1)) for n in range(count)]},
            text=[f"{name} {n}" for n in range(count)],
        )
        for name, count in (("train", 4), ("val", 2), ("test", 3))
    }
    source = HubPairs("parquet", val="val", test="test", media_column="audio", data_files=files)
    data = AudioTextData(source, sample_rate_hz=8000, batch_size=2)
    data.setup()
    (batch,) = data.val_dataloader()
    assert batch["num_samples"].tolist() == [400, 800]
    assert [len(p) for p in (data.splits.train, data.splits.val, data.splits.test)] == [4, 2, 3]
    assert list(data.splits.test.texts) == [["test 0"], ["test 1"], ["test 2"]]


def test_bad_rows_are_bad_samples(tmp_path):
    images = [png(10 * n) for n in range(8)]
    images[2] = {"bytes": b"no image", "path": "2.png"}
    images[3] = {"bytes": b"", "path": "3.png"}
    images[4] = None
    texts = [f"text {n}" for n in range(8)]
    texts[5] = " "
    texts[6] = None
    rows = datasets.Dataset.from_dict({"image": images, "text": texts})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "a.parquet")
    good = parquet(tmp_path / "b.parquet", {"image": [png(1)]}, text=["one"])
    files = {"train": str(tmp_path / "a.parquet"), "val": good}
    source = HubPairs("parquet", val="val", data_files=files)

    def seen(policy):
        settings = BadSamples(policy, max_bad_fraction=0.9)
        data = ImageTextData(source, image_size=8, batch_size=4, bad_samples=settings)
        data.setup()
        return {int(i) for batch in data.train_dataloader() for i in batch["index"]}

    with pytest.raises(BadSampleError, match="parquet/train/[2-6]"):
        seen("raise")
    assert seen("substitute") <= {0, 1, 7}


def test_rows_may_be_files(tmp_path):
    for number in range(4):
        (tmp_path / "images" / f"{number}.png").parent.mkdir(exist_ok=True)
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number)["bytes"])
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"text {n}"}) for n in range(4)]
    (tmp_path / "images/metadata.jsonl").write_text("\n".join(lines))
    source = HubPairs("imagefolder", data_files=f"{tmp_path}/images/*", val_fraction=0.5)
    pairs = source.splits(Images()).train
    levels = [pairs.media.read(i).getpixel((0, 0))[0] for i in range(2)]
    assert [texts[0] for texts in pairs.texts] == [f"text {level}" for level in levels]
    (tmp_path / f"images/{levels[0]}.png").unlink()
    with pytest.raises(BadSampleError, match="cannot be read: .*png does not exist"):
        pairs.media.read(0)


def test_faults_of_datasets_are_named(tmp_path):
    file = parquet(tmp_path / "a.parquet", {"image": [png(1)] * 2}, caption=["a", "b"], n=[1, 2])
    with pytest.raises(
        ValueError, match="has no column 'captions', .*text_column; did you mean 'capt"
    ):
        HubPairs("parquet", text_column="captions", data_files=file).splits(Images())
    with pytest.raises(
        ValueError, match="column 'n' of dataset 'parquet' has no images, but Value"
    ):
        HubPairs("parquet", media_column="n", text_column="caption", data_files=file).splits(
            Images()
        )
    with pytest.raises(
        ValueError, match="column 'image' of dataset 'parquet' has no sounds, but Im"
    ):
        HubPairs("parquet", text_column="caption", data_files=file).splits(Sounds())
    with pytest.raises(ValueError, match="cannot load split 'dev' of 'parquet': ValueError: "):
        HubPairs("parquet", train="dev", text_column="caption", data_files=file).splits(Images())
    pairs = HubPairs("parquet", text_column="n", data_files=file, val_fraction=0.5).splits(Images())
    with pytest.raises(BadSampleError, match="column 'n', must be a text or a list of texts, got"):
        _ = pairs.train.texts[0]
    with pytest.raises(ValueError, match="group_column='n' holds out validation pairs, but val is"):
        HubPairs("parquet", val="val", group_column="n")
