"""Images and sounds with texts: batches, choice among several texts, splits, bad samples."""

import csv
import json
import logging
import tarfile
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from datamodules import AudioTextData, ImageTextData
from datamodules.audio import AudioReader
from datamodules.audio.sound_events import EVENTS
from datamodules.image import ImageReader
from datamodules.pairs import (
    AudioTextReader,
    ImageTextReader,
    PairFolder,
    PairTable,
    RenderedShapes,
    SynthesizedSounds,
)
from datamodules.pairs.audio_text import Sounds
from datamodules.pairs.folders import text_of_name
from datamodules.pairs.image_text import Images
from datamodules.pairs.shapes import COLORS, SHAPES
from datamodules.pairs.sources import hold_out_groups
from datamodules.pairs.synthesized import NAMES, PITCHES_HZ
from datamodules.shared.bad_samples import BadSampleError, BadSamples
from diffmm.hub.readers import make_reader
from diffmm.models.job import Job

EOS = 256


def pair_data(source, **arguments):
    settings = {"image_size": 8, "batch_size": 4, "max_tokens": 16, **arguments}
    data = ImageTextData(source, **settings)
    data.setup()
    return data


def train_batches(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def texts_of(data, batch):
    return [
        data.reader.encoder.decode(tokens[:length].tolist())
        for tokens, length in zip(batch["tokens"], batch["num_tokens"], strict=True)
    ]


def picture(path, level=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (level, level, level)).save(path)


def table(path, *rows, header=("file", "text")):
    with path.open("w", newline="") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return str(path)


@pytest.fixture
def photos(tmp_path):
    """Eight images; image i has i % 3 + 1 texts."""
    rows = []
    for number in range(8):
        picture(tmp_path / f"{number}.png", 30 * number)
        rows += [(f"{number}.png", f"text {number}{letter}") for letter in "abc"[: number % 3 + 1]]
    table(tmp_path / "all.csv", *rows)
    return tmp_path


def test_a_batch_has_the_texts_of_its_images():
    data = ImageTextData(RenderedShapes(40, 10), batch_size=8)
    data.setup()
    for loader, pairs in (
        (data.train_dataloader(), data.splits.train),
        (data.val_dataloader(), data.splits.val),
    ):
        batch = next(iter(loader))
        assert list(batch) == ["images", "tokens", "num_tokens", "media_index", "index"]
        assert batch["images"].shape == (8, 3, 32, 32)
        assert all(batch[name].dtype == torch.int64 for name in list(batch)[1:])
        longest = int(batch["num_tokens"].max())
        assert batch["tokens"].shape == (8, longest)
        is_real = torch.arange(longest) < batch["num_tokens"][:, None] - 1
        assert torch.equal(batch["tokens"] == EOS, ~is_real)
        captions = [pairs.texts[index][0] for index in batch["media_index"].tolist()]
        assert texts_of(data, batch) == captions
    assert data.fingerprint()["samples"] == 40


def test_shapes_of_held_out_combinations_are_new():
    source = RenderedShapes(400, 60)
    splits = source.splits(Images())
    held_out = set(source.held_out)
    kinds = {
        name: [
            {thing[1:] for thing in scene.things} for scene in getattr(splits, name).media.scenes
        ]
        for name in ("train", "val", "test")
    }
    assert not any(each & held_out for each in kinds["train"])
    for name in ("val", "test"):
        assert all(each & held_out for each in kinds[name])
        captions = [texts[0] for texts in getattr(splits, name).texts]
        assert len(set(captions)) == 60
    assert splits.val.texts != splits.test.texts
    known = set.union(*kinds["train"])
    assert {color for color, _ in known} == set(COLORS)
    assert {shape for _, shape in known} == set(SHAPES)
    with pytest.raises(
        ValueError, match=r"only about \d+ different .* reduce num_val_images \(500\)"
    ):
        RenderedShapes(9, 500, num_shapes=(1, 1)).splits(Images())


def test_nothing_is_held_out_of_a_fraction_of_0():
    splits = RenderedShapes(400, 60, held_out_fraction=0.0).splits(Images())
    kinds = [
        {thing[1:] for scene in pairs.media.scenes for thing in scene.things}
        for pairs in (splits.train, splits.val)
    ]
    assert len(kinds[0]) == 48
    assert kinds[1] <= kinds[0]
    assert splits.val.texts != splits.train.texts[:60]
    with pytest.raises(ValueError, match=r"held_out_fraction must be in \[0, 0.5\], got -0.1"):
        RenderedShapes(held_out_fraction=-0.1)


def test_shapes_are_where_the_caption_says():
    images = RenderedShapes(60, 4).splits(Images()).train.media
    num_checked = 0
    for index, scene in enumerate(images.scenes):
        pixels = np.asarray(images.read(index)).astype(float)
        centers, areas = [], []
        for _, color, _ in scene.things:
            rows, columns = np.nonzero(np.abs(pixels - COLORS[color]).max(-1) <= 13)
            assert len(rows) >= 15
            centers.append((columns.mean(), rows.mean()))
            areas.append(len(rows))
        colors = [color for _, color, _ in scene.things]
        if len(set(colors)) < len(colors):
            continue
        num_checked += 1
        along = [center[scene.relation == "above"] for center in centers]
        assert along == sorted(along)
        for (size, _, shape), area in zip(scene.things, areas, strict=True):
            if shape in ("circle", "square"):
                assert (area > 150) == (size == "large")
    assert num_checked > 20


def test_a_table_has_rows_and_columns_of_texts(photos):
    splits = PairTable(str(photos / "all.csv"), val_fraction=0.25).splits(Images())
    texts = {
        pairs.media.paths[i].name: list(pairs.texts[i])
        for pairs in (splits.train, splits.val)
        for i in range(len(pairs))
    }
    assert len(splits.val) == 2
    assert splits.test is splits.val
    assert texts == {
        f"{n}.png": [f"text {n}{letter}" for letter in "abc"[: n % 3 + 1]] for n in range(8)
    }
    wide = table(
        photos / "wide.tsv",
        ("0.png", "one", "two", "train"),
        ("1.png", "three", "", "dev"),
        ("1.png", "three", "four", "valid"),
        header=("image", "a", "b", "set"),
    )
    source = PairTable(wide, file_column="image", text_column=["a", "b"], split_column="set")
    splits = source.splits(Images())
    assert splits.train.texts == [["one", "two"]]
    assert splits.val.texts == [["three", "four"]]


def test_groups_of_a_table_are_held_out_together(photos):
    rows = [(f"{n}.png", f"t{n}", f"speaker {n // 2}") for n in range(8)]
    path = table(photos / "groups.csv", *rows, header=("file", "text", "speaker"))
    source = PairTable(path, group_column="speaker", val_fraction=0.5)
    splits = source.splits(Images())
    numbers = [
        sorted(int(t[0][1:]) // 2 for t in pairs.texts) for pairs in (splits.train, splits.val)
    ]
    assert set(numbers[0]).isdisjoint(numbers[1])
    assert sorted(numbers[0] + numbers[1]) == [0, 0, 1, 1, 2, 2, 3, 3]
    rows.append(("0.png", "again", "speaker 3"))
    table(photos / "groups.csv", *rows, header=("file", "text", "speaker"))
    with pytest.raises(ValueError, match="0.png is in the groups 'speaker 0' and 'speaker 3'"):
        source.splits(Images())
    rows[-1] = ("0.png", "again", " ")
    table(photos / "groups.csv", *rows, header=("file", "text", "speaker"))
    with pytest.raises(ValueError, match=f"line {len(rows) + 1}: speaker is missing, so that it"):
        source.splits(Images())


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, "bad.csv has no rows"),
        ([("0.png", "")], {}, "bad.csv, line 2: the file or the text is missing"),
        ([("0.png", "a dog", " a cat")], {}, "bad.csv, line 2 has more fields than the first line"),
        ([("0.png", "a")], {"text_column": "caption"}, "no column 'caption', only file, text"),
        ([("0.png", "a"), ("0.png", "b")], {}, r"2 pairs are in 1 group\(s\), but at least two"),
        ([("0.png", "a"), ("1.png", "val")], {"split_column": "text"}, "line 2: text must be one"),
        ([("0.png", "a")], {"val": "bad.csv"}, "1 files are in both the train and the val split"),
        ([("0.png", "a")], {"val": "x", "split_column": "text"}, "already defines the splits"),
        ([("0.png", "a")], {"val": "x", "group_column": "text"}, "'text' holds out validation"),
    ],
)
def test_bad_tables_are_named(photos, rows, changes, message, monkeypatch):
    monkeypatch.chdir(photos)
    table(photos / "bad.csv", *rows)
    with pytest.raises(ValueError, match=message):
        PairTable("bad.csv", **changes).splits(Images())


