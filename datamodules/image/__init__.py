"""Images: the datamodule, its sources and the reader of images, imported on first access."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.image.data import ImageData
    from datamodules.image.idx import MNIST, FashionMNIST
    from datamodules.image.reader import ImageReader
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
    "MNIST",
    "Digits",
    "FashionMNIST",
    "ImageData",
    "ImageFolder",
    "ImageReader",
    "ImageSource",
    "ImageTable",
    "ImageTransform",
]

_HOMES = {
    "CIFAR10": "datamodules.image.sources",
    "CIFAR100": "datamodules.image.sources",
    "Digits": "datamodules.image.sources",
    "FashionMNIST": "datamodules.image.idx",
    "ImageData": "datamodules.image.data",
    "ImageFolder": "datamodules.image.sources",
    "ImageReader": "datamodules.image.reader",
    "ImageSource": "datamodules.image.sources",
    "ImageTable": "datamodules.image.sources",
    "ImageTransform": "datamodules.image.transform",
    "MNIST": "datamodules.image.idx",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
