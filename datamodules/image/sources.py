"""Sources of images: scikit-learn's digits, CIFAR, folders by class, and CSV tables."""

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
from datamodules.shared.stored import AnyFile
from datamodules.shared.tables import TableSource


class LabelledImages(Labelled):
    """The images of one split, decoded one at a time."""

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """Decode an image, in mode L or RGB.

        Raises:
            BadSampleError: If the image cannot be read; the message names it.
        """


class ImageSource(Source[LabelledImages]):
    """Images in training, validation and test splits, with defaults for their preprocessing.

    Attributes:
        image_size: Default height and width of the images.
        channels: Default number of channels, 1 for gray or 3 for color.
        transform: Default transform, where it differs from timm's defaults.
        max_pixels: Maximum number of pixels; larger images raise an error.
    """

    image_size: ClassVar[int] = 224
    channels: ClassVar[int] = 3
    transform: ClassVar[ImageTransform] = ImageTransform()
    max_pixels: int = MAX_PIXELS


class ArrayImages(LabelledImages):
    """Images in memory.

    Args:
        pixels: Gray `[N, H, W]` or color `[N, H, W, 3]` pixels in uint8.
        labels: Class index of each image.
    """

    def __init__(self, pixels: NDArray[np.uint8], labels: Sequence[int]) -> None:
        self.pixels = pixels
        self.labels = [(int(label),) for label in labels]

    def subset(self, indices: Sequence[int]) -> "ArrayImages":
        """The images with these indices."""
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
        self, paths: Sequence[AnyFile], labels: Sequence[Labels], max_pixels: int = MAX_PIXELS
    ) -> None:
        self.paths = paths
        self.labels = labels
        self.max_pixels = max_pixels

    def describe(self, index: int) -> str:
        return f"image {index} ({self.paths[index]})"

    def file(self, index: int) -> AnyFile:
        return self.paths[index]

    def read(self, index: int) -> Image.Image:
        return read_named(self.paths[index], self.describe(index), self.max_pixels)


class Digits(ImageSource):
    """scikit-learn's digits (Alpaydin and Kaynak, 1998): 1797 gray images of 8 x 8, 10 classes.

    They are part of scikit-learn and need no download. Validation and test images are the same.

    Args:
        val_fraction: Fraction of each class to hold out for validation, the same in every run.
    """

    image_size = 8
    channels = 1
    # Mean and standard deviation of all pixels. There is no mirroring and little cropping, because
    # they could change the digit.
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
        # Imported here, because it takes half a second and the other sources do not need it.
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
        images = ArrayImages(pixels, digits.target)
        train, val = hold_out(images.labels, self.val_fraction)
        held_out = images.subset(val)
        return Splits([str(digit) for digit in range(10)], images.subset(train), held_out, held_out)


class CIFAR10(ImageSource):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32 x 32, 10 classes.

    The layout is that of torchvision's download: `root/cifar-10-batches-py/data_batch_1` and so on.

    Args:
        root: The folder that contains `cifar-10-batches-py`.
        download: Whether to download the data set (170 MB) if it does not exist.
        val_fraction: Fraction of each class's training images to hold out for validation, the same
            in every run. By default the test images are used for validation, as is common.
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
                f"folder {folder} does not exist: set --data.source.root to an existing copy, "
                f"or --data.source.download true"
            )
        try:
            train, test = (self.dataset(self.root, train=train) for train in (True, False))
        except RuntimeError as error:
            raise ValueError(
                f"{folder} is incomplete or damaged: delete it and set --data.source.download true"
            ) from error
        train_images, test_images = (ArrayImages(d.data, d.targets) for d in (train, test))
        if self.val_fraction is None:
            return Splits(train.classes, train_images, test_images, test_images)
        kept, held_out = hold_out(train_images.labels, self.val_fraction)
        return Splits(
            train.classes, train_images.subset(kept), train_images.subset(held_out), test_images
        )


class CIFAR100(CIFAR10):
    """CIFAR-100 (Krizhevsky, 2009): like CIFAR-10, with 100 classes, in `root/cifar-100-python`."""

    transform = ImageTransform(
        mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), crop_pct=1.0
    )
    dataset = datasets.CIFAR100


class ImageFolder(FolderSource[LabelledImages], ImageSource):
    """Image files in one folder per class, as in ImageNet: `train/<class>/*.JPEG`,
    `val/<class>/*.JPEG`.

    Files are found by their extensions (`EXTENSIONS`), without hidden ones, and decoded by their
    content; `datamodules.image.files.read_image` documents orientation, transparency, 16-bit and
    float values and animations. Folders whose names differ only in Unicode normalization are one
    class, as they would be one folder on some file systems.

    Args:
        train: Folder of the training images and, without `val`, of the validation images.
        val: Folder of the validation images, with the same classes.
        test: Folder of the test images, with the same classes; the validation images by default.
        val_fraction: Without `val`, the fraction of each class to hold out for validation, the
            same images in every run.
        max_pixels: Maximum number of pixels; larger images raise an error before they are decoded.
            At most 178,956,970, Pillow's limit.

    Raises:
        ValueError: If `max_pixels` is out of range.
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
    """CSV files of image files and their labels.

    The first line has the column names; other columns are ignored. Images are read as in
    `ImageFolder`.

    Args:
        train: CSV file of the training images, in UTF-8. Paths in it are relative to its folder.
        val: CSV file of the validation images.
        test: CSV file of the test images; the validation images by default.
        file_column: Name of the column of file paths.
        label_column: Name of the column of labels.
        split_column: Name of a column of `train` with the value `train`, `val` or `test` (or
            `training`, `validation`, `valid`, `dev`, `testing`), instead of separate files.
        label_separator: Separator of several labels, `";"` or `","` (in a quoted field).
        classes: A text file of class names, one per line, in the order of their indices. By
            default the sorted labels of the training images.
        multi_label: Whether an image may have any number of labels; otherwise exactly one.
        val_fraction: Without validation images, the fraction of each class to hold out, the same
            images in every run.
        max_pixels: Maximum number of pixels; larger images raise an error before they are decoded.

    Raises:
        ValueError: If the separator is unknown, `split_column` is combined with `val` or `test`,
            or `max_pixels` is out of range.
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
    """Return `max_pixels` if Pillow can open images of this size.

    Raises:
        ValueError: If it cannot.
    """
    if not 1 <= max_pixels <= PILLOWS_MOST:
        raise ValueError(f"max_pixels must be in [1, {PILLOWS_MOST}], got {max_pixels}")
    return max_pixels
