"""Datamodules for the models of `diffmm`, one package per modality.

`TextData`, `ImageData` and `AudioData` are LightningDataModules. Each has an embedded default
source that needs no network, and sources for real data sets. `RetrievalData` generates sequences
whose answers must be found in the context, and `ConversationData` reads messages for instruction
tuning. `ImageTextData` and `AudioTextData` read images and sounds with texts, and
`ImageAudioTextData` both together. They are imported on first access.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.audio import AudioData
    from datamodules.image import ImageData
    from datamodules.pairs import AudioTextData, ImageAudioTextData, ImageTextData
    from datamodules.text import ConversationData, RetrievalData, TextData

__all__ = [
    "AudioData",
    "AudioTextData",
    "ConversationData",
    "ImageAudioTextData",
    "ImageData",
    "ImageTextData",
    "RetrievalData",
    "TextData",
]

_HOMES = {
    "AudioData": "datamodules.audio",
    "AudioTextData": "datamodules.pairs",
    "ConversationData": "datamodules.text",
    "ImageAudioTextData": "datamodules.pairs",
    "ImageData": "datamodules.image",
    "ImageTextData": "datamodules.pairs",
    "RetrievalData": "datamodules.text",
    "TextData": "datamodules.text",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
