"""Sounds: the datamodule, and where sounds come from."""

from datamodules.audio.augment import AudioAugment
from datamodules.audio.data import AudioData
from datamodules.audio.sound_events import SoundEvents
from datamodules.audio.sources import AudioSource, SoundFolder, SoundTable, SpeechCommands

__all__ = [
    "AudioAugment",
    "AudioData",
    "AudioSource",
    "SoundEvents",
    "SoundFolder",
    "SoundTable",
    "SpeechCommands",
]
