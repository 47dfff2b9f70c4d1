"""Settings of `ImageData` for a user's own images."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from datamodules.image.reader import read_named
from datamodules.image.sources import EXTENSIONS, ImageFolder, ImageTable, LabelledImages
from datamodules.image.transform import ImageTransform
from datamodules.shared.bad_samples import BadSampleError
from datamodules.shared.own_data import (
    KEPT,
    OwnData,
    describe_splits,
    fitting_batch_size,
    locate,
    looked_at,
    splits_of,
)

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
"""The transform for unknown images, written into their recipe. It avoids augmentation that could
change the class of an image: timm would crop to as little as 8% of the area, mirror every second
image (including letters and signs), and jitter colors twice as much."""

IN_WORDS = {1: "gray", 3: "color"}


def own_images(path: str, given: Mapping[str, Any], *, inputs_may_change: bool) -> OwnData:
    """Settings for a folder or a CSV file of images; see `ImageData.own_data`."""
    arguments = (given.get("source") or {}).get("init_args") or {}
    located = locate(path, "images", EXTENSIONS, arguments)
    make = ImageTable if located.is_table else ImageFolder
    taken = KEPT if located.is_table else ("val", "test", "val_fraction", "max_pixels")
    kept = {name: arguments[name] for name in taken if name in arguments}
    settings = {**kept, **located.arguments}
    source = make(**settings)
    splits = splits_of(source, lambda file: read_named(file, str(file), source.max_pixels))
    channels, sizes = inspect_images(splits.train)
    summary = describe_splits(path, "images", settings, splits)
    summary += f"; {IN_WORDS[channels]}, {sizes} pixels"
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
    return OwnData(found, facts, summary)


def inspect_images(images: LabelledImages) -> tuple[int, str]:
    """The number of channels of some images, and a summary of their sizes.

    Raises:
        BadSampleError: If none of them can be read.
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
