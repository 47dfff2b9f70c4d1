"""From a waveform to a log-mel spectrogram."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

Count = TypeVar("Count", int, Tensor)
"""A number of samples or frames: of a batch, or of each of its clips."""

LOG_FLOOR = 1e-7
"""Mel energies below this count as silence; the rounding of 16-bit samples lies just above it."""


class LogMelSpectrogram(nn.Module):
    """Waveforms to normalized log-mel spectrograms, `(log(max(mel, 1e-7)) - mean) / std`.

    Frame `t` looks at a Hann window around the middle of samples `[t * hop, (t + 1) * hop)`, with
    silence before the start and after the end, so a clip of `n` samples has `ceil(n / hop)` frames
    and they are the same whether the clip stands alone or is padded to a longer one. Frames beyond
    a clip's end are zero, which after normalization is the mean.

    Computed in float32 (or wider), under autocast and in a module cast to half too: the smallest
    energies that matter are 1e-11 of the largest.

    It is left out of compiled graphs: inductor has no kernels for complex numbers, and would take
    longer to compile the Fourier transform than all the rest.

    Args:
        sample_rate_hz: of the waveforms.
        num_mels: mel bands between 0 Hz and half the sample rate.
        window_seconds: length of the window.
        hop_seconds: from one frame to the next, at most the window.
        mean: of the log-mel values over the training set.
        std: likewise their standard deviation.

    Raises:
        ValueError: for a count or length that is not positive, or a hop longer than the window.
    """

    def __init__(
        self,
        sample_rate_hz: int,
        *,
        num_mels: int,
        window_seconds: float,
        hop_seconds: float,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        self.window_samples = round(window_seconds * sample_rate_hz)
        self.hop_samples = round(hop_seconds * sample_rate_hz)
        if sample_rate_hz < 1 or num_mels < 1 or std <= 0.0:
            raise ValueError(
                f"sample_rate_hz, num_mels and std must be positive, "
                f"got {sample_rate_hz}, {num_mels} and {std}"
            )
        if not 1 <= self.hop_samples <= self.window_samples:
            raise ValueError(
                f"hop_seconds must be at least one sample and at most window_seconds, got "
                f"{hop_seconds} and {window_seconds} at {sample_rate_hz} Hz"
            )
        self.mean, self.std = mean, std
        self.num_fft = fft_size(self.window_samples, sample_rate_hz, num_mels)
        self.mel = _mel_transform(
            sample_rate=sample_rate_hz,
            n_fft=self.num_fft,
            win_length=self.window_samples,
            hop_length=self.hop_samples,
            n_mels=num_mels,
            center=False,
        )

    def num_frames(self, num_samples: Count) -> Count:
        """`ceil(num_samples / hop)`."""
        return (num_samples + self.hop_samples - 1) // self.hop_samples

    @torch.compiler.disable
    def forward(
        self, waveforms: Tensor, num_samples: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Args:
            waveforms: `[B, S]`, mono, in [-1, 1].
            num_samples: `[B]` integers, how many of a clip's samples are real (taken between 1
                and `S`); all by default. What comes after them has no influence.

        Returns:
            The spectrograms `[B, num_mels, T]`, `T = ceil(S / hop)`, and the number of frames of
            each clip, `[B]`, or None where all are real.

        Raises:
            ValueError: for tensors of another shape, or without samples.
        """
        check_waveforms(waveforms, num_samples)
        num_frames = None
        if num_samples is not None:
            num_samples = num_samples.clamp(1, waveforms.shape[1])
            num_frames = self.num_frames(num_samples)
            waveforms = zero_beyond(waveforms, num_samples)
        length = (self.num_frames(waveforms.shape[1]) - 1) * self.hop_samples + self.num_fft
        left = (self.num_fft - self.hop_samples) // 2
        with _no_autocast(waveforms.device.type):
            waveforms = waveforms.to(next(self.mel.buffers()).dtype)
            waveforms = pad(waveforms, (left, length - left - waveforms.shape[1]))
            log_mel = self.mel(waveforms).clamp(min=LOG_FLOOR).log()
            log_mel = (log_mel - self.mean) / self.std
        if num_frames is not None:
            log_mel = zero_beyond(log_mel, num_frames)
        return log_mel, num_frames

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LogMelSpectrogram":
        """Move the module as usual, but leave window and filters their precision."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < 4 else moved

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"


def fft_size(window_samples: int, sample_rate_hz: int, num_mels: int) -> int:
    """The smallest power of two that holds the window and gives every mel band a frequency.

    Mel bands are triangles, evenly spaced in `m = 2595 log10(1 + f / 700)`; the lowest is the
    narrowest in Hz. With frequencies further apart than it is wide, a band could fall between two.
    """
    top = 2595.0 * math.log10(1.0 + sample_rate_hz / 2 / 700.0)
    narrowest_hz = 700.0 * (10.0 ** (2.0 * top / (num_mels + 1) / 2595.0) - 1.0)
    return 1 << math.ceil(math.log2(max(window_samples, sample_rate_hz / narrowest_hz)))


def zero_beyond(x: Tensor, lengths: Tensor) -> Tensor:
    """`x`, `[B, ..., T]`, with zeros from step `lengths[b]` on."""
    real = torch.arange(x.shape[-1], device=x.device) < lengths[:, None]
    return x.masked_fill(~real.view(x.shape[0], *[1] * (x.ndim - 2), -1), 0.0)


def check_waveforms(waveforms: Tensor, num_samples: Tensor | None) -> None:
    """Refuse what is no batch of mono clips.

    Raises:
        ValueError: naming the tensor and its shape.
    """
    if waveforms.ndim != 2 or waveforms.shape[1] == 0:
        raise ValueError(
            f"waveforms must be [B, S], mono, with at least one sample, "
            f"got shape {tuple(waveforms.shape)}"
        )
    if num_samples is not None and tuple(num_samples.shape) != (waveforms.shape[0],):
        raise ValueError(
            f"num_samples must be [B], one a clip, got shape {tuple(num_samples.shape)} "
            f"for {waveforms.shape[0]} waveforms"
        )


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Full precision; the meta device has no autocast to switch off."""
    if device_type == "meta":
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _mel_transform(**arguments: int) -> nn.Module:
    """torchaudio's transform. Its buffers follow from the config, so no checkpoint holds them."""
    from torchaudio.transforms import MelSpectrogram  # a model of text or images needs none of it

    # It looks at the filters' values, which a tensor on the meta device has not, and makes them in
    # the default dtype, which may be half.
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            mel = MelSpectrogram(**arguments)
    finally:
        torch.set_default_dtype(default)
    for module in mel.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer, persistent=False)
    return mel.to(torch.get_default_device())
