"""Audio: the datamodule, its sources and the reader of sounds, imported on first access."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.audio.augment import AudioAugment
    from datamodules.audio.data import AudioData
    from datamodules.audio.evaluation import AudioReader
    from datamodules.audio.sound_events import SoundEvents
    from datamodules.audio.sources import AudioSource, SoundFolder, SoundTable, SpeechCommands

__all__ = [
    "AudioAugment",
    "AudioData",
    "AudioReader",
    "AudioSource",
    "SoundEvents",
    "SoundFolder",
    "SoundTable",
    "SpeechCommands",
]

_HOMES = {
    "AudioAugment": "datamodules.audio.augment",
    "AudioData": "datamodules.audio.data",
    "AudioReader": "datamodules.audio.evaluation",
    "AudioSource": "datamodules.audio.sources",
    "SoundEvents": "datamodules.audio.sound_events",
    "SoundFolder": "datamodules.audio.sources",
    "SoundTable": "datamodules.audio.sources",
    "SpeechCommands": "datamodules.audio.sources",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
