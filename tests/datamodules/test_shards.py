"""WebDataset shards: any kind of tar, exact order, and nothing but media and texts is read."""

import io
import json
import logging
import pickle
import tarfile

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from datamodules import AudioTextData, ImageTextData
from datamodules.pairs import WebDatasetPairs
from datamodules.pairs.audio_text import Sounds
from datamodules.pairs.image_text import Images
from datamodules.pairs.shards import indexed, list_shards
from datamodules.shared.bad_samples import BadSampleError, BadSamples


def jpeg(level):
    stream = io.BytesIO()
    Image.new("RGB", (12, 10), (level, level, level)).save(stream, "PNG")
    return stream.getvalue()


def flac(length):
    stream = io.BytesIO()
    soundfile.write(stream, np.full(length, 0.25), 8000, format="FLAC")
    return stream.getvalue()


def write_shard(path, members, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def img2dataset(first, count, folder=""):
    """The members of a shard: image, metadata and caption of each sample."""
    for number in range(first, first + count):
        yield f"{folder}{number:09d}.jpg", jpeg(number)
        values = {"caption": f"caption {number}", "url": "https://x", "status": "success"}
        yield f"{folder}{number:09d}.json", json.dumps(values).encode()
        yield f"{folder}{number:09d}.txt", f"caption {number}".encode()


@pytest.fixture
def shards(tmp_path):
    for number, count in enumerate((6, 1, 5)):
        write_shard(tmp_path / f"{number:05d}.tar", img2dataset(10 * number, count))
    return tmp_path


NUMBERS = [0, 1, 2, 3, 4, 5, 10, 20, 21, 22, 23, 24]


def captions(pairs):
    return [texts[0] for texts in pairs.texts]


def test_samples_are_in_the_order_of_shards(shards):
    data = ImageTextData(
        WebDatasetPairs(f"{shards}/0000{{0..1}}.tar", str(shards / "00002.tar")),
        image_size=8,
        batch_size=3,
        bad_samples=BadSamples("quarantine", quarantine_file=str(shards / "bad.txt")),
    )
    data.setup()
    assert captions(data.splits.train) == [f"caption {n}" for n in NUMBERS[:7]]
    assert captions(data.splits.val) == [f"caption {n}" for n in NUMBERS[7:]]
    images = data.splits.train.media
    assert [images.read(i).getpixel((0, 0))[0] for i in range(7)] == NUMBERS[:7]
    batches = list(data.val_dataloader())
    assert torch.cat([batch["media_index"] for batch in batches]).tolist() == [0, 1, 2, 3, 4]
    loader = data.train_dataloader()
    seen = [batch["index"].tolist() for batch in loader]
    resumed = data.train_dataloader()
    resumed.sampler.load_state_dict(loader.sampler.state_dict(3))
    assert [batch["index"].tolist() for batch in resumed] == seen[1:]
    assert data.examine(3).faults == []


def test_a_held_out_fraction_spans_shards(shards):
    source = WebDatasetPairs(str(shards), val_fraction=0.25)
    splits = source.splits(Images())
    assert len(splits.val) == 3
    found = sorted(captions(splits.train) + captions(splits.val))
    assert found == sorted(f"caption {n}" for n in NUMBERS)
    levels = [splits.val.media.read(i).getpixel((0, 0))[0] for i in range(3)]
    assert [f"caption {level}" for level in levels] == captions(splits.val)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_names_may_be_long_and_in_folders(tmp_path, format):
    folder = "a/" * 10 + "ü" * 30 + "/" + ("b" * 60 + "/") * 2
    folder = folder if format != tarfile.USTAR_FORMAT else "a/" * 40 + "b" * 60 + "/"
    write_shard(tmp_path / "0.tar", img2dataset(3, 4, folder), format)
    splits = WebDatasetPairs(str(tmp_path / "0.tar"), val_fraction=0.5).splits(Images())
    pairs = splits.train
    levels = [pairs.media.read(i).getpixel((0, 0))[0] for i in range(2)]
    assert captions(pairs) == [f"caption {level}" for level in levels]
    assert f"{folder}00000000" in pairs.media.describe(0)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


def test_other_members_are_never_read(tmp_path, caplog):
    members = [
        ("._0.jpg", b"junk"),
        ("0.jpg", jpeg(1)),
        ("0.pkl", pickle.dumps(Bomb())),
        ("0.pyd", pickle.dumps(Bomb())),
        ("0.seg.png", b"no image"),
        ("0.txt", b" a\n cat \n"),
        ("1.jpg", jpeg(2)),
        ("2.txt", b"no image"),
        ("3.PNG", jpeg(3)),
        ("3.txt", "\ufeffein Käse".encode()),
        ("README", b""),
    ]
    write_shard(tmp_path / "0.tar", members)
    with caplog.at_level(logging.WARNING):
        splits = WebDatasetPairs(str(tmp_path), val_fraction=0.5).splits(Images())
    assert sorted(captions(splits.train) + captions(splits.val)) == ["a cat", "ein Käse"]
    (message,) = caplog.messages
    assert message.startswith("2 samples of the shards are left out")


def test_sounds_with_texts_in_json(tmp_path):
    members = []
    for number in range(6):
        members.append((f"{number}.json", json.dumps({"text": [f"a {number}", "b"]}).encode()))
        members.append((f"{number}.flac", flac(800 + 80 * number)))
    write_shard(tmp_path / "0.tar", members)
    data = AudioTextData(
        WebDatasetPairs(str(tmp_path), text_field="text", val_fraction=0.3),
        sample_rate_hz=8000,
        batching="bucketed",
        batch_size=2,
    )
    data.setup()
    batch = next(iter(data.val_dataloader()))
    assert batch["media_index"].tolist() == [0, 0]
    assert data.splits.val.texts[0][1] == "b"
    assert len(list(data.train_dataloader())) == 2
    write_shard(tmp_path / "0.tar", [("0.wav", b"no sound"), ("0.json", b'{"text": "a"}')])
    with pytest.raises(
        ValueError, match=r"and texts \(.txt\), but with .json: set --data.source.t"
    ):
        WebDatasetPairs(str(tmp_path)).all_pairs(Sounds())
    (tmp_path / "1").mkdir()
    write_shard(tmp_path / "1/0.tar", [("0.wav", b"no sound"), ("0.txt", b"a")])
    with pytest.raises(ValueError, match=r"\(.json\), but with .txt: leave out text_field \('a'\)"):
        WebDatasetPairs(str(tmp_path / "1"), text_field="a").all_pairs(Sounds())
    media = WebDatasetPairs(str(tmp_path), text_field="text").all_pairs(Sounds()).media
    with pytest.raises(BadSampleError, match=r"0.wav\) is not a readable sound file: Format not"):
        media.read(0)


def test_damaged_samples_are_bad_samples(tmp_path):
    members = dict(img2dataset(0, 8))
    members["000000002.jpg"] = b"no image"
    members["000000004.txt"] = b"\xff\xfe"
    members["000000005.txt"] = b"  "
    write_shard(tmp_path / "0.tar", members.items())
    write_shard(tmp_path / "1.tar", img2dataset(0, 2))
    source = WebDatasetPairs(str(tmp_path / "0.tar"), str(tmp_path / "1.tar"))
    quarantine = tmp_path / "bad.txt"

    def seen(policy, **more):
        settings = BadSamples(policy, max_bad_fraction=0.5, **more)
        data = ImageTextData(source, image_size=8, batch_size=4, bad_samples=settings)
        data.setup()
        return {int(i) for batch in data.train_dataloader() for i in batch["index"]}

    with pytest.raises(BadSampleError, match=r"0.tar/00000000[245]\."):
        seen("raise")
    assert not seen("substitute") & {2, 4, 5}
    assert not seen("quarantine", quarantine_file=str(quarantine)) & {2, 4, 5}
    assert set(quarantine.read_text().split()) == {
        f"{tmp_path}/0.tar/00000000{number}.jpg" for number in (2, 4, 5)
    }
    before = quarantine.read_text()
    assert not seen("quarantine", quarantine_file=str(quarantine)) & {2, 4, 5}
    assert quarantine.read_text() == before


def test_damaged_shards_are_named(shards):
    whole = (shards / "00000.tar").read_bytes()
    start = whole.index(b"000000003.jpg")
    for name, content, message in (
        (
            "bad.tar",
            whole[:start] + b"?" + whole[start + 1 :],
            f"bad.tar is damaged at byte {start:,}",
        ),
        ("cut.tar", whole[:1700], "cut.tar is incomplete: it ends in 000000000.jpg|cut.tar is not"),
        ("x.tar", b"no tar" * 200, "x.tar is not an uncompressed tar archive"),
    ):
        (shards / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            WebDatasetPairs(str(shards / name)).splits(Images())
    with tarfile.open(shards / "packed.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(ValueError, match="packed.tar is not an uncompressed tar archive"):
        WebDatasetPairs(str(shards / "packed.tar")).splits(Images())
    with tarfile.open(shards / "sparse.tar", "w") as archive:
        info = tarfile.TarInfo("1.jpg")
        info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "0"}
        archive.addfile(info)
    with pytest.raises(ValueError, match="1.jpg of shard .*sparse.tar is a sparse file: copy it"):
        WebDatasetPairs(str(shards / "sparse.tar")).splits(Images())
    write_shard(shards / "twice.tar", [*img2dataset(1, 1), ("000000001.png", jpeg(2))])
    with pytest.raises(ValueError, match="sample 000000001 of shard .*twice.tar has two members"):
        WebDatasetPairs(str(shards / "twice.tar")).splits(Images())
    write_shard(shards / "none.tar", [("1.txt", b"a"), ("1.wav", b"")])
    with pytest.raises(ValueError, match="none.tar have no samples with images .*and texts .*txt"):
        WebDatasetPairs(str(shards / "none.tar")).splits(Images())
    with pytest.raises(ValueError, match=r"shard .*00001.tar is in both train and val"):
        WebDatasetPairs(f"{shards}/0000{{0..1}}.tar", f"{shards}/00001.tar").splits(Images())


@pytest.mark.parametrize("url", ["https://x/{0..9}.tar", "s3://bucket/0.tar", "pipe:cat a.tar"])
def test_shards_must_be_local(url):
    with pytest.raises(ValueError, match="shards must be local files, .* download them first"):
        list_shards(url, "train")


def test_shards_are_found(shards):
    names = ["00000.tar", "00001.tar", "00002.tar"]
    for pattern in (str(shards), f"{shards}/*.tar", f"{shards}/{{00000..00002}}.tar"):
        assert [path.name for path in list_shards(pattern, "train")] == names
    with pytest.raises(FileNotFoundError, match="shard .*00003.tar does not exist"):
        list_shards(f"{shards}/{{00002..00003}}.tar", "train")
    with pytest.raises(FileNotFoundError, match=r"val: no shards .* are in .*x\*.tar"):
        list_shards(f"{shards}/x*.tar", "val")


def test_indices_are_cached_until_a_shard_changes(shards, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    path = shards / "00000.tar"
    first = indexed(path, (".jpg",), ".txt", str(cache))
    with monkeypatch.context() as patched:
        patched.setattr("tarfile.open", lambda **_: pytest.fail("it was read again"))
        again = indexed(path, (".jpg",), ".txt", str(cache))
    assert np.array_equal(first.media, again.media)
    assert np.array_equal(first.texts, again.texts)
    assert len(list(cache.iterdir())) == 1
    write_shard(path, img2dataset(0, 9))
    assert len(indexed(path, (".jpg",), ".txt", str(cache)).media) == 9
    for file in cache.iterdir():
        file.write_bytes(b"junk")
    with pytest.raises(ValueError, match="npz, the index of .*00000.tar, is damaged: delete it"):
        indexed(path, (".jpg",), ".txt", str(cache))
