"""Reading a stretch of a clip at the model's sample rate, and making it louder, softer, noisier."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchaudio.transforms import Resample

from datamodules.audio_sources import EXTENSIONS, AudioClips, FileClips
from diffmm.checks import Settings

Waveform = NDArray[np.float32]


class ClipReader:
    """Clips at one sample rate, whole or cut to a length.

    Args:
        clips: what to read.
        sample_rate_hz: of the waveforms that come out.
        resample: convert clips of other rates; otherwise they are refused.
    """

    def __init__(self, clips: AudioClips, *, sample_rate_hz: int, resample: bool) -> None:
        self.clips = clips
        self.sample_rate_hz = sample_rate_hz
        self.resample = resample

    def num_samples(self, index: int) -> int:
        """A clip's whole length at this reader's sample rate.

        Raises:
            ValueError: naming the clip, if it cannot be read.
        """
        total, rate_hz = self.clips.info(index)
        return -(-total * self.sample_rate_hz // rate_hz)

    def read(
        self, index: int, *, max_samples: int | None = None, position: float = 0.0
    ) -> Waveform:
        """`[S]` float32: a clip, cut to `max_samples` if it is longer.

        Only the stretch itself is decoded, wherever in a long recording it is.

        Args:
            index: the clip.
            max_samples: the most samples that come out; `None` for the whole clip.
            position: in [0, 1], where the cut is: at the beginning (0), the middle, the end (1).

        Raises:
            ValueError: naming the clip, if it cannot be read, or has another sample rate than this
                reader's and `resample` is false, naming both.
        """
        total, rate_hz = self.clips.info(index)
        if rate_hz != self.sample_rate_hz and not self.resample:
            raise ValueError(
                f"{self.clips.describe(index)} has a sample rate of {rate_hz} Hz, not "
                f"{self.sample_rate_hz} Hz: set resample: true, or sample_rate_hz to its rate"
            )
        start, length = 0, total
        if max_samples is not None:
            length = min(total, -(-max_samples * rate_hz // self.sample_rate_hz))
            start = round(position * (total - length))
        waveform = self.clips.read(index, start, length)
        if rate_hz != self.sample_rate_hz:
            resampler = _resampler(rate_hz, self.sample_rate_hz)
            waveform = resampler(torch.from_numpy(waveform)).numpy()
        return waveform[:max_samples]


@lru_cache
def _resampler(from_hz: int, to_hz: int) -> Resample:
    return Resample(from_hz, to_hz)


@dataclass(frozen=True)
class AudioAugment(Settings):
    """How training clips are varied; nothing is by default.

    Attributes:
        gain_db: a clip's level is changed by a number of decibels between these two.
        snr_db: background noise is added, this much below the clip's level, between these two.
        noise_folder: recordings (WAV, FLAC, OGG) of the noise, at any depth. White noise by
            default.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    gain_db: tuple[float, float] | None = None
    snr_db: tuple[float, float] | None = None
    noise_folder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gain_db", "snr_db"):
            value = getattr(self, name)
            if value is not None and not value[0] <= value[1]:
                raise ValueError(f"{name} must be two rising numbers, got {tuple(value)}")
        if self.noise_folder is not None and self.snr_db is None:
            raise ValueError("noise_folder is of no use without snr_db: say how loud the noise is")


class Augmenter:
    """`AudioAugment` at work.

    Args:
        augment: what to do.
        sample_rate_hz, resample: for the noise recordings, as for the clips.

    Raises:
        FileNotFoundError: if there is no noise folder.
        ValueError: if it holds no recordings.
    """

    def __init__(self, augment: AudioAugment, *, sample_rate_hz: int, resample: bool) -> None:
        self.augment = augment
        self.noises: ClipReader | None = None
        if augment.noise_folder is not None:
            folder = Path(augment.noise_folder)
            if not folder.is_dir():
                raise FileNotFoundError(f"no noise folder {folder}")
            paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
            if not paths:
                raise ValueError(f"noise folder {folder} has no files of {', '.join(EXTENSIONS)}")
            self.noises = ClipReader(
                FileClips(paths, [()] * len(paths)),
                sample_rate_hz=sample_rate_hz,
                resample=resample,
            )

    def __call__(self, waveform: Waveform, rng: np.random.Generator) -> Waveform:
        """A varied copy of a waveform `[S]`."""
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
        return np.resize(noise, num_samples)  # a short recording repeats


def _rms(waveform: Waveform) -> float:
    return float(np.sqrt(np.mean(np.square(waveform))))
