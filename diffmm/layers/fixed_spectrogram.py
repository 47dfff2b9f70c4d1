"""Log-mel spectrograms of AST and Whisper, whose models take clips of one length, padded."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from diffmm.layers.constant import Constant
from diffmm.layers.spectrogram import (
    Count,
    check_waveforms,
    mel_filters,
    power_spectrum_of,
    without_autocast,
    zero_beyond,
)

KALDI_FLOOR = 2.0**-23
"""Smaller mel energies are clamped to this value in Kaldi's filter banks: float32's epsilon."""

LOWEST_HZ = 20.0
"""Lower edge of Kaldi's lowest mel band."""

PREEMPHASIS = 0.97

HIGHEST_HZ = 8000
"""Upper edge of Whisper's highest mel band."""


class FixedSpectrogram(nn.Module):
    """Base class of spectrograms of clips that are all padded to one length.

    The padding is part of the clip, as in the training of these models: nothing masks it.

    Args:
        sample_rate_hz: Sample rate of the waveforms, in Hz.
        num_mels: Number of mel bands.
        window_seconds: Length of the window, in seconds.
        hop_seconds: Distance between two frames, in seconds.
        mean: Subtracted from the log-mel values.
        std: The log-mel values are then divided by it.
        clip_samples: Number of samples to which every clip is padded.

    Raises:
        ValueError: If a count or length is not positive, or a clip is shorter than a window.
    """

    def __init__(
        self,
        sample_rate_hz: int,
        *,
        num_mels: int,
        window_seconds: float,
        hop_seconds: float,
        mean: float,
        std: float,
        clip_samples: int,
    ) -> None:
        super().__init__()
        self.window_samples = round(window_seconds * sample_rate_hz)
        self.hop_samples = round(hop_seconds * sample_rate_hz)
        if min(sample_rate_hz, num_mels, self.hop_samples, self.window_samples) < 1 or std <= 0.0:
            raise ValueError(
                f"sample_rate_hz, num_mels, window_seconds, hop_seconds and std must be positive, "
                f"got {sample_rate_hz}, {num_mels}, {window_seconds}, {hop_seconds} and {std}"
            )
        if clip_samples < self.window_samples:
            raise ValueError(
                f"clips of {clip_samples} samples are shorter than a window of "
                f"{self.window_samples}: set a larger clip_seconds"
            )
        self.mean, self.std = mean, std
        self.clip_samples = clip_samples
        self.window = Constant(self.make_window())
        self.filters = Constant(self.make_filters(sample_rate_hz, num_mels))

    def make_window(self) -> Tensor:
        """The window, in float32 on the CPU."""
        return torch.hann_window(self.window_samples, dtype=torch.float32, device="cpu")

    def make_filters(self, sample_rate_hz: int, num_mels: int) -> Tensor:
        """The mel filters, `[num_fft / 2 + 1, num_mels]`, in float32 on the CPU."""
        raise NotImplementedError

    @property
    def clip_frames(self) -> int:
        """Number of frames of every clip."""
        raise NotImplementedError

    def num_frames(self, num_samples: Count) -> Count:
        """Number of frames, which does not depend on `num_samples`."""
        return num_samples * 0 + self.clip_frames

    def log_mel(self, waveforms: Tensor, num_samples: Tensor) -> Tensor:
        """Log-mel values `[B, num_mels, clip_frames]` of waveforms `[B, clip_samples]` that are
        zero from sample `num_samples[b]` on."""
        raise NotImplementedError

    def forward(self, waveforms: Tensor, num_samples: Tensor | None = None) -> tuple[Tensor, None]:
        """Compute the spectrograms of waveforms, in float32 (or wider).

        Args:
            waveforms: `[B, S]`, mono, in [-1, 1], with at most `clip_samples` samples.
            num_samples: `[B]` integers, the number of real samples of each clip (clamped to
                between 1 and `S`); all samples by default. Later samples are ignored.

        Returns:
            The spectrograms `[B, num_mels, clip_frames]`, and None, because all frames are real.

        Raises:
            ValueError: If a tensor has the wrong shape or there are no samples.
        """
        check_waveforms(waveforms, num_samples)
        length = waveforms.shape[1]
        if num_samples is None:
            num_samples = torch.full((waveforms.shape[0],), length, device=waveforms.device)
        num_samples = num_samples.clamp(1, length)
        with without_autocast(waveforms.device.type):
            wide = waveforms if waveforms.dtype == torch.float64 else waveforms.float()
            padded = pad(zero_beyond(wide, num_samples), (0, self.clip_samples - length))
            return (self.log_mel(padded, num_samples) - self.mean) / self.std, None

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"


