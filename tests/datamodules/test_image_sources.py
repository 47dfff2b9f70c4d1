"""Sources of images, with small folders in the formats of the data sets."""

import hashlib
import pickle

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from datamodules.image.sources import CIFAR10, CIFAR100, Digits, ImageFolder, ImageTable


def test_digits_are_split_evenly_and_always_alike():
    splits = Digits().splits()
    assert splits.class_names == list("0123456789")
    assert (len(splits.train.labels), len(splits.val.labels)) == (1438, 359)
    counts = np.bincount([label for (label,) in splits.val.labels])
    assert counts.min() >= 34
    assert counts.max() <= 37
    assert splits.train.read(0).size == (8, 8)
    assert splits.train.read(0).mode == "L"
    again = Digits().splits()
    assert np.array_equal(splits.val.pixels, again.val.pixels)
    unique = {image.tobytes() for image in (*splits.train.pixels, *splits.val.pixels)}
    assert len(unique) > 1780, "no image is in both, but for the few that occur twice"
    with pytest.raises(ValueError, match="between 0 and 1, got 0"):
        Digits(val_fraction=0.0).splits()


def cifar_images(number, num_images):
    """`[N, 32, 32, 3]` uint8."""
    return np.random.default_rng(number).integers(0, 256, (num_images, 32, 32, 3), np.uint8)


def write_cifar(monkeypatch, dataset, root, names, labels_key, num_classes):
    """The files of `dataset` with a few images, with matching expected checksums."""
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)

    def write(file_name, content):
        payload = pickle.dumps(content, protocol=2)
        (folder / file_name).write_bytes(payload)
        return hashlib.md5(payload).hexdigest()

    lists = {}
    for attribute in ("train_list", "test_list"):
        lists[attribute] = []
        for file_name, _ in getattr(dataset, attribute):
            pixels = cifar_images(len(file_name) + sum(file_name.encode()), 20)
            content = {
                "batch_label": file_name,
                "data": pixels.transpose(0, 3, 1, 2).reshape(20, 3072),
                labels_key: [i % num_classes for i in range(20)],
                "filenames": [f"{i}.png" for i in range(20)],
            }
            lists[attribute].append([file_name, write(file_name, content)])
        monkeypatch.setattr(dataset, attribute, lists[attribute])
    meta = {**dataset.meta, "md5": write(dataset.meta["filename"], {dataset.meta["key"]: names})}
    monkeypatch.setattr(dataset, "meta", meta)
    return folder


def test_cifar10_as_torchvision_keeps_it(monkeypatch, tmp_path):
    names = [f"thing {i}" for i in range(10)]
    folder = write_cifar(monkeypatch, datasets.CIFAR10, tmp_path, names, "labels", 10)
    source = CIFAR10(str(tmp_path), download=True)
    source.prepare()  # it exists already, so nothing is downloaded
    splits = source.splits()
    assert splits.class_names == names
    assert [len(s.labels) for s in (splits.train, splits.val, splits.test)] == [100, 20, 20]
    assert splits.val is splits.test
    expected = cifar_images(len("data_batch_2") + sum(b"data_batch_2"), 20)
    assert np.array_equal(np.asarray(splits.train.read(23)), expected[3])
    assert splits.train.labels[23] == (3,)

    held_out = CIFAR10(str(tmp_path), val_fraction=0.2).splits()
    assert [len(s.labels) for s in (held_out.train, held_out.val, held_out.test)] == [80, 20, 20]
    assert not np.array_equal(held_out.val.pixels, held_out.test.pixels)

    (folder / "data_batch_3").write_bytes(b"half a download")
    with pytest.raises(ValueError, match="cifar-10-batches-py is incomplete or damaged: delete"):
        source.splits()


def test_cifar100_has_fine_labels(monkeypatch, tmp_path):
    names = [f"thing {i}" for i in range(100)]
    write_cifar(monkeypatch, datasets.CIFAR100, tmp_path, names, "fine_labels", 100)
    splits = CIFAR100(str(tmp_path)).splits()
    assert splits.class_names == names
    assert [len(s.labels) for s in (splits.train, splits.test)] == [20, 20]
    assert splits.train.labels[19] == (19,)