def test_every_text_is_evaluated_and_one_is_drawn_in_training(photos):
    picture(photos / "val/9.png")
    rows = [("9.png", "nine"), ("9.png", "neuf")]
    val = table(photos / "val/val.csv", *rows)
    data = pair_data(PairTable(str(photos / "all.csv"), val))
    assert not data.has_test_split
    (batch,) = data.val_dataloader()
    assert texts_of(data, batch) == ["nine", "neuf"]
    assert batch["media_index"].tolist() == [0, 0]
    assert batch["index"].tolist() == [0, 1]
    assert torch.equal(batch["images"][0], batch["images"][1])
    evaluated = list(data.as_evaluated("train"))
    assert torch.cat([b["index"] for b in evaluated]).tolist() == list(range(15))
    media = torch.cat([b["media_index"] for b in evaluated]).tolist()
    assert Counter(media) == {n: n % 3 + 1 for n in range(8)}

    def drawn(data, epoch):
        return {
            int(i): text
            for batch in train_batches(data, epoch)
            for i, text in zip(batch["index"], texts_of(data, batch), strict=True)
        }

    epochs = [drawn(data, epoch) for epoch in range(12)]
    assert all(each.keys() == set(range(8)) for each in epochs)
    for index in range(8):
        expected = {f"text {index}{letter}" for letter in "abc"[: index % 3 + 1]}
        assert {each[index] for each in epochs} == expected
    assert drawn(pair_data(data.source, num_workers=2), 5) == epochs[5]
    assert any(drawn(pair_data(data.source, seed=1), n) != epochs[n] for n in range(3))


