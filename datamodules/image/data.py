"""Images and their classes, as normalized batches."""

from collections.abc import Mapping
from typing import Any

from datamodules.image.own_data import own_images
from datamodules.image.reader import MODES, ImageReader
from datamodules.image.sources import Digits, ImageSource, LabelledImages
from datamodules.image.transform import ImageTransform, Transform
from datamodules.shared.bad_samples import BadSamples
from datamodules.shared.fingerprints import Fingerprint
from datamodules.shared.labelled import LabelledData, LabelledDataset
from datamodules.shared.own_data import OwnData
from datamodules.shared.sampling import seeded
from datamodules.shared.sources import Splits
from diffmm.checks import check_choice


class ImageDataset(LabelledDataset):
    """Images of a split, decoded and transformed.

    Args:
        splits: where the images belong; it knows the classes.
        images: what is read.
        reader: makes of an image what the model sees in evaluation.
        transform: in training, in place of the reader's own; its random numbers follow
            `(seed, epoch, index)`.
        seed: of the transform.
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
        self.images = images
        self.reader = reader
        self.transform = transform

    def sample(self, epoch: int, index: int) -> dict[str, Any]:
        image = self.images.read(index)
        if self.transform is None:
            pixels = self.reader.pixels(image)
        else:
            with seeded(self.seed, epoch, index):
                pixels = self.transform(self.reader.convert(image))
        return {
            "images": pixels,
            "labels": self.splits.target(self.images.labels[index]),
            "index": index,
        }


class ImageData(LabelledData[LabelledImages]):
    """Images of known classes, as `ImageBatch`es; mixup and cutmix happen in the task.

    Args:
        source: where the images come from, a class of `datamodules.image.sources`; by default
            scikit-learn's `Digits`, which need no download.
        image_size: height and width of the batches; by default the source's. Images of another
            size are resized as timm does it, small ones too.
        channels: 1 for gray, 3 for color; by default the source's.
        transform: crops, augmentation and normalization, where the source's own defaults and then
            timm's are not what is wanted.
        batch_size: images a batch of one process.
        num_workers: processes that load beside the training one.
        seed: of the order and the augmentation.
        bad_samples: what to do about images that cannot be read; by default to stop.

    Raises:
        ValueError: naming the argument that is wrong.
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
        size = source.image_size if image_size is None else image_size
        height, width = (size, size) if isinstance(size, int) else size
        if height < 1 or width < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        self.channels = source.channels if channels is None else channels
        check_choice("channels", self.channels, MODES)
        self.image_size = (height, width)
        transform = transform or ImageTransform()
        self._transform = f"{transform} over {source.transform}"
        settings = transform.settings(source.transform, self.image_size, self.channels)
        interpolation = settings["interpolation"]
        self.reader = ImageReader(
            image_size=self.image_size,
            channels=self.channels,
            interpolation="bicubic" if interpolation == "random" else interpolation,
            max_pixels=source.max_pixels,
            **{name: settings[name] for name in ("crop_pct", "crop_mode", "mean", "std")},
        )
        training = transform.build(source.transform, self.image_size, self.channels, training=True)
        self.transforms = {True: training, False: self.reader.transform}

    @property
    def evaluation_reader(self) -> ImageReader:
        return self.reader

    @classmethod
    def own_data(cls, path: str, given: Mapping[str, Any], *, inputs_may_change: bool) -> OwnData:
        """A folder of images by class, or a CSV file of images, as settings.

        Args:
            path: the folder or the file.
            given: the arguments that the recipe has for this class.
            inputs_may_change: whether the number of channels may become that of the images.

        Raises:
            FileNotFoundError, ValueError: naming what is missing or wrong.
        """
        return own_images(path, given, inputs_may_change=inputs_may_change)

    def fingerprint(self) -> Fingerprint:
        return {
            **super().fingerprint(),
            "image_size": self.image_size,
            "channels": self.channels,
            "transform": self._transform,
        }

    def dataset(self, samples: LabelledImages, *, training: bool) -> ImageDataset:
        return ImageDataset(
            self.splits,
            samples,
            reader=self.reader,
            transform=self.transforms[True] if training else None,
            seed=self.seed,
        )