class KaldiSpectrogram(FixedSpectrogram):
    """Kaldi's log-mel filter banks as AST takes them (Gong et al. 2021; torchaudio's
    `compliance.kaldi.fbank` with a Hann window).

    Each frame, which starts at sample `t * hop`, has its mean removed and is pre-emphasized
    (`x_j - 0.97 x_(j-1)`) before the window. Frames that are not wholly within the clip have the
    log-mel value 0. A clip shorter than a window has only such frames.
    """

    @property
    def num_fft(self) -> int:
        """Size of the Fourier transform: the smallest power of two that holds the window."""
        return 1 << (self.window_samples - 1).bit_length()

    def make_window(self) -> Tensor:
        return torch.hann_window(
            self.window_samples, periodic=False, dtype=torch.float32, device="cpu"
        )

    def make_filters(self, sample_rate_hz: int, num_mels: int) -> Tensor:
        return kaldi_filters(self.num_fft, sample_rate_hz, num_mels)

    @property
    def clip_frames(self) -> int:
        return (self.clip_samples - self.window_samples) // self.hop_samples + 1

    def log_mel(self, waveforms: Tensor, num_samples: Tensor) -> Tensor:
        frames = waveforms.unfold(1, self.window_samples, self.hop_samples)  # [B, T, window]
        frames = frames - frames.mean(dim=-1, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        frames = (frames - PREEMPHASIS * before) * self.window.value
        power = power_spectrum_of(frames, self.num_fft)
        log_mel = (power @ self.filters.value.to(power.dtype)).clamp(min=KALDI_FLOOR).log()
        whole = (num_samples - self.window_samples) // self.hop_samples + 1
        return zero_beyond(log_mel.transpose(1, 2), whole.clamp(min=0))


class WhisperSpectrogram(FixedSpectrogram):
    """Whisper's log-mel spectrogram (Radford et al. 2022, section 2.2), of clips padded with
    silence: `log10(max(mel, 1e-10))`, not below the clip's maximum minus 8.

    Frame `t` is a Hann window centered on sample `t * hop`; beyond both ends the clip is reflected.
    The mel bands are Slaney's, between 0 Hz and 8000 Hz.

    Raises:
        ValueError: If `sample_rate_hz` is below 16000, or as in `FixedSpectrogram`.
    """

    def make_filters(self, sample_rate_hz: int, num_mels: int) -> Tensor:
        if sample_rate_hz < 2 * HIGHEST_HZ:
            raise ValueError(
                f"spectrogram='whisper' has mel bands up to {HIGHEST_HZ} Hz, which needs "
                f"sample_rate_hz of at least {2 * HIGHEST_HZ}, got {sample_rate_hz}"
            )
        return mel_filters(
            self.window_samples, sample_rate_hz, num_mels, highest_hz=HIGHEST_HZ, slaney=True
        )

    @property
    def clip_frames(self) -> int:
        return self.clip_samples // self.hop_samples

    def log_mel(self, waveforms: Tensor, num_samples: Tensor) -> Tensor:
        half = self.window_samples // 2
        around = pad(waveforms.unsqueeze(1), (half, half), mode="reflect").squeeze(1)
        frames = around.unfold(1, self.window_samples, self.hop_samples)[:, : self.clip_frames]
        power = power_spectrum_of(frames * self.window.value, self.window_samples)
        mel = power @ self.filters.value.to(power.dtype)
        log_mel = mel.clamp(min=1e-10).log10().transpose(1, 2)
        return torch.maximum(log_mel, log_mel.amax(dim=(1, 2), keepdim=True) - 8.0)


def kaldi_filters(num_fft: int, sample_rate_hz: int, num_mels: int) -> Tensor:
    """Kaldi's mel filter bank, `[num_fft / 2 + 1, num_mels]` in float32 on the CPU."""
    # A model may be built on the meta device, where torchaudio must not create its constants.
    with torch.device("cpu"):
        from torchaudio.compliance.kaldi import get_mel_banks  # not needed by text and image models

        filters, _ = get_mel_banks(num_mels, num_fft, sample_rate_hz, LOWEST_HZ, 0.0, 100, -500, 1)
    # The highest bin is in no band.
    return pad(filters.float(), (0, 1)).T.contiguous()
