"""Datamodules: what the models of `diffmm` learn from, one file a modality.

`TextData`, `ImageData` and `AudioData` are LightningDataModules. Each has an embedded default that
needs no network, and takes the real thing as its source. They are imported when first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.audio import AudioData
    from datamodules.image import ImageData
    from datamodules.text import TextData

__all__ = ["AudioData", "ImageData", "TextData"]

_HOMES = {
    "AudioData": "datamodules.audio",
    "ImageData": "datamodules.image",
    "TextData": "datamodules.text",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
