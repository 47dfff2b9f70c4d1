"""Pairs of images or sounds and texts: datamodules, sources and readers, imported on first
access."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.pairs.audio_text import AudioTextData, AudioTextReader
    from datamodules.pairs.clip_art import ClipArt
    from datamodules.pairs.clotho import Clotho
    from datamodules.pairs.coco import CocoCaptions
    from datamodules.pairs.data import PairData
    from datamodules.pairs.emoji import Emoji
    from datamodules.pairs.folders import PairFolder
    from datamodules.pairs.hub import HubPairs
    from datamodules.pairs.image_audio_text import ImageAudioTextData, ImageAudioTextReader
    from datamodules.pairs.image_text import ImageTextData, ImageTextReader
    from datamodules.pairs.librispeech import LibriSpeech
    from datamodules.pairs.prompts import SpokenPrompts
    from datamodules.pairs.shapes import RenderedShapes
    from datamodules.pairs.sources import PairSource
    from datamodules.pairs.synthesized import SynthesizedSounds
    from datamodules.pairs.tables import PairTable
    from datamodules.pairs.webdataset import WebDatasetPairs

__all__ = [
    "AudioTextData",
    "AudioTextReader",
    "ClipArt",
    "Clotho",
    "CocoCaptions",
    "Emoji",
    "HubPairs",
    "ImageAudioTextData",
    "ImageAudioTextReader",
    "ImageTextData",
    "ImageTextReader",
    "LibriSpeech",
    "PairData",
    "PairFolder",
    "PairSource",
    "PairTable",
    "RenderedShapes",
    "SpokenPrompts",
    "SynthesizedSounds",
    "WebDatasetPairs",
]

_HOMES = {
    "AudioTextData": "datamodules.pairs.audio_text",
    "AudioTextReader": "datamodules.pairs.audio_text",
    "ClipArt": "datamodules.pairs.clip_art",
    "Clotho": "datamodules.pairs.clotho",
    "CocoCaptions": "datamodules.pairs.coco",
    "Emoji": "datamodules.pairs.emoji",
    "HubPairs": "datamodules.pairs.hub",
    "ImageAudioTextData": "datamodules.pairs.image_audio_text",
    "ImageAudioTextReader": "datamodules.pairs.image_audio_text",
    "ImageTextData": "datamodules.pairs.image_text",
    "ImageTextReader": "datamodules.pairs.image_text",
    "LibriSpeech": "datamodules.pairs.librispeech",
    "PairData": "datamodules.pairs.data",
    "PairFolder": "datamodules.pairs.folders",
    "PairSource": "datamodules.pairs.sources",
    "PairTable": "datamodules.pairs.tables",
    "RenderedShapes": "datamodules.pairs.shapes",
    "SpokenPrompts": "datamodules.pairs.prompts",
    "SynthesizedSounds": "datamodules.pairs.synthesized",
    "WebDatasetPairs": "datamodules.pairs.webdataset",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
