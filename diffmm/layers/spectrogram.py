"""Log-mel spectrograms of waveforms."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from diffmm.layers.constant import Constant

Count = TypeVar("Count", int, Tensor)
"""A number of samples or frames, of a batch or of each of its clips."""

LOG_FLOOR = 1e-7
"""Smaller mel energies are clamped to this value, just below the noise of 16-bit samples."""


class LogMelSpectrogram(nn.Module):
    """Normalized log-mel spectrograms of waveforms, `(log(max(mel, 1e-7)) - mean) / std`.

    Frame `t` is a Hann window centered on samples `[t * hop, (t + 1) * hop)`, with silence before
    the start and after the end. A clip of `n` samples therefore has `ceil(n / hop)` frames, which
    are the same whether the clip is alone or padded. Frames beyond a clip's end are zero, which is
    the mean after normalization.

    Computed in float32 (or wider), even under autocast and in a module cast to half precision: the
    smallest relevant energies are 1e-11 of the largest.

    In a compiled graph the power spectrum is one opaque operator: inductor has no kernels for
    complex numbers, and would take longer to compile the Fourier transform than everything else.
    The exception is when gradients of the waveforms are needed.

    Args:
        sample_rate_hz: Sample rate of the waveforms, in Hz.
        num_mels: Number of mel bands between 0 Hz and half the sample rate.
        window_seconds: Length of the window, in seconds.
        hop_seconds: Distance between two frames, in seconds; at most `window_seconds`.
        mean: Mean of the log-mel values over the training set.
        std: Standard deviation of the log-mel values over the training set.

    Raises:
        ValueError: If a count or length is not positive, or the hop is longer than the window.
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
        self.window = Constant(
            torch.hann_window(self.window_samples, dtype=torch.float32, device="cpu")
        )
        self.filters = Constant(mel_filters(self.num_fft, sample_rate_hz, num_mels))

    def num_frames(self, num_samples: Count) -> Count:
        """Number of frames, `ceil(num_samples / hop)`."""
        return (num_samples + self.hop_samples - 1) // self.hop_samples

    def forward(
        self, waveforms: Tensor, num_samples: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the spectrograms of waveforms.

        Args:
            waveforms: `[B, S]`, mono, in [-1, 1].
            num_samples: `[B]` integers, the number of real samples of each clip (clamped to
                between 1 and `S`); all samples by default. Later samples are ignored.

        Returns:
            The spectrograms `[B, num_mels, T]`, `T = ceil(S / hop)`, and the number of frames of
            each clip, `[B]`, or None if all are real.

        Raises:
            ValueError: If a tensor has the wrong shape or there are no samples.
        """
        check_waveforms(waveforms, num_samples)
        num_frames = None
        if num_samples is not None:
            num_samples = num_samples.clamp(1, waveforms.shape[1])
            num_frames = self.num_frames(num_samples)
            waveforms = zero_beyond(waveforms, num_samples)
        length = (self.num_frames(waveforms.shape[1]) - 1) * self.hop_samples + self.num_fft
        left = (self.num_fft - self.hop_samples) // 2
        with without_autocast(waveforms.device.type):
            window, filters = self.window.value, self.filters.value
            waveforms = waveforms.to(window.dtype)
            waveforms = pad(waveforms, (left, length - left - waveforms.shape[1]))
            mel = (self._power(waveforms, window) @ filters).transpose(1, 2)
            log_mel = (mel.clamp(min=LOG_FLOOR).log() - self.mean) / self.std
        if num_frames is not None:
            log_mel = zero_beyond(log_mel, num_frames)
        return log_mel, num_frames

    def _power(self, waveforms: Tensor, window: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling() and not waveforms.requires_grad:
            return _power_spectrum_op(waveforms, window, self.num_fft, self.hop_samples)
        return power_spectrum(waveforms, window, self.num_fft, self.hop_samples)

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"


def power_spectrum(waveforms: Tensor, window: Tensor, num_fft: int, hop: int) -> Tensor:
    """Squared magnitudes of the Fourier transform of windows that start every `hop` samples:
    `[B, S]` to `[B, T, num_fft / 2 + 1]`. A window shorter than `num_fft` is centered in it."""
    spectrum = torch.stft(
        waveforms, num_fft, hop, len(window), window, center=False, return_complex=True
    )
    return spectrum.transpose(1, 2).abs().square()


@torch.library.custom_op("diffmm::power_spectrum", mutates_args=())
def _power_spectrum_op(waveforms: Tensor, window: Tensor, num_fft: int, hop: int) -> Tensor:
    """`power_spectrum` as a custom operator, which hides complex numbers from `torch.compile`."""
    return power_spectrum(waveforms, window, num_fft, hop).contiguous()


@_power_spectrum_op.register_fake
def _(waveforms: Tensor, window: Tensor, num_fft: int, hop: int) -> Tensor:
    batch, num_samples = waveforms.shape
    return waveforms.new_empty(batch, (num_samples - num_fft) // hop + 1, num_fft // 2 + 1)


def power_spectrum_of(frames: Tensor, num_fft: int) -> Tensor:
    """Squared magnitudes of the Fourier transform of frames `[B, T, window]`, padded with zeros to
    `num_fft`: `[B, T, num_fft / 2 + 1]`. In a compiled graph it is one opaque operator."""
    if torch.compiler.is_dynamo_compiling() and not frames.requires_grad:
        return _frame_power_op(frames, num_fft)
    return torch.fft.rfft(frames, num_fft).abs().square()


@torch.library.custom_op("diffmm::frame_power", mutates_args=())
def _frame_power_op(frames: Tensor, num_fft: int) -> Tensor:
    return torch.fft.rfft(frames, num_fft).abs().square()


@_frame_power_op.register_fake
def _(frames: Tensor, num_fft: int) -> Tensor:
    return frames.new_empty(*frames.shape[:2], num_fft // 2 + 1)


def fft_size(window_samples: int, sample_rate_hz: int, num_mels: int) -> int:
    """The smallest power of two that holds the window and gives every mel band a frequency bin.

    Mel bands are triangles, evenly spaced in `m = 2595 log10(1 + f / 700)`; the lowest band is the
    narrowest in Hz. If frequency bins were further apart than its width, a band could be empty.
    """
    top = 2595.0 * math.log10(1.0 + sample_rate_hz / 2 / 700.0)
    narrowest_hz = 700.0 * (10.0 ** (2.0 * top / (num_mels + 1) / 2595.0) - 1.0)
    return 1 << math.ceil(math.log2(max(window_samples, sample_rate_hz / narrowest_hz)))


def zero_beyond(x: Tensor, lengths: Tensor) -> Tensor:
    """Set `x`, `[B, ..., T]`, to zero from step `lengths[b]` on."""
    real = torch.arange(x.shape[-1], device=x.device) < lengths[:, None]
    return x.masked_fill(~real.view(x.shape[0], *[1] * (x.ndim - 2), -1), 0.0)


def check_waveforms(waveforms: Tensor, num_samples: Tensor | None) -> None:
    """Check that the tensors are a batch of mono clips.

    Raises:
        ValueError: If they are not; the message names the tensor and its shape.
    """
    if waveforms.ndim != 2 or waveforms.shape[1] == 0:
        raise ValueError(
            f"waveforms must be [B, S], mono, with at least one sample, "
            f"got shape {tuple(waveforms.shape)}"
        )
    if num_samples is not None and tuple(num_samples.shape) != (waveforms.shape[0],):
        raise ValueError(
            f"num_samples must be [B], one per clip, got shape {tuple(num_samples.shape)} "
            f"for {waveforms.shape[0]} waveforms"
        )


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Disable autocast; the meta device has none to disable."""
    if device_type == "meta":
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def mel_filters(
    num_fft: int,
    sample_rate_hz: int,
    num_mels: int,
    *,
    highest_hz: float | None = None,
    slaney: bool = False,
) -> Tensor:
    """torchaudio's mel filter bank, `[num_fft / 2 + 1, num_mels]` in float32 on the CPU.

    Args:
        num_fft: Size of the Fourier transform.
        sample_rate_hz: Sample rate, in Hz.
        num_mels: Number of mel bands.
        highest_hz: Upper edge of the highest band; half the sample rate by default.
        slaney: Whether the bands are Slaney's, with equal areas, instead of HTK's.
    """
    # torchaudio uses the default dtype, which may be half, and the default device, which may be
    # the meta device, and reads the values; it also has constants, made when it is imported.
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            from torchaudio.functional import melscale_fbanks  # not for text and image models

            return melscale_fbanks(
                num_fft // 2 + 1,
                0.0,
                highest_hz or sample_rate_hz / 2,
                num_mels,
                sample_rate_hz,
                norm="slaney" if slaney else None,
                mel_scale="slaney" if slaney else "htk",
            )
    finally:
        torch.set_default_dtype(default)