def test_a_folder_has_text_files_or_speaking_names(tmp_path):
    for name in ("dog", "cat", "birds/goose"):
        picture(tmp_path / "train" / f"{name}.png")
        (tmp_path / "train" / f"{name}.txt").write_text(f"a {name}\n\n  the {name} \n")
    source = PairFolder(str(tmp_path / "train"), val_fraction=0.4)
    splits = source.splits(Images())
    assert (len(splits.train), len(splits.val)) == (2, 1)
    assert list(splits.val.texts) + list(splits.train.texts) == [
        [f"a {name}", f"the {name}"]
        for name in (
            f.relative_to(tmp_path / "train").with_suffix("").as_posix()
            for f in [*splits.val.media.paths, *splits.train.media.paths]
        )
    ]
    picture(tmp_path / "odd" / "1.png")
    picture(tmp_path / "odd" / "2.png")
    for name in "12":
        (tmp_path / "odd" / f"{name}.txt").write_bytes("a\u2028b\r\nc\x85d\r\n".encode())
    (texts,) = PairFolder(str(tmp_path / "odd"), val_fraction=0.5).splits(Images()).train.texts
    assert texts == ["a\u2028b", "c\x85d"]
    for name in ("flying_goose-01", "flying_goose-02", "Red__car", "007"):
        picture(tmp_path / "clips" / f"{name}.png")
    with pytest.raises(ValueError, match="4 of the 4 images in .*clips have no text file, such as"):
        PairFolder(str(tmp_path / "clips")).splits(Images())
    splits = PairFolder(str(tmp_path / "clips"), texts="names", val_fraction=0.5).splits(Images())
    found = [sorted(t[0] for t in pairs.texts) for pairs in (splits.train, splits.val)]
    assert sorted(found[0] + found[1]) == ["007", "Red car", "flying goose", "flying goose"]
    assert any(each.count("flying goose") == 2 for each in found)
    assert text_of_name(tmp_path / "3 little pigs.png") == "3 little pigs"
    with pytest.raises(FileNotFoundError, match="folder .*nowhere does not exist"):
        PairFolder(str(tmp_path / "nowhere")).splits(Images())
    (tmp_path / "clips/birds").mkdir()
    with pytest.raises(ValueError, match="birds has no images"):
        PairFolder(str(tmp_path / "clips/birds")).splits(Images())


