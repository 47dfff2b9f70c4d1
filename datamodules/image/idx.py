"""MNIST and data sets in its format: IDX files of images and labels, compressed by gzip or not."""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from datamodules.image.sources import ArrayImages, ImageSource, LabelledImages
from datamodules.image.transform import ImageTransform
from datamodules.shared.files import MISSING, why_no_file
from datamodules.shared.sources import Splits, hold_out
from diffmm.checks import DataError

UINT8 = 0x08
"""The only element type of IDX files that holds images."""


def read_idx(path: Path, num_axes: int) -> NDArray[np.uint8]:
    """Read an IDX file (LeCun, "The MNIST database", "File formats").

    The file begins with two zero bytes, the element type and the number of axes, followed by the
    length of each axis as a big-endian 32-bit integer and the elements.

    Args:
        path: Path of the file; gzip is recognized by its content.
        num_axes: Expected number of axes.

    Raises:
        FileNotFoundError: If the file does not exist.
        DataError: If it is not a regular file, is not an IDX file of uint8 with `num_axes` axes, or
            is truncated or too long; the message names it.
    """
    fault = why_no_file(path)
    if fault is not None and fault.startswith(MISSING):
        raise FileNotFoundError(f"IDX file {path} does not exist")
    if fault is not None:
        raise DataError(f"IDX file {path} {fault}")
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"IDX file {path} is damaged: {error}") from error
    wanted = bytes([0, 0, UINT8, num_axes])
    if content[:4] != wanted:
        raise DataError(
            f"{path} is not an IDX file of uint8 with {num_axes} axes: it begins with "
            f"{content[:4].hex(' ') or 'nothing'}, not {wanted.hex(' ')}"
        )
    start = 4 * (1 + num_axes)
    shape = tuple(map(int, np.frombuffer(content[4 : min(start, len(content)) & ~3], ">u4")))
    # Python's integers do not overflow.
    size = start
    if len(shape) == num_axes:
        count = 1
        for length in shape:
            count *= length
        size += count
    if len(content) != size:
        raise DataError(
            f"IDX file {path} is {'truncated' if len(content) < size else 'too long'}: it has "
            f"{len(content):,} bytes, and its header describes {size:,}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


class MNIST(ImageSource):
    """MNIST (LeCun et al. 1998): 60,000 training and 10,000 test images of 28 x 28, 10 classes, or
    another data set in its format, such as EMNIST or KMNIST.

    The files are `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte` and
    `t10k-labels-idx1-ubyte`, with or without `.gz`.

    Args:
        root: The folder of these files.
        val_fraction: Fraction of each class's training images to hold out for validation, the same
            in every run. By default the test images are used for validation, as is common.
        class_names: Names of the classes, in order of their labels; by default those of the data
            set.

    Raises:
        FileNotFoundError: During reading, if a file does not exist.
        DataError: During reading, if a file is damaged, images and labels differ in number, or a
            label has no name.
    """

    image_size = 28
    channels = 1
    transform = ImageTransform(
        mean=(0.1307,),
        std=(0.3081,),
        crop_pct=1.0,
        scale=(0.8, 1.0),
        ratio=(0.9, 1.1),
        hflip=0.0,
        color_jitter=0.0,
    )
    names: ClassVar[tuple[str, ...]] = tuple(map(str, range(10)))

    def __init__(
        self,
        root: str,
        *,
        val_fraction: float | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        self.root = root
        self.val_fraction = val_fraction
        self.class_names: Sequence[str] = class_names or self.names

    def splits(self) -> Splits[LabelledImages]:
        train, test = self._read("train"), self._read("t10k")
        names = list(self.class_names)
        if self.val_fraction is None:
            return Splits(names, train, test, test)
        kept, held_out = hold_out(train.labels, self.val_fraction)
        return Splits(names, train.subset(kept), train.subset(held_out), test)

    def _read(self, part: str) -> ArrayImages:
        images_file, labels_file = (
            self._find(f"{part}-{noun}-idx{num_axes}-ubyte")
            for noun, num_axes in (("images", 3), ("labels", 1))
        )
        pixels, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
        if len(pixels) != len(labels):
            raise DataError(
                f"{images_file} has {len(pixels):,} images, but {labels_file} has {len(labels):,} "
                f"labels"
            )
        if labels.size and labels.max() >= len(self.class_names):
            raise DataError(
                f"{labels_file} has label {labels.max()}, but there are {len(self.class_names)} "
                f"class names: set --data.source.class_names"
            )
        return ArrayImages(pixels, labels.tolist())

    def _find(self, name: str) -> Path:
        for path in (Path(self.root, name), Path(self.root, f"{name}.gz")):
            if path.exists():
                return path
        raise FileNotFoundError(
            f"neither {name} nor {name}.gz exists in {self.root}: set --data.source.root to the "
            f"folder of the IDX files"
        )


class FashionMNIST(MNIST):
    """Fashion-MNIST (Xiao et al. 2017): like MNIST, with images of 10 kinds of clothes.

    Args:
        root: The folder of the IDX files; by default that of Debian's package
            `dataset-fashion-mnist`.
        val_fraction, class_names: See `MNIST`.
    """

    transform = ImageTransform(
        mean=(0.2860,),
        std=(0.3530,),
        crop_pct=1.0,
        scale=(0.8, 1.0),
        ratio=(0.9, 1.1),
        hflip=0.5,
        color_jitter=0.0,
    )
    names = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )

    def __init__(
        self,
        root: str = "/usr/share/datasets/fashion-mnist",
        *,
        val_fraction: float | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__(root, val_fraction=val_fraction, class_names=class_names)
