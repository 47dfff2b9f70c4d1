"""IDX files as MNIST has them: what is read, and the messages for damaged files."""

import gzip
import struct

import numpy as np
import pytest

from datamodules import ImageData
from datamodules.image import MNIST, FashionMNIST
from datamodules.image.idx import read_idx
from diffmm.checks import DataError

NUM = {"train": 40, "t10k": 20}


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + bytes(array)
    )


def pixels(part):
    """`[N, 6, 5]` uint8."""
    return np.random.default_rng(len(part)).integers(0, 256, (NUM[part], 6, 5), np.uint8)


def labels(part):
    return (np.arange(NUM[part]) % 10).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    for part in NUM:
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels(part)))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels(part))))
    return tmp_path


def test_images_and_labels(folder):
    splits = FashionMNIST(str(folder)).splits()
    assert splits.class_names[-1] == "Ankle boot"
    assert [len(part.labels) for part in (splits.train, splits.val, splits.test)] == [40, 20, 20]
    assert splits.val is splits.test
    assert np.array_equal(np.asarray(splits.train.read(7)), pixels("train")[7])
    assert splits.train.labels[13] == (3,)
    assert splits.val.labels[19] == (9,)


def test_held_out_images_leave_the_test_images_alone(folder):
    splits = MNIST(str(folder), val_fraction=0.25).splits()
    assert [len(part.labels) for part in (splits.train, splits.val, splits.test)] == [30, 10, 20]
    assert sorted(splits.val.labels) == [(label,) for label in range(10)]
    seen = {splits.train.read(i).tobytes() for i in range(30)}
    assert all(splits.val.read(i).tobytes() not in seen for i in range(10))


def test_batches(folder):
    data = ImageData(MNIST(str(folder)), image_size=8, batch_size=4)
    data.prepare_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["images"].shape == (4, 1, 8, 8)
    # The normalization of MNIST: an image of zeros is -mean / std everywhere.
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((20, 6, 5), np.uint8)))
    data = ImageData(MNIST(str(folder)), image_size=8, batch_size=4)
    data.setup()
    (black, *_) = data.val_dataloader()
    assert black["images"].unique().tolist() == pytest.approx([-0.1307 / 0.3081])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an IDX file of uint8 with 1 axes: it begins with nothing, not 00 00 08 01"),
        (b"<html>", "it begins with 3c 68 74 6d"),
        (idx(np.zeros((2, 2), np.uint8)), "begins with 00 00 08 02, not 00 00 08 01"),
        (bytes([0, 0, 13, 1]) + bytes(8), "begins with 00 00 0d 01"),
        (
            idx(np.zeros(9, np.uint8))[:-1],
            "is truncated: it has 16 bytes, and its header describes 17",
        ),
        (
            idx(np.zeros(9, np.uint8))[:6],
            "is truncated: it has 6 bytes, and its header describes 8",
        ),
        (
            idx(np.zeros(9, np.uint8)) + b"x",
            "is too long: it has 18 bytes, and its header describes 17",
        ),
        (bytes([0, 0, 8, 1, 255, 255, 255, 255]), "describes 4,294,967,303"),
        (gzip.compress(idx(np.zeros(900, np.uint8)), mtime=0)[:-9], "is damaged: "),
        (b"\x1f\x8bnot gzip", "is damaged: "),
    ],
)
def test_a_damaged_file_is_named(content, message, tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read_idx(path, 1)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_sizes_that_would_overflow_are_refused_without_allocating(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(bytes([0, 0, 8, 3]) + b"\xff" * 12)
    with pytest.raises(DataError, match="is truncated"):
        read_idx(path, 3)


def test_missing_and_mismatched_files(folder):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_idx(folder / "none", 1)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(labels("train")[:-1]))
    with pytest.raises(DataError, match=r"has 40 images, but .* has 39 labels"):
        MNIST(str(folder)).splits()
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(labels("train") + 1))
    with pytest.raises(DataError, match="has label 10, but there are 10 class names"):
        MNIST(str(folder)).splits()
    names = [f"class {number}" for number in range(11)]
    assert MNIST(str(folder), class_names=names).splits().train.labels[9] == (10,)
    (folder / "train-labels-idx1-ubyte").unlink()
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="neither train-labels-idx1-ubyte nor train-labels"):
        MNIST(str(folder)).splits()
    (folder / "train-labels-idx1-ubyte").mkdir()
    with pytest.raises(DataError, match="train-labels-idx1-ubyte"):
        MNIST(str(folder)).splits()
