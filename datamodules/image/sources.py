"""Where images come from: scikit-learn's digits, CIFAR, folders by class, tables."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets

from datamodules.image.files import EXTENSIONS, MAX_PIXELS, PILLOWS_MOST
from datamodules.image.reader import read_named
from datamodules.image.transform import ImageTransform
from datamodules.shared.fingerprints import Fingerprint, digest
from datamodules.shared.folders import FolderSource
from datamodules.shared.sources import Labelled, Labels, Source, Splits, hold_out
from datamodules.shared.tables import TableSource


class LabelledImages(Labelled):
    """The images of one split, decoded one at a time."""

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """An image in mode L or RGB.

        Raises:
            BadSampleError: naming the image, if it cannot be read.
        """


class ImageSource(Source[LabelledImages]):
    """Images in training, validation and test splits, and how they are best looked at.

    Attributes:
        image_size: their height and width, if nothing else is asked for.
        channels: 1 for gray, 3 for color images, likewise.
        transform: what this source's images need other than timm's defaults.
        max_pixels: larger images are refused.
    """

    image_size: ClassVar[int] = 224
    channels: ClassVar[int] = 3
    transform: ClassVar[ImageTransform] = ImageTransform()
    max_pixels: int = MAX_PIXELS


class ArrayImages(LabelledImages):
    """Images in memory.

    Args:
        pixels: `[N, H, W]` gray or `[N, H, W, 3]` color, uint8.
        labels: of each image.
    """

    def __init__(self, pixels: NDArray[np.uint8], labels: Sequence[int]) -> None:
        self.pixels = pixels
        self.labels = [(int(label),) for label in labels]

    def subset(self, indices: Sequence[int]) -> "ArrayImages":
        """The images of these numbers."""
        return ArrayImages(self.pixels[indices], [self.labels[i][0] for i in indices])

    def describe(self, index: int) -> str:
        return f"image {index}"

    def fingerprint(self) -> Fingerprint:
        pixels = digest([str(self.pixels.shape), np.ascontiguousarray(self.pixels).tobytes()])
        return {**super().fingerprint(), "contents of images": pixels}

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


class FileImages(LabelledImages):
    """Image files, read by `read_image`."""

    def __init__(
        self, paths: Sequence[Path], labels: Sequence[Labels], max_pixels: int = MAX_PIXELS
    ) -> None:
        self.paths = paths
        self.labels = labels
        self.max_pixels = max_pixels

    def describe(self, index: int) -> str:
        return f"image {index} ({self.paths[index]})"

    def file(self, index: int) -> Path:
        return self.paths[index]

    def read(self, index: int) -> Image.Image:
        return read_named(self.paths[index], self.describe(index), self.max_pixels)


class Digits(ImageSource):
    """scikit-learn's digits (Alpaydin and Kaynak, 1998): 1797 gray images of 8 x 8, 10 classes.

    They come with scikit-learn, so that nothing is downloaded. Validation and test images are the
    same.

    Args:
        val_fraction: this share of each class is held out for validation, the same in every run.
    """

    image_size = 8
    channels = 1
    # Mean and deviation of all pixels. A mirrored digit is another sign, and a crop of so few
    # pixels loses what tells them apart.
    transform = ImageTransform(
        mean=(0.305,),
        std=(0.376,),
        crop_pct=1.0,
        scale=(0.8, 1.0),
        ratio=(0.9, 1.1),
        hflip=0.0,
        color_jitter=0.0,
    )

    def __init__(self, val_fraction: float = 0.2) -> None:
        self.val_fraction = val_fraction

    def splits(self) -> Splits[LabelledImages]:
        # Imported here: it takes half a second, and the other sources need none of it.
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
        images = ArrayImages(pixels, digits.target)
        train, val = hold_out(images.labels, self.val_fraction)
        held_out = images.subset(val)
        return Splits([str(digit) for digit in range(10)], images.subset(train), held_out, held_out)


class CIFAR10(ImageSource):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32 x 32, 10 classes.

    As torchvision downloads it: `root/cifar-10-batches-py/data_batch_1` and so on.

    Args:
        root: the folder that holds `cifar-10-batches-py`.
        download: fetch it (170 MB) if it is not there.
        val_fraction: this share of each class's training images is held out for validation, the
            same in every run. By default validation is on the test images, as most reports do it.
    """

    image_size = 32
    transform = ImageTransform(
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), crop_pct=1.0
    )
    dataset: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR10

    def __init__(
        self, root: str, *, download: bool = False, val_fraction: float | None = None
    ) -> None:
        self.root = root
        self.download = download
        self.val_fraction = val_fraction

    def prepare(self) -> None:
        if self.download:
            self.dataset(self.root, download=True)

    def splits(self) -> Splits[LabelledImages]:
        folder = Path(self.root, self.dataset.base_folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no folder {folder}: give the root of an existing copy, or download: true"
            )
        try:
            train, test = (self.dataset(self.root, train=train) for train in (True, False))
        except RuntimeError as error:
            raise ValueError(
                f"{folder} is incomplete or corrupted: delete it, and download: true"
            ) from error
        train_images, test_images = (ArrayImages(d.data, d.targets) for d in (train, test))
        if self.val_fraction is None:
            return Splits(train.classes, train_images, test_images, test_images)
        kept, held_out = hold_out(train_images.labels, self.val_fraction)
        return Splits(
            train.classes, train_images.subset(kept), train_images.subset(held_out), test_images
        )


