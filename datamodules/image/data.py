"""Images and their classes, as normalized batches."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from datamodules.image.sources import (
    EXTENSIONS,
    Digits,
    ImageFolder,
    ImageSource,
    ImageTable,
    LabelledImages,
)
from datamodules.image.transform import ImageTransform, Transform
from datamodules.shared.bad_samples import BadSampleError, BadSamples
from datamodules.shared.fingerprints import Fingerprint
from datamodules.shared.labelled import LabelledData, LabelledDataset
from datamodules.shared.own_data import (
    KEPT,
    OwnData,
    fitting_batch_size,
    locate,
    looked_at,
    told_splits,
)
from datamodules.shared.sampling import seeded
from datamodules.shared.sources import Splits
from diffmm.checks import check_choice

MODES = {1: "L", 3: "RGB"}

OWN_TRANSFORM = ImageTransform(
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    crop_pct=0.875,
    crop_mode="center",
    train_crop_mode="rrc",
    scale=(0.35, 1.0),
    ratio=(3 / 4, 4 / 3),
    hflip=0.0,
    vflip=0.0,
    color_jitter=0.2,
)
"""For images that nothing is known of, and written into their recipe: nothing that could change
what an image shows. timm would crop to 8 % of the area, mirror every second image (letters and
signs, too), and vary colors twice as much."""


MODES_IN_WORDS = {1: "gray", 3: "color"}


class ImageDataset(LabelledDataset):
    """Images of a split, decoded and transformed.

    Args:
        splits: where the images belong; it knows the classes.
        images: what is read.
        mode: Pillow's name of the color space.
        transform: from an image to a tensor; its random numbers follow `(seed, epoch, index)`.
        seed: of the transform.
    """

    def __init__(
        self,
        splits: Splits[LabelledImages],
        images: LabelledImages,
        *,
        mode: str,
        transform: Transform,
        seed: int,
    ) -> None:
        super().__init__(images, seed=seed)
        self.splits = splits
        self.images = images
        self.mode = mode
        self.transform = transform

    def sample(self, epoch: int, index: int) -> dict[str, Any]:
        image = self.images.read(index).convert(self.mode)
        with seeded(self.seed, epoch, index):
            pixels = self.transform(image)
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
        self.transforms = {
            training: transform.build(
                source.transform, self.image_size, self.channels, training=training
            )
            for training in (True, False)
        }

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
        arguments = (given.get("source") or {}).get("init_args") or {}
        located = locate(path, "images", EXTENSIONS, arguments)
        make = ImageTable if located.is_table else ImageFolder
        taken = KEPT if located.is_table else ("val", "test", "val_fraction", "max_pixels")
        kept = {name: arguments[name] for name in taken if name in arguments}
        settings = {**kept, **located.arguments}
        splits = make(**settings).splits()
        channels, sizes = _looks(splits.train)
        told = told_splits(path, "images", settings, splits)
        told += f"; {MODES_IN_WORDS[channels]}, {sizes} pixels"
        node = {"class_path": f"datamodules.image.{make.__name__}", "init_args": settings}
        found: dict[str, Any] = {
            "source": node,
            **fitting_batch_size(given, 64, len(splits.train.labels)),
        }
        if given.get("transform") is None:
            found["transform"] = {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in asdict(OWN_TRANSFORM).items()
                if value is not None
            }
        facts = {"num_classes": len(splits.class_names)}
        if inputs_may_change:
            facts["channels"] = channels
        return OwnData(found, facts, told)

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
            mode=MODES[self.channels],
            transform=self.transforms[training],
            seed=self.seed,
        )


def _looks(images: LabelledImages) -> tuple[int, str]:
    """How many channels some images have, and how large they are, in words.

    Raises:
        BadSampleError: if none of them can be read.
    """
    sizes, modes, fault = [], set(), None
    for index in looked_at(images):
        try:
            image = images.read(index)
        except BadSampleError as error:
            fault = fault or error
            continue
        sizes.append(image.size)
        modes.add(image.mode)
    if fault is not None and not sizes:
        raise fault
    smallest, largest = min(sizes), max(sizes)
    text = f"{smallest[0]} x {smallest[1]}"
    if smallest != largest:
        text += f" to {largest[0]} x {largest[1]}"
    return (1 if modes == {"L"} else 3), text
