"""The datamodule of labeled images."""

from collections.abc import Mapping
from typing import Any, Self

from datamodules.image.files import EXTENSIONS
from datamodules.image.inputs import ImageInputs, prepare_images
from datamodules.image.own_data import own_images
from datamodules.image.reader import ImageReader
from datamodules.image.sources import (
    Digits,
    ImageFolder,
    ImageSource,
    ImageTable,
    LabelledImages,
)
from datamodules.image.transform import ImageTransform, Transform
from datamodules.shared.bad_samples import BadSamples
from datamodules.shared.fingerprints import Fingerprint
from datamodules.shared.labelled import LabelledData, LabelledDataset
from datamodules.shared.other_data import table_settings, to_evaluate
from datamodules.shared.own_data import OwnData, locate
from datamodules.shared.reader import Reader
from datamodules.shared.sources import Splits


class ImageDataset(LabelledDataset):
    """The images of a split, decoded and transformed.

    Args:
        splits: The splits of the source, with its classes.
        images: The images of this split.
        reader: The evaluation preprocessing.
        transform: The training transform, which replaces that of the reader; its random numbers
            are a function of `(seed, epoch, index)`.
        seed: Seed of the transform.
    """

    def __init__(
        self,
        splits: Splits[LabelledImages],
        images: LabelledImages,
        *,
        reader: ImageReader,
        transform: Transform | None,
        seed: int,
    ) -> None:
        super().__init__(images, seed=seed)
        self.splits = splits
        self.inputs = ImageInputs(images, reader=reader, transform=transform, seed=seed)

    def sample(self, epoch: int, index: int) -> dict[str, Any]:
        return {
            **self.inputs(epoch, index),
            "labels": self.splits.target(self.samples.labels[index]),
            "index": index,
        }


class ImageData(LabelledData[LabelledImages]):
    """Labeled images as `ImageBatch`es. Mixup and CutMix are part of the task.

    Args:
        source: Source of the images, a class of `datamodules.image.sources`; by default
            scikit-learn's `Digits`, which need no download.
        image_size: Height and width of the images in pixels; by default the source's. Images of
            other sizes, including smaller ones, are resized as in timm.
        channels: Number of channels, 1 for gray or 3 for color; by default the source's.
        transform: Crops, augmentation and normalization; unset fields have the source's defaults,
            then timm's.
        batch_size: Number of images per batch and process.
        num_workers: Number of data loader workers per process; 0 loads in the training process.
        seed: Seed of the order and the augmentation.
        bad_samples: How to handle images that cannot be read; by default, raise an error.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    def __init__(
        self,
        source: ImageSource | None = None,
        *,
        image_size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        transform: ImageTransform | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        bad_samples: BadSamples | None = None,
    ) -> None:
        source = source or Digits()
        super().__init__(
            source,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            bad_samples=bad_samples,
        )
        prepared = prepare_images(source, image_size, channels, transform, source.max_pixels)
        self.reader = prepared.reader
        self.image_size, self.channels = self.reader.image_size, self.reader.channels
        self._transform = prepared.settings
        self.transforms = {True: prepared.training, False: self.reader.transform}

    @property
    def evaluation_reader(self) -> ImageReader:
        return self.reader

    def read_with(self, reader: Reader) -> None:
        if type(reader) is not ImageReader:
            super().read_with(reader)
            return
        self.reader = reader

    @classmethod
    def own_data(cls, path: str, given: Mapping[str, Any], *, inputs_may_change: bool) -> OwnData:
        """Settings for a folder of images by class, or a CSV file of images.

        Args:
            path: Path of the folder or file.
            given: Arguments of the recipe for this class.
            inputs_may_change: Whether the model's number of channels may change to that of the
                images.

        Raises:
            FileNotFoundError: If the path does not exist.
            ValueError: If its structure is not supported.
        """
        return own_images(path, given, inputs_may_change=inputs_may_change)

    def fingerprint(self) -> Fingerprint:
        return {
            **super().fingerprint(),
            "image_size": self.image_size,
            "channels": self.channels,
            "transform": self._transform,
        }

    @classmethod
    def prepared_by(
        cls,
        reader: Reader,
        path: str,
        *,
        multi_label: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> Self:
        assert isinstance(reader, ImageReader)
        located = locate(path, "images", EXTENSIONS, {})
        arguments: dict[str, Any] = {**located.arguments, "max_pixels": reader.max_pixels}
        names = ("interpolation", "crop_pct", "crop_mode", "mean", "std")
        return cls(
            ImageTable(**arguments, multi_label=multi_label)
            if located.is_table
            else ImageFolder(**arguments),
            image_size=reader.image_size,
            channels=reader.channels,
            transform=ImageTransform(**{name: getattr(reader, name) for name in names}),
            batch_size=batch_size,
            num_workers=num_workers,
        )

    def other_source(self, path: str, split: str) -> ImageFolder | ImageTable:
        located = locate(path, "images", EXTENSIONS, {})
        arguments: dict[str, Any] = to_evaluate(path, located, split)
        arguments["max_pixels"] = self.reader.max_pixels
        return (
            ImageTable(**arguments, **table_settings(self.source))
            if located.is_table
            else ImageFolder(**arguments)
        )

    def dataset(self, samples: LabelledImages, *, training: bool) -> ImageDataset:
        return ImageDataset(
            self.splits,
            samples,
            reader=self.reader,
            transform=self.transforms[True] if training else None,
            seed=self.seed,
        )
