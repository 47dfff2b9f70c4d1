"""One clip as the model hears it in evaluation."""

from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.audio.clips import EXTENSIONS, LOUDEST, AudioClips, ClipInfo, FileClips, mono
from datamodules.audio.reader import ClipReader, Waveform
from datamodules.shared.reader import Reader
from diffmm.checks import Settings, check_choice

POSITIONS = {"start": 0.0, "center": 0.5, "full": 0.0}
"""Where a clip that is too long is cut."""


@dataclass(frozen=True, kw_only=True)
class AudioReader(Settings, Reader):
    """Sounds of any kind at one sample rate, cut or padded to a length.

    Attributes:
        sample_rate_hz: Sample rate of what comes out, in Hz.
        resample: whether clips of another rate are converted; otherwise they are refused.
        clip_samples: longer clips are cut to so many samples; `None` keeps them whole.
        crop: where they are cut: `"center"`, `"start"`, or `"full"` for not at all.
        pad: whether batches are `clip_samples` long; otherwise as long as their longest clip.

    Raises:
        ValueError: naming the field and the value.
    """

    class_path: ClassVar[str] = "datamodules.audio.AudioReader"
    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS
    kind: ClassVar[str] = "sound"

    sample_rate_hz: int
    resample: bool = True
    clip_samples: int | None = None
    crop: Literal["center", "start", "full"] = "center"
    pad: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("crop", self.crop, POSITIONS)
        for name in ("sample_rate_hz", "clip_samples"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.pad and (self.clip_samples is None or self.crop == "full"):
            raise ValueError("pad needs clip_samples, and a crop to them: 'center' or 'start'")

    def of(self, clips: AudioClips) -> ClipReader:
        """A reader of these clips at this sample rate."""
        return ClipReader(clips, sample_rate_hz=self.sample_rate_hz, resample=self.resample)

    def waveform(self, clips: AudioClips, index: int) -> Waveform:
        """`[S]` float32 in [-1, 1], what the model hears of a clip.

        Raises:
            ValueError: as `ClipReader.read`.
        """
        longest = None if self.crop == "full" else self.clip_samples
        position = POSITIONS[self.crop]
        return bounded(self.of(clips).read(index, max_samples=longest, position=position))

    def read(self, item: Any) -> dict[str, Any]:
        """`{"waveforms": [S], "num_samples": S}` of a sound.

        Args:
            item: the path of a file, or a waveform with its sample rate in Hz, `(waveform,
                sample_rate_hz)`: floats `[S]` or `[channels, S]` in [-1, 1], an array or a tensor.

        Raises:
            BadSampleError: naming the file, if it cannot be read.
            ValueError: for anything else.
        """
        clips = _NamedClip(Path(item)) if isinstance(item, str | Path) else _clip_of(item)
        waveform = self.waveform(clips, 0)
        return {"waveforms": waveform, "num_samples": len(waveform)}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad the clips to one length, with zeros after their ends."""
        longest = max(sample["num_samples"] for sample in samples)
        length = self.clip_samples if self.pad and self.clip_samples else longest
        padded = np.zeros((len(samples), length), np.float32)
        for row, sample in zip(padded, samples, strict=True):
            row[: sample["num_samples"]] = sample["waveforms"]
        return {
            "waveforms": torch.from_numpy(padded),
            "num_samples": torch.tensor([sample["num_samples"] for sample in samples]),
        }


def bounded(waveform: Waveform) -> Waveform:
    """A waveform in [-1, 1]: resampling, gain and noise may overshoot."""
    return np.clip(waveform, -1.0, 1.0)


class _NamedClip(FileClips):
    """One sound file, called by its name."""

    def __init__(self, path: Path) -> None:
        super().__init__([path], [()])

    def describe(self, index: int) -> str:
        return str(self.paths[index])


class _ArrayClip(AudioClips):
    """One waveform in memory."""

    def __init__(self, samples: NDArray[np.float32], sample_rate_hz: int) -> None:
        self.samples = samples
        self.sample_rate_hz = sample_rate_hz
        self.labels = [()]

    def describe(self, index: int) -> str:
        return "a waveform"

    def info(self, index: int) -> ClipInfo:
        return ClipInfo(len(self.samples), self.sample_rate_hz)

    def read(
        self, index: int, start: int = 0, num_samples: int | None = None
    ) -> NDArray[np.float32]:
        return self.samples[start : None if num_samples is None else start + num_samples]


def _clip_of(item: Any) -> _ArrayClip:
    if not isinstance(item, tuple) or len(item) != 2:
        raise ValueError(
            f"a sound must be a path, or a waveform with its sample rate, (waveform, "
            f"sample_rate_hz), got {type(item).__name__}"
        )
    waveform, rate_hz = item
    if not isinstance(rate_hz, Integral) or rate_hz < 1:
        raise ValueError(f"sample_rate_hz must be a whole number of at least 1, got {rate_hz!r}")
    samples = np.asarray(waveform.detach().cpu() if isinstance(waveform, Tensor) else waveform)
    if samples.ndim not in (1, 2) or not samples.size or samples.dtype.kind != "f":
        raise ValueError(
            f"a waveform must be floats [S] or [channels, S] with a sample at least, got "
            f"{samples.shape} in {samples.dtype}"
        )
    samples = samples.astype(np.float32)
    peak = float(np.abs(samples).max())
    if not peak <= LOUDEST:
        raise ValueError(f"a waveform has samples up to {peak:g}, where 1 is full scale: scale it")
    return _ArrayClip(samples if samples.ndim == 1 else mono(samples.T), int(rate_hz))