class CIFAR100(CIFAR10):
    """CIFAR-100 (Krizhevsky, 2009): as CIFAR-10, of 100 classes, in `root/cifar-100-python`."""

    transform = ImageTransform(
        mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), crop_pct=1.0
    )
    dataset = datasets.CIFAR100


class ImageFolder(FolderSource[LabelledImages], ImageSource):
    """Image files in a folder per class, as ImageNet's: `train/<class>/*.JPEG`,
    `val/<class>/*.JPEG`.

    Files are listed by their names (`EXTENSIONS`), hidden ones left out, and decoded by their
    content: see `datamodules.image.files.read_image` for what becomes of orientation, transparency,
    16 bits, floats and animations. Classes are compared by their names in Unicode's composed form:
    folders that differ in form alone are one class, as they are one folder on other systems.

    Args:
        train: folder of the training images and, without `val`, of the validation images.
        val: folder of the validation images, of the same classes.
        test: folder of the test images, of the same classes; the validation images by default.
        val_fraction: without `val`, this share of each class is held out for validation, the same
            images in every run.
        max_pixels: larger images are refused before they take memory; 178,956,970 at most, which
            is what Pillow opens.

    Raises:
        ValueError: for `max_pixels` out of its range.
    """

    extensions = EXTENSIONS

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        *,
        val_fraction: float = 0.1,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(train, val, test, val_fraction=val_fraction)
        self.max_pixels = checked_max_pixels(max_pixels)

    def samples(self, paths: Sequence[Path], labels: Sequence[Labels]) -> FileImages:
        return FileImages(paths, labels, self.max_pixels)


class ImageTable(TableSource[LabelledImages], ImageSource):
    """CSV files that name image files and their labels.

    The first line names the columns; others than the ones given here are ignored. Images are read
    as by `ImageFolder`.

    Args:
        train: CSV file of the training images, in UTF-8. Relative paths in it are relative to its
            folder.
        val: CSV file of the validation images.
        test: CSV file of the test images; the validation images by default.
        file_column: the column of the image files' paths.
        label_column: the column of the labels.
        split_column: the column of `train` that says `train`, `val` or `test` (or `training`,
            `validation`, `valid`, `dev`, `testing`), in place of files for these.
        label_separator: what stands between labels where `multi_label`, `";"` or `","` (in a
            quoted field).
        classes: a text file of class names, one per line, in the order of their numbers. By
            default the sorted labels of the training images.
        multi_label: whether an image may have several labels, or none; otherwise exactly one.
        val_fraction: without validation images, this share of each class is held out, the same
            images in every run.
        max_pixels: as in `ImageFolder`.

    Raises:
        ValueError: for another separator, a `split_column` beside `val` or `test`, or `max_pixels`
            out of its range.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        *,
        file_column: str = "file",
        label_column: str = "label",
        split_column: str | None = None,
        label_separator: str = ";",
        classes: str | None = None,
        multi_label: bool = False,
        val_fraction: float = 0.1,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(
            train,
            val,
            test,
            file_column=file_column,
            label_column=label_column,
            split_column=split_column,
            label_separator=label_separator,
            classes=classes,
            multi_label=multi_label,
            val_fraction=val_fraction,
        )
        self.max_pixels = checked_max_pixels(max_pixels)

    def samples(self, paths: Sequence[Path], labels: Sequence[Labels]) -> FileImages:
        return FileImages(paths, labels, self.max_pixels)


def checked_max_pixels(max_pixels: int) -> int:
    """`max_pixels`, if Pillow opens images of that many.

    Raises:
        ValueError: otherwise.
    """
    if not 1 <= max_pixels <= PILLOWS_MOST:
        raise ValueError(f"max_pixels must lie in [1, {PILLOWS_MOST}], got {max_pixels}")
    return max_pixels
