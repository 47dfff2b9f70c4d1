"""The evaluation preprocessing of audio."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.audio.clips import EXTENSIONS, LOUDEST, AudioClips, ClipInfo, FileClips, mono
from datamodules.audio.reader import ClipReader, Waveform
from datamodules.shared.reader import Reader
from diffmm.checks import Settings, check_choice, check_count

POSITIONS = {"start": 0.0, "center": 0.5, "full": 0.0}
"""The position at which a long clip is cropped."""

MOST_CHANNELS = 32
"""Maximum number of channels of a waveform in memory. The axis of a 2-D array that is not longer
than this holds the channels, and the longer one the samples."""


@dataclass(frozen=True, kw_only=True)
class AudioReader(Settings, Reader):
    """Reads audio at one sample rate, cropped or padded to a length.

    Attributes:
        sample_rate_hz: Sample rate of the waveforms, in Hz.
        resample: Whether clips of other sample rates are resampled; otherwise they raise an error.
        clip_samples: Number of samples to which longer clips are cropped; `None` means no crop.
        crop: Position of the crop: `"center"`, `"start"`, or `"full"` for no crop.
        pad: Whether batches are padded to `clip_samples` instead of the longest clip.

    Raises:
        ValueError: If a field is out of range; the message names the field and the value.
    """

    class_path: ClassVar[str] = "datamodules.audio.AudioReader"
    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS
    kind: ClassVar[str] = "sound"
    data_class: ClassVar[str] = "datamodules.audio.AudioData"

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
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.pad and (self.clip_samples is None or self.crop == "full"):
            raise ValueError("pad needs clip_samples and crop 'center' or 'start'")

    def of(self, clips: AudioClips) -> ClipReader:
        """A `ClipReader` of these clips at this sample rate."""
        return ClipReader(clips, sample_rate_hz=self.sample_rate_hz, resample=self.resample)

    def waveform(self, clips: AudioClips, index: int) -> Waveform:
        """The model's input for a clip, `[S]` float32 in [-1, 1].

        Raises:
            ValueError: As `ClipReader.read`.
        """
        longest = None if self.crop == "full" else self.clip_samples
        position = POSITIONS[self.crop]
        return bounded(self.of(clips).read(index, max_samples=longest, position=position))

    def read(self, item: Any) -> dict[str, Any]:
        """Read a sound as `{"waveforms": [S], "num_samples": S}`.

        Args:
            item: The path of a file, or a pair `(waveform, sample_rate_hz)`: an array or tensor of
                floats in [-1, 1], and its sample rate in Hz. The waveform is `[S]`, `[S, C]` (as
                `soundfile.read` returns it) or `[C, S]` (as torchaudio does), with C of at most
                `MOST_CHANNELS` and S larger than that; the channels are averaged.

        Raises:
            BadSampleError: If the file cannot be read; the message names it.
            ValueError: If `item` has another type or shape, or a 2-D waveform could be read in
                both orders.
        """
        clips = _NamedClip(Path(item)) if isinstance(item, str | Path) else _clip_of(item)
        waveform = self.waveform(clips, 0)
        return {"waveforms": waveform, "num_samples": len(waveform)}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad the clips to equal length with zeros at the end."""
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
    """Clip a waveform to [-1, 1], which resampling, gain and noise may exceed."""
    return np.clip(waveform, -1.0, 1.0)


class _NamedClip(FileClips):
    """One sound file, described by its path."""

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
            f"a sound must be a path or a pair (waveform, sample_rate_hz), got "
            f"{type(item).__name__}"
        )
    waveform, rate_hz = item
    check_count("sample_rate_hz", rate_hz)
    samples = np.asarray(waveform.detach().cpu() if isinstance(waveform, Tensor) else waveform)
    if samples.ndim not in (1, 2) or not samples.size or samples.dtype.kind != "f":
        raise ValueError(
            f"a waveform must be floats [S], [S, C] or [C, S] with at least one sample, got "
            f"{samples.shape} in {samples.dtype}"
        )
    samples = samples.astype(np.float32)
    peak = float(np.abs(samples).max())
    if not np.isfinite(peak):
        raise ValueError("a waveform has samples that are not finite")
    if peak > LOUDEST:
        raise ValueError(f"a waveform has samples up to {peak:g}, but full scale is 1: rescale it")
    return _ArrayClip(samples if samples.ndim == 1 else mono(_channels_last(samples)), int(rate_hz))


def _channels_last(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """A waveform `[S, C]` or `[C, S]` as `[S, C]`.

    Raises:
        ValueError: If it could be both, or has more than `MOST_CHANNELS` channels.
    """
    shape = list(samples.shape)
    if min(shape) > MOST_CHANNELS:
        raise ValueError(
            f"a waveform {shape} would have {min(shape)} channels, but at most {MOST_CHANNELS} are "
            f"read: give [S], [S, C] or [C, S]"
        )
    if max(shape) <= MOST_CHANNELS:
        raise ValueError(
            f"a waveform {shape} is too short to tell its samples from its channels: average the "
            f"channels and give [S]"
        )
    return samples if shape[1] <= MOST_CHANNELS else samples.T