def test_cifar_labels_outside_the_classes_are_named(monkeypatch, tmp_path):
    write_cifar(monkeypatch, datasets.CIFAR10, tmp_path, ["a", "b", "c"], "labels", 10)
    with pytest.raises(ValueError, match="image 3 of the train split has label 3, outside the 3"):
        CIFAR10(str(tmp_path)).splits()


def test_missing_cifar_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match="cifar-10-batches-py does not exist: .*--data.source.download true",
    ):
        CIFAR10(str(tmp_path)).splits()


def write_image(path, color, size=(20, 16), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)


@pytest.fixture
def imagenet(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for number, synset in enumerate(("n01440764", "n01443537")):
            for i in range(count):
                name = f"{synset}_{i}.JPEG" if split == "train" else f"ILSVRC2012_val_{i}.JPEG"
                write_image(tmp_path / split / synset / name, (200 * number, 50 * i, 0))
    # As in ImageNet, one file is a PNG by its content, and one is CMYK.
    png = tmp_path / "train" / "n01440764" / "n02105855_2933.JPEG"
    write_image(png.with_suffix(".png"), (0, 0, 255), mode="RGBA")
    png.with_suffix(".png").rename(png)
    write_image(tmp_path / "train" / "n01443537" / "n01739381_1309.JPEG", (9, 9, 9), mode="CMYK")
    (tmp_path / "train" / ".cache").mkdir()
    return tmp_path


def test_imagenet_folders(imagenet):
    splits = ImageFolder(str(imagenet / "train"), str(imagenet / "val")).splits()
    assert splits.class_names == ["n01440764", "n01443537"]
    assert splits.train.labels == [(0,)] * 4 + [(1,)] * 4
    assert splits.val.labels == splits.test.labels == [(0,)] * 2 + [(1,)] * 2
    for index, (label,) in enumerate(splits.train.labels):
        assert splits.train.paths[index].parent.name == splits.class_names[label]
        assert splits.train.read(index).size == (20, 16)


def test_folders_with_other_classes_are_refused(imagenet):
    train, val = imagenet / "train", imagenet / "val"
    write_image(val / "n99999999" / "a.png", 0)
    with pytest.raises(ValueError, match=r"val has classes that .*train lacks: n99999999"):
        ImageFolder(str(train), str(val)).splits()
    (train / "n01443537").rename(train / "n99999999")
    with pytest.raises(ValueError, match=r"val has classes that .*train lacks: n01443537"):
        ImageFolder(str(train), str(val)).splits()
    with pytest.raises(ValueError, match=r"train lacks classes that .*val has: n01443537"):
        ImageFolder(str(val), str(train)).splits()


def test_missing_and_empty_folders_are_named(imagenet):
    train = str(imagenet / "train")
    with pytest.raises(FileNotFoundError, match="folder .*gone does not exist"):
        ImageFolder(train, str(imagenet / "gone")).splits()
    (imagenet / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no subfolders: each class needs one"):
        ImageFolder(train, str(imagenet / "empty")).splits()
    (imagenet / "train" / "n00000001").mkdir()
    with pytest.raises(ValueError, match=r"train.n00000001 has no files ending in .jpg, .jpeg"):
        ImageFolder(train, train).splits()


def test_unreadable_images_are_named(imagenet):
    folder = imagenet / "train" / "n01440764"
    (folder / "a_text.png").write_text("no image")
    content = (folder / "n01440764_0.JPEG").read_bytes()
    (folder / "b_cut.jpg").write_bytes(content[: len(content) // 2])
    write_image(folder / "c_whole.png", 1)
    content = (folder / "c_whole.png").read_bytes()
    (folder / "c_whole.png").write_bytes(content[: len(content) // 2])
    images = ImageFolder(str(imagenet / "train"), str(imagenet / "val")).splits().train
    for index, name in enumerate(("a_text.png", "b_cut.jpg", "c_whole.png")):
        with pytest.raises(ValueError, match=rf"image {index} \(.*{name}\) cannot be decoded"):
            images.read(index)
    (folder / "a_text.png").unlink()
    with pytest.raises(ValueError, match=r"image 0 \(.*a_text.png\) does not exist"):
        images.read(0)


def test_an_animation_is_its_first_frame(tmp_path):
    first = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    second = np.zeros((8, 8, 3), np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(first).quantize(256).save(
            tmp_path / name / "moving.GIF",
            save_all=True,
            append_images=[Image.fromarray(second).quantize(2)],
        )
    splits = ImageFolder(str(tmp_path), str(tmp_path)).splits()
    assert [path.name for path in splits.train.paths] == ["moving.GIF"] * 2
    # 64 colors fit into a palette of 256, so nothing is lost.
    assert np.array_equal(np.asarray(splits.train.read(1)), first)


def test_a_folder_of_images_holds_out_some_of_each_class(tmp_path):
    for name in ("cat", "dog"):
        for number in range(10):
            write_image(tmp_path / "all" / name / f"{number}.png", (number, 0, 0))
        write_image(tmp_path / "test" / name / "0.png", (9, 9, 9))
    splits = ImageFolder(str(tmp_path / "all"), test=str(tmp_path / "test"), val_fraction=0.2)
    splits = splits.splits()
    assert [len(s.labels) for s in (splits.train, splits.val, splits.test)] == [16, 4, 2]
    assert not set(splits.train.paths) & set(splits.val.paths)


def test_a_small_class_has_an_image_in_each_split(tmp_path):
    for name, count in (("cat", 1), ("dog", 2), ("owl", 5)):
        for number in range(count):
            write_image(tmp_path / "all" / name / f"{number}.png", (number, 0, 0))
    for fraction, counts in ((0.01, [1, 1, 4]), (0.9, [1, 1, 1])):
        splits = ImageFolder(str(tmp_path / "all"), val_fraction=fraction).splits()
        assert [splits.train.labels.count((label,)) for label in range(3)] == counts
        assert [splits.val.labels.count((label,)) for label in range(3)] == [
            total - kept for total, kept in zip([1, 2, 5], counts, strict=True)
        ]
    for name in ("dog", "owl"):
        for number in range(1, 5):
            (tmp_path / "all" / name / f"{number}.png").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="no class of .*all has more than one: add samples or"):
        ImageFolder(str(tmp_path / "all")).splits()


@pytest.fixture
def table(tmp_path):
    """Ten images of two classes in a folder next to a table with their names."""
    rows = []
    for number in range(10):
        write_image(tmp_path / "bilder süß" / f"{number} 1.png", (number, 0, 0))
        split = "train" if number < 6 else "Validation" if number < 8 else "test"
        rows.append(f"bilder süß/{number} 1.png,{['katze', 'hünd'][number % 2]},{split}")
    path = tmp_path / "photos.csv"
    path.write_text("\n".join(["file,label,split", *rows]) + "\n", encoding="utf-8")
    return str(path)


def test_a_table_of_images(table, tmp_path):
    splits = ImageTable(table, val_fraction=0.2).splits()
    assert splits.class_names == ["hünd", "katze"]
    assert [len(s.labels) for s in (splits.train, splits.val)] == [8, 2]
    splits = ImageTable(table, split_column="split").splits()
    assert [len(s.labels) for s in (splits.train, splits.val, splits.test)] == [6, 2, 2]
    assert splits.train.labels[:2] == [(1,), (0,)]
    assert splits.val.read(1).getpixel((0, 0)) == (7, 0, 0)
    with pytest.raises(
        ValueError, match="split_column='split' already defines the splits of train"
    ):
        ImageTable(table, val=table, split_column="split")
    with pytest.raises(
        ValueError, match=r"photos.csv, line 2: label must be one of tr.*, got 'katze'"
    ):
        ImageTable(table, split_column="label").splits()


def test_a_table_with_a_class_in_val_that_is_not_in_train(table, tmp_path):
    other = tmp_path / "val.csv"
    other.write_text("file,label\na.png,katzen\n")
    message = (
        r"val.csv: .*a.png has label 'katzen', which is not one of the 2 classes of the training "
        r"rows; .*mean 'katze'\?"
    )
    with pytest.raises(ValueError, match=message):
        ImageTable(table, str(other)).splits()