def test_extensions_may_be_in_capitals(tmp_path):
    for name, extension in (("a.JPG", ".TXT"), ("b.png", ".Txt"), ("c.PNG", ".txt")):
        picture(tmp_path / name)
        (tmp_path / name).with_suffix(extension).write_text(name)
    (tmp_path / "c.TXT").write_text("not read: there is c.txt")
    pairs = PairFolder(str(tmp_path)).all_pairs(Images())
    assert [list(texts) for texts in pairs.texts] == [["a.JPG"], ["b.png"], ["c.PNG"]]


def test_bad_images_and_texts_are_handled_as_the_run_says(tmp_path, caplog):
    for number in range(12):
        picture(tmp_path / "train" / f"{number:02d}.png")
        (tmp_path / "train" / f"{number:02d}.txt").write_text(f"text {number}")
    picture(tmp_path / "val" / "0.png")
    (tmp_path / "val" / "0.txt").write_text("text")
    source = PairFolder(str(tmp_path / "train"), str(tmp_path / "val"))
    (tmp_path / "train/03.png").write_bytes(b"no image")
    (tmp_path / "train/05.txt").write_text("  \n")
    (tmp_path / "train/07.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(BadSampleError, match="set --data.bad_samples.policy substitute"):
        train_batches(pair_data(source))
    found = pair_data(source).examine(12)
    assert len(found.faults) == 3
    assert found.lines["train"] == "12 images with 1 text each"
    lenient = BadSamples("substitute", max_bad_fraction=0.5)
    data = pair_data(source, bad_samples=lenient)
    for loader in (data.train_dataloader(), data.as_evaluated("train")):
        caplog.clear()
        indices = torch.cat([batch["index"] for batch in loader]).tolist()
        assert len(indices) == 12
        assert not {3, 5, 7} & set(indices)
        for name in ("image 3 (", "05.txt is empty", "07.txt is not UTF-8"):
            assert name in caplog.text
    assert pair_data(source, bad_samples=lenient).examine(12).faults == []
    (fault,) = pair_data(source, bad_samples=lenient, batch_size=16).examine(12).faults
    assert fault.startswith("12 training samples do not fill one batch: batch_size is 16 on 1 ")


def test_texts_that_are_no_unicode_are_bad_samples(tmp_path, caplog):
    """Such as the name of a file in another encoding, or half of a pair in JSON."""
    for letter in "abcdefg":
        picture(tmp_path / "train" / f"dog {letter}.png")
    picture(tmp_path / "train" / "\udcff\udcfe.png")
    picture(tmp_path / "val" / "cat.png")
    source = PairFolder(str(tmp_path / "train"), str(tmp_path / "val"), texts="names")
    with pytest.raises(
        BadSampleError, match=r"train/.* has a text that is no valid Unicode: '.udc"
    ):
        train_batches(pair_data(source))
    data = pair_data(source, bad_samples=BadSamples("substitute", max_bad_fraction=0.5))
    with caplog.at_level(logging.CRITICAL):  # xdist cannot send the name of the file
        texts = [text for batch in train_batches(data) for text in texts_of(data, batch)]
    assert len(texts) == 8
    assert set(texts) <= {f"dog {letter}" for letter in "abcdefg"}


def test_texts_are_cut_and_this_is_told_once(photos, caplog):
    data = pair_data(PairTable(str(photos / "all.csv"), val_fraction=0.25), max_tokens=5)
    with caplog.at_level(logging.WARNING):
        batch = train_batches(data)[0]
        train_batches(data)
    (message,) = caplog.messages
    count = sum(map(len, data.splits.train.texts))
    assert message.startswith(
        f"{count} of {count} texts are longer than max_tokens (5) and are cut"
    )
    assert set(texts_of(data, batch)) == {"text"}
    assert (batch["tokens"][:, 4] == EOS).all()
    assert "max_tokens (5)" in data.examine(3).doubts[0]


def test_accents_may_be_written_in_two_ways():
    reader = pair_data(RenderedShapes(8, 4), max_tokens=6).reader
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for text in (composed, decomposed):
        assert reader.read_text(text)["tokens"].tolist() == [*composed.encode(), 256]
        assert not reader.is_cut(text)


def test_padding_to_a_fixed_length_gives_static_shapes():
    data = pair_data(RenderedShapes(8, 4), max_tokens=100, pad_texts=True)
    assert {batch["tokens"].shape for batch in train_batches(data)} == {(4, 100)}


def test_the_reader_prepares_new_inputs_as_evaluation_does(photos, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    inner = Tokenizer(WordLevel({"[UNK]": 0, "text": 1, "0a": 2, "</s>": 3}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.save(str(tmp_path / "words.json"))
    data = pair_data(
        PairTable(str(photos / "all.csv"), val_fraction=0.25),
        tokenizer=str(tmp_path / "words.json"),
    )
    batch = next(iter(data.as_evaluated("train")))
    described = json.loads(json.dumps(data.describe_inputs()))
    (tmp_path / "words.json").unlink()
    reader = make_reader(Job(**described), "a test")
    assert isinstance(reader, ImageTextReader)
    assert isinstance(reader, ImageReader)
    indices = batch["media_index"].tolist()
    paths = [data.splits.train.media.paths[index] for index in indices]
    texts = ["text 0a" if index == 0 else "text other" for index in indices]
    images = reader.collate([reader.read(path) for path in paths])
    assert images.keys() == {"images"}
    assert torch.equal(images["images"], batch["images"])
    tokens = reader.collate([reader.read_text(text) for text in texts])
    assert tokens.keys() == {"tokens", "num_tokens"}
    assert torch.equal(tokens["tokens"], batch["tokens"])
    both = [{**reader.read(p), **reader.read_text(t)} for p, t in zip(paths, texts, strict=True)]
    assert reader.collate(both).keys() == {"images", "tokens", "num_tokens"}
    with pytest.raises(ValueError, match="at least one token, got ''"):
        reader.read_text("")
    with pytest.raises(ValueError, match="a text must be a string, got int"):
        reader.read_text(3)


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="max_tokens must be an integer of at least 2, got 1"):
        ImageTextData(max_tokens=1)
    with pytest.raises(ValueError, match=r"num_shapes must be .* in \[1, 3\], got \(0, 2\)"):
        RenderedShapes(num_shapes=(0, 2))
    with pytest.raises(ValueError, match="texts must be one of 'files', 'names', 'folders', got"):
        PairFolder("train", texts="name")
    with pytest.raises(RuntimeError, match=r"after setup\(\)"):
        _ = ImageTextData().splits


def test_groups_are_held_out_whole_and_always_the_same():
    groups = [number // 3 for number in range(30)]
    kept, held_out = hold_out_groups(groups, 0.2)
    assert sorted(kept + held_out) == list(range(30))
    assert len(held_out) == 6
    assert {groups[i] for i in kept}.isdisjoint(groups[i] for i in held_out)
    assert hold_out_groups(groups, 0.2) == (kept, held_out)
    assert len(hold_out_groups(["a", "b"], 0.01)[1]) == 1


def test_sounds_come_with_captions_of_their_events():
    source = SynthesizedSounds(60, 30, sample_rate_hz=8000)
    data = AudioTextData(source, sample_rate_hz=8000, batch_size=6)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert list(batch) == [
        "waveforms",
        "num_samples",
        "tokens",
        "num_tokens",
        "media_index",
        "index",
    ]
    assert batch["waveforms"].shape == (6, int(batch["num_samples"].max()))
    splits = data.splits
    assert texts_of(data, batch) == [
        splits.train.texts[index][0] for index in batch["media_index"].tolist()
    ]
    held_out = {f"a {pitch} {NAMES[event]}" for pitch, event in source.held_out}
    for name, pairs in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        parts = [set(texts[0].split(", then ")) for texts in pairs.texts]
        assert all(bool(each & held_out) == (name != "train") for each in parts)
    assert len({texts[0] for texts in splits.val.texts}) == 30
    assert set(NAMES) == set(EVENTS)
    assert len(set(NAMES.values())) == len(NAMES)


def test_events_sound_in_the_order_of_the_caption():
    source = SynthesizedSounds(80, 4, sample_rate_hz=8000, snr_db=(40.0, 40.0))
    clips = source.splits(Sounds()).train.media
    num_checked = 0
    for index, scene in enumerate(clips.scenes):
        if any(event not in ("tone", "vibrato", "tremolo") for _, event in scene):
            continue
        num_checked += 1
        for (pitch, _), part in zip(
            scene, np.array_split(clips.read(index), len(scene)), strict=True
        ):
            peak_hz = np.abs(np.fft.rfft(part)).argmax() * 8000 / len(part)
            low, high = PITCHES_HZ[pitch]
            assert 0.8 * low < peak_hz < 1.25 * high
    assert num_checked > 3


@pytest.mark.parametrize("batching", ["bucketed", "fixed"])
def test_sound_files_have_texts(tmp_path, batching):
    rng = np.random.default_rng(0)
    for number in range(10):
        path = tmp_path / f"{number}.flac"
        soundfile.write(path, rng.uniform(-0.5, 0.5, 1000 + 300 * number), 8000)
        path.with_suffix(".txt").write_text(f"sound {number}")
    data = AudioTextData(
        PairFolder(str(tmp_path), val_fraction=0.2),
        sample_rate_hz=4000,
        resample=True,
        clip_seconds=0.5,
        batching=batching,
        batch_size=2,
    )
    data.setup()
    batches = train_batches(data)
    lengths = torch.cat([b["num_samples"] for b in batches]).view(-1, 2)
    if batching == "fixed":
        assert {b["waveforms"].shape[1] for b in batches} == {2000}
    else:
        assert (lengths[:, 0] - lengths[:, 1]).abs().max() <= 600
    reader = make_reader(Job(**json.loads(json.dumps(data.describe_inputs()))), "a test")
    assert isinstance(reader, AudioTextReader)
    assert isinstance(reader, AudioReader)
    (batch,) = data.val_dataloader()
    paths = data.splits.val.media.paths
    again = reader.collate([reader.read(path) for path in paths])
    assert torch.equal(again["waveforms"], batch["waveforms"])
    assert texts_of(data, batch) == [f"sound {path.stem}" for path in paths]
    with pytest.raises(
        ValueError, match="RenderedShapes has images, but AudioTextData reads sounds"
    ):
        AudioTextData(RenderedShapes())
    with pytest.raises(ValueError, match="SynthesizedSounds has sounds, but ImageTextData reads"):
        ImageTextData(SynthesizedSounds())


def own(data_class, path, source=None, inputs_may_change=True, **given):
    given["source"] = {"class_path": "x", "init_args": source or {}}
    return data_class.own_data(str(path), given, inputs_may_change=inputs_may_change)


def test_own_pairs_are_found_in_folders_and_tables(photos, tmp_path):
    found = own(ImageTextData, photos, batch_size=64)
    assert found.settings == {
        "source": {
            "class_path": "datamodules.pairs.PairTable",
            "init_args": {
                "train": str(photos / "all.csv"),
                "file_column": "file",
                "text_column": "text",
            },
        },
        "batch_size": 4,
    }
    assert found.facts == {"channels": 3}
    assert found.summary == (
        f"{photos} has 8 images with 1 to 3 texts each: 7 for training, 1 held out for validation; "
        f"color, 12 x 10 pixels"
    )
    wide = table(
        photos / "w.tsv",
        ("0.png", "a", "train"),
        ("1.png", "b", "val"),
        header=("Path", "CAPTION", "Set"),
    )
    settings = own(ImageTextData, wide, {"text_column": "gone"}).settings["source"]["init_args"]
    assert settings == {
        "train": wide,
        "file_column": "Path",
        "text_column": "CAPTION",
        "split_column": "Set",
    }
    folder = tmp_path / "files"
    for split, count in (("train", 6), ("valid", 2)):
        for number in range(count):
            path = folder / split / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.zeros(4000) + 0.1, 8000)
            path.with_suffix(".txt").write_text(f"hello {number}")
    found = own(AudioTextData, folder, {"val_fraction": 0.3, "num_clips": 3})
    assert found.settings["source"] == {
        "class_path": "datamodules.pairs.PairFolder",
        "init_args": {
            "train": str(folder / "train"),
            "val": str(folder / "valid"),
            "val_fraction": 0.3,
        },
    }
    assert found.facts == {"sample_rate_hz": 8000}
    assert found.summary.endswith("6 for training, 2 for validation; 8,000 Hz, 0.5 to 0.5 s")
    kept = own(AudioTextData, folder, inputs_may_change=False)
    assert kept.settings["resample"]
    assert kept.facts == {}


def test_own_data_without_texts_say_what_they_are(tmp_path):
    for name in ("cat/1", "cat/2", "dog/1", "dog/2", "emu/1"):
        picture(tmp_path / "classes" / f"{name}.png")
        picture(tmp_path / "flat" / f"{name.replace('/', ' ')}.png")
    with pytest.raises(
        ValueError, match=r"has images in folders \(cat, dog, emu\) but no texts: use a"
    ):
        own(ImageTextData, tmp_path / "classes")
    with pytest.raises(ValueError, match=r"has 5 images but no texts: write .*\(cat 1.txt\)"):
        own(ImageTextData, tmp_path / "flat")
    found = own(ImageTextData, tmp_path / "flat", {"texts": "names"})
    assert found.settings["source"]["init_args"]["texts"] == "names"
    with pytest.raises(ValueError, match="has no sounds .extensions of sounds: .wav"):
        own(AudioTextData, tmp_path / "flat")
    labels = table(tmp_path / "labels.csv", ("flat/cat 1.png", "cat"), header=("file", "label"))
    with pytest.raises(
        ValueError, match=r"has labels \(column 'label'\) but no texts: .* label if"
    ):
        own(ImageTextData, labels)
    for name in ("b.csv", "a.TSV"):
        table(tmp_path / "classes" / name, ("cat/1.png", "a cat"))
    with pytest.raises(ValueError, match=r"has 2 tables \(a.TSV, b.csv\): give one of them, or"):
        own(ImageTextData, tmp_path / "classes")
    same = table(tmp_path / "same.csv", *((f"classes/cat/{n}.png", "a cat") for n in (1, 2, 1, 3)))
    with pytest.raises(ValueError, match="all 2 training texts are 'a cat', from which nothing"):
        own(ImageTextData, same)
    other = table(tmp_path / "other.csv", ("flat/cat 1.png", "cat"), header=("file", "words"))
    with pytest.raises(ValueError, match="needs a column 'text' .* set --data.source.text_column"):
        own(ImageTextData, other)
    single = tmp_path / "flat/cat 1.png"
    with pytest.raises(
        ValueError, match="cat 1.png is a single file: use a folder of files with a"
    ):
        own(ImageTextData, single)


def test_other_pairs_are_evaluated_whole_or_by_split(photos, tmp_path):
    data = ImageTextData(RenderedShapes(8, 4), image_size=8)
    assert data.evaluate_on_pairs(str(photos), split="val") == (
        f"{photos} has 8 images with 1 to 3 texts each"
    )
    data.setup()
    (batch,) = data.val_dataloader()
    assert batch["index"].tolist() == list(range(15))
    assert texts_of(data, batch)[:3] == ["text 0a", "text 1a", "text 1b"]
    rows = [(f"{n}.png", f"t{n}", ("train", "val", "test", "test")[n]) for n in range(4)]
    path = table(photos / "splits.csv", *rows, header=("file", "text", "split"))
    data.evaluate_on_pairs(path, split="test")
    assert [texts_of(data, batch) for batch in data.test_dataloader()] == [["t2", "t3"]]
    folder = tmp_path / "folder"
    for split in ("train", "val"):
        picture(folder / split / "1.png")
        (folder / split / "1.txt").write_text(split)
    data.evaluate_on_pairs(str(folder), split="val")
    assert [texts_of(data, batch) for batch in data.val_dataloader()] == [["val"]]
    with pytest.raises(ValueError, match="has other splits, but no test: give the folder"):
        data.evaluate_on_pairs(str(folder), split="test")
    data.evaluate_on_pairs(str(folder / "train"), split="test")
    assert len(data.splits.test) == 1
    data = pair_data(PairFolder(str(folder / "train"), str(folder / "val")))
    summary = data.evaluate_on_pairs(str(folder / "train"), split="val")
    assert summary.endswith("1 text; the run was trained on them")
    assert "trained" not in data.evaluate_on_pairs(str(folder / "val"), split="val")
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    soundfile.write(sounds / "1.wav", np.full(800, 0.1), 8000)
    (sounds / "1.txt").write_text("hum")
    audio = AudioTextData(sample_rate_hz=16000)
    audio.evaluate_on_pairs(str(sounds), split="val")
    assert next(iter(audio.val_dataloader()))["num_samples"].tolist() == [1600]


def test_other_pairs_have_their_texts_where_those_of_the_run_are(photos, tmp_path):
    for name in ("old/red_car.png", "old/cat.png", "new/blue_car-2.png"):
        picture(tmp_path / name)
    source = PairFolder(str(tmp_path / "old"), texts="names", template="a {}")
    data = pair_data(source)
    data.evaluate_on_pairs(str(tmp_path / "new"), split="val")
    assert [texts_of(data, batch) for batch in data.val_dataloader()] == [["a blue car"]]
    rows = [(f"{n}.png", "a", f"b{n}") for n in range(2)]
    path = table(photos / "two.csv", *rows, header=("file", "text", "alt"))
    data = pair_data(PairTable(path, text_column=["alt"]))
    data.evaluate_on_pairs(path, split="val")
    assert [texts_of(data, batch) for batch in data.val_dataloader()] == [["b0", "b1"]]


def test_texts_may_have_a_token_at_their_beginning(photos):
    source = PairTable(str(photos / "all.csv"), val_fraction=0.25)
    data = pair_data(source, start_ids=[7], max_tokens=6)
    batch = next(iter(data.as_evaluated("train")))
    assert (batch["tokens"][:, 0] == 7).all()
    assert batch["tokens"][0].tolist() == [7, *b"text", EOS]
    described = json.loads(json.dumps(data.describe_inputs()))
    reader = make_reader(Job(**described), "a test")
    assert reader.read_text("a")["tokens"].tolist() == [7, *b"a", EOS]
    with pytest.raises(ValueError, match="max_tokens must be an integer of at least 3, got 2"):
        ImageTextData(start_ids=[7], max_tokens=2)
    with pytest.raises(ValueError, match="start_ids must be a list of integers"):
        ImageTextReader(**{**reader.describe()["init_args"], "start_ids": ["a"]})


def test_names_of_folders_are_texts_of_classes(tmp_path):
    for name in ("golden_retriever/1", "golden_retriever/2", "tabby cat/1", "tabby cat/2"):
        picture(tmp_path / "classes" / f"{name}.png")
    source = PairFolder(
        str(tmp_path / "classes"), texts="folders", template="a photo of a {}.", val_fraction=0.25
    )
    splits = source.splits(Images())
    assert sorted(text for texts in (*splits.train.texts, *splits.val.texts) for text in texts) == [
        *["a photo of a golden retriever."] * 2,
        *["a photo of a tabby cat."] * 2,
    ]
    picture(tmp_path / "classes/loose.png")
    with pytest.raises(ValueError, match="1 images in .* are in no folder .* such as loose.png"):
        source.splits(Images())
    for arguments in ({"texts": "names", "template": "a photo"}, {"template": "a {}"}):
        with pytest.raises(ValueError, match="template must contain {} and needs texts 'names' or"):
            PairFolder("train", **arguments)


def test_own_shards_and_groups_are_found(photos):
    rows = [(f"{n}.png", f"t{n}", f"g{n // 2}") for n in range(8)]
    (photos / "groups").mkdir()
    path = table(photos / "groups/a.csv", *rows, header=("file", "text", "by"))
    arguments = {"group_column": "by", "media_folder": str(photos), "folder": "elsewhere"}
    found = own(ImageTextData, path, {**arguments, "text_column": "gone"})
    assert found.settings["source"]["init_args"] == {
        "media_folder": str(photos),
        "train": path,
        "file_column": "file",
        "text_column": "text",
        "group_column": "by",
    }
    assert "6 for training, 2 held out" in found.summary
    shards = photos / "shards"
    shards.mkdir()
    with tarfile.open(shards / "0.tar", "w") as archive:
        for number in range(4):
            (photos / f"{number}.txt").write_text(f"text {number}")
            for extension in ("png", "txt"):
                archive.add(photos / f"{number}.{extension}", f"{number}.{extension}")
    found = own(ImageTextData, shards, {"texts": "names", "val_fraction": 0.5})
    assert found.settings["source"] == {
        "class_path": "datamodules.pairs.WebDatasetPairs",
        "init_args": {"val_fraction": 0.5, "train": str(shards)},
    }
    data = ImageTextData(image_size=8)
    assert data.evaluate_on_pairs(str(shards), split="val").endswith(
        "has 4 images with 1 text each"
    )
