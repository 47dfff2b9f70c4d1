"""Augmentation of clips: gain and background noise."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.audio.clips import EXTENSIONS, FileClips
from datamodules.audio.reader import ClipReader, Waveform
from datamodules.shared.files import list_files
from diffmm.checks import Settings


@dataclass(frozen=True)
class AudioAugment(Settings):
    """Augmentation of training clips; none by default.

    Attributes:
        gain_db: Range from which a change of a clip's level is drawn, in decibels.
        snr_db: Range from which the signal-to-noise ratio of added background noise is drawn, in
            decibels.
        noise_folder: Folder of noise recordings (WAV, FLAC, OGG, MP3) at any depth, without hidden
            files. White noise by default.

    Raises:
        ValueError: If an argument is out of range.
    """

    gain_db: tuple[float, float] | None = None
    snr_db: tuple[float, float] | None = None
    noise_folder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gain_db", "snr_db"):
            value = getattr(self, name)
            if value is not None and not value[0] <= value[1]:
                raise ValueError(f"{name} must be two increasing numbers, got {tuple(value)}")
        if self.noise_folder is not None and self.snr_db is None:
            raise ValueError(
                "noise_folder needs snr_db, the level of the noise: set --data.augment.snr_db"
            )


class Augmenter:
    """Applies `AudioAugment`.

    Args:
        augment: The augmentation.
        sample_rate_hz: Sample rate of the clips, in Hz.
        resample: Whether noise recordings of other sample rates are resampled.

    Raises:
        FileNotFoundError: If the noise folder does not exist.
        ValueError: If the noise folder contains no recordings.
    """

    def __init__(self, augment: AudioAugment, *, sample_rate_hz: int, resample: bool) -> None:
        self.augment = augment
        self.noises: ClipReader | None = None
        if augment.noise_folder is not None:
            folder = Path(augment.noise_folder)
            if not folder.is_dir():
                raise FileNotFoundError(f"noise folder {folder} does not exist")
            paths = sorted(list_files(folder, EXTENSIONS))
            if not paths:
                raise ValueError(
                    f"noise folder {folder} has no files ending in {', '.join(EXTENSIONS)}"
                )
            self.noises = ClipReader(
                FileClips(paths, [()] * len(paths)),
                sample_rate_hz=sample_rate_hz,
                resample=resample,
            )

    def __call__(self, waveform: Waveform, rng: np.random.Generator) -> Waveform:
        """Return an augmented copy of a waveform `[S]`."""
        if self.augment.snr_db is not None:
            ratio = 10 ** (-rng.uniform(*self.augment.snr_db) / 20)
            noise = self._noise(len(waveform), rng)
            waveform = waveform + noise * np.float32(
                ratio * _rms(waveform) / max(_rms(noise), 1e-8)
            )
        if self.augment.gain_db is not None:
            waveform = waveform * np.float32(10 ** (rng.uniform(*self.augment.gain_db) / 20))
        return waveform

    def _noise(self, num_samples: int, rng: np.random.Generator) -> Waveform:
        if self.noises is None:
            return rng.standard_normal(num_samples, dtype=np.float32)
        index = int(rng.integers(len(self.noises.clips.labels)))
        noise = self.noises.read(index, max_samples=num_samples, position=rng.random())
        return np.resize(noise, num_samples)  # repeats short recordings


def _rms(waveform: Waveform) -> float:
    return float(np.sqrt(np.mean(np.square(waveform))))
