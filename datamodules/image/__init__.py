"""Images: the datamodule, and where images come from."""

from datamodules.image.data import ImageData
from datamodules.image.sources import (
    CIFAR10,
    CIFAR100,
    Digits,
    ImageFolder,
    ImageSource,
    ImageTable,
)
from datamodules.image.transform import ImageTransform

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "Digits",
    "ImageData",
    "ImageFolder",
    "ImageSource",
    "ImageTable",
    "ImageTransform",
]
