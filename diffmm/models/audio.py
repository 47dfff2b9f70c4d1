"""The audio model: a transformer over log-mel spectrograms of waveforms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffmm.batch import InputShapes
from diffmm.checks import check_choice
from diffmm.layers.fixed_spectrogram import (
    FixedSpectrogram,
    KaldiSpectrogram,
    WhisperSpectrogram,
)
from diffmm.layers.linear import INIT_STD, init_weights
from diffmm.layers.patch import as_size, patchify
from diffmm.layers.positions import Grid, coordinates, resample
from diffmm.layers.spectrogram import LogMelSpectrogram, check_waveforms, zero_beyond
from diffmm.layers.stem import FrameStem, PatchStem
from diffmm.models.encoder import Embedded, Encoder, EncoderConfig

SPECTROGRAMS: dict[str, Any] = {
    "log_mel": LogMelSpectrogram,
    "kaldi": KaldiSpectrogram,
    "whisper": WhisperSpectrogram,
}
"""Values of `AudioConfig.spectrogram`."""

NO_PATCHES = "masking needs patches that do not overlap: use stem 'patch' without patch_stride"


@dataclass(frozen=True, kw_only=True)
class AudioConfig(EncoderConfig):
    """Configuration of an audio model, in addition to the fields of `EncoderConfig`.

    Attributes:
        sample_rate_hz: Sample rate of the waveforms, in Hz.
        num_mels: Number of mel bands of the spectrogram.
        window_seconds: Length of the spectrogram's window, in seconds.
        hop_seconds: Distance between two frames of the spectrogram, in seconds.
        spectrogram: `"log_mel"` (see `LogMelSpectrogram`); or `"kaldi"`, that of AST, or
            `"whisper"`, for models trained with it (see `diffmm.layers.fixed_spectrogram`). Those
            two pad every clip to `clip_seconds`, and the padding is not masked.
        log_mel_mean: Mean of the log-mel values over the training set, for normalization. The
            default is that of AudioSet, as in AST.
        log_mel_std: Standard deviation of the log-mel values over the training set.
        stem: `"patch"` for two-dimensional patches as in AST, with 2-D rotary positions;
            `"frame"` for one token per few frames as in Whisper, with 1-D rotary positions.
        patch_size: Side of a patch, or its frames and mel bands; 16 by default. Patch stem only.
        patch_stride: Distance between two patches; the patch size by default. Patch stem only.
        partial_patches: Whether the last patch in time may end after the last frame; if not, frames
            at the end that no whole patch covers are ignored, as in AST. Patch stem only.
        frame_strides: Strides of the two convolutions; `(1, 2)` by default. Frame stem only.
        clip_seconds: Maximum length of a clip, in seconds; longer clips raise an error. Required
            by learned positions and spectrograms that pad, optional otherwise.

    Raises:
        ValueError: If a field is out of range; the message names the field and the value.
    """

    input_fields: ClassVar[tuple[str, ...]] = ("waveforms", "num_samples")
    # bfloat16 would lose the smallest energies of a sound.
    exact_fields: ClassVar[tuple[str, ...]] = ("waveforms",)

    sample_rate_hz: int
    num_mels: int = 128
    window_seconds: float = 0.025
    hop_seconds: float = 0.010
    spectrogram: Literal["log_mel", "kaldi", "whisper"] = "log_mel"
    log_mel_mean: float = -4.27
    log_mel_std: float = 4.57
    stem: Literal["patch", "frame"] = "patch"
    patch_size: int | tuple[int, int] | None = None
    patch_stride: int | tuple[int, int] | None = None
    partial_patches: bool = True
    frame_strides: tuple[int, int] | None = None
    clip_seconds: float | None = None

    def __post_init__(self) -> None:
        check_choice("stem", self.stem, ("patch", "frame"))
        check_choice("spectrogram", self.spectrogram, SPECTROGRAMS)
        super().__post_init__()
        for name, served in (
            ("patch_size", "patch"),
            ("patch_stride", "patch"),
            ("frame_strides", "frame"),
        ):
            if getattr(self, name) is not None and self.stem != served:
                raise ValueError(f"{name} is not used by stem {self.stem!r}: leave it out")
        if not self.partial_patches and self.stem != "patch":
            raise ValueError(f"partial_patches is not used by stem {self.stem!r}: leave it out")
        if self.spectrogram != "log_mel" and self.clip_seconds is None:
            raise ValueError(
                f"spectrogram={self.spectrogram!r} needs clip_seconds, to which it pads every clip"
            )
        if self.clip_seconds is not None and self.clip_seconds <= 0.0:
            raise ValueError(f"clip_seconds must be positive, got {self.clip_seconds}")
        if self.learned_positions and self.clip_seconds is None:
            raise ValueError("learned_positions needs clip_seconds, the maximum length of a clip")
        # Building the layers on the meta device runs their own checks.
        with torch.device("meta"):
            spectrogram, stem = self.make_spectrogram(), self.make_stem()
        if isinstance(stem, PatchStem) and isinstance(spectrogram, FixedSpectrogram):
            frames = spectrogram.clip_frames
            if not self.partial_patches and frames < stem.patch_size[0]:
                raise ValueError(
                    f"clip_seconds={self.clip_seconds} has {frames} frames, fewer than a patch of "
                    f"{stem.patch_size[0]}"
                )

    @property
    def num_axes(self) -> int:
        return 2 if self.stem == "patch" else 1

    def make(self) -> "AudioModel":
        return AudioModel(self)

    def input_shapes(self, batch_size: int, length: int | None = None) -> InputShapes:
        """`length` is in samples; by default `clip_seconds`, or ten seconds without it."""
        if length is None:
            length = self.samples_in(10.0 if self.clip_seconds is None else self.clip_seconds)
        return {
            "waveforms": ((batch_size, length), torch.float32),
            "num_samples": ((batch_size,), torch.int64),
        }

    @property
    def patch_shape(self) -> tuple[int, ...] | None:
        """Frames, mel bands and channels of a patch; None if there are none or they overlap."""
        if self.stem == "frame":
            return None
        patch_size = as_size(self.patch_size or 16)
        is_apart = self.patch_stride is None or as_size(self.patch_stride) == patch_size
        return (*patch_size, 1) if is_apart else None

    def samples_in(self, seconds: float) -> int:
        """Convert seconds to a number of samples, at least one."""
        return max(1, round(seconds * self.sample_rate_hz))

    def make_spectrogram(self) -> LogMelSpectrogram | FixedSpectrogram:
        """Build the spectrogram layer."""
        settings: dict[str, Any] = {
            "num_mels": self.num_mels,
            "window_seconds": self.window_seconds,
            "hop_seconds": self.hop_seconds,
            "mean": self.log_mel_mean,
            "std": self.log_mel_std,
        }
        if self.spectrogram != "log_mel":
            assert self.clip_seconds is not None
            settings["clip_samples"] = self.samples_in(self.clip_seconds)
        return SPECTROGRAMS[self.spectrogram](self.sample_rate_hz, **settings)

    def make_stem(self) -> PatchStem | FrameStem:
        """Build the layer that turns spectrograms into tokens."""
        if self.stem == "frame":
            return FrameStem(self.num_mels, self.backbone.dim, self.frame_strides or (1, 2))
        patch_size = as_size(self.patch_size or 16)
        stride = as_size(self.patch_stride) if self.patch_stride is not None else patch_size
        return PatchStem(
            self.num_mels, self.backbone.dim, patch_size, stride, partial=self.partial_patches
        )


class AudioModel(Encoder):
    """Audio classifier with timm's interface: log-mel spectrogram, stem, backbone, head.

    Given its `num_samples`, a clip has the same features alone and padded in a batch: frames,
    convolutions, attention and pooling all ignore the padding. Patches are ordered by time, then
    by frequency, so that padding comes last; rotary coordinates start at 1, time first.

    Attributes:
        augment: A module applied to normalized spectrograms `[B, num_mels, T]` in training mode,
            such as SpecAugment built from torchaudio's maskings; None by default.

    >>> model = diffmm.create_model("audio/sound_events_tiny")
    >>> waveforms, num_samples = torch.randn(2, 8000), torch.tensor([8000, 5000])
    >>> model(waveforms, num_samples).shape
    torch.Size([2, 10])
    """

    config: AudioConfig
    augment: nn.Module | None

    def __init__(self, config: AudioConfig) -> None:
        spectrogram, stem = config.make_spectrogram(), config.make_stem()
        grid = None
        if config.clip_seconds is not None:
            grid = stem.grid(spectrogram.num_frames(config.samples_in(config.clip_seconds)))
        super().__init__(config, grid)
        self.spectrogram, self.stem, self.augment = spectrogram, stem, None
        self.stem.apply(partial(init_weights, std=INIT_STD))

    def forward(self, waveforms: Tensor, num_samples: Tensor | None = None) -> Tensor:
        """Compute logits `[B, num_classes]`, or pooled features `[B, dim]` without a head.

        Args:
            waveforms: `[B, S]`, mono, in [-1, 1], at the model's sample rate.
            num_samples: `[B]` integers, the number of real samples of each clip (clamped to
                between 1 and `S`); all samples by default.

        Raises:
            ValueError: If a tensor has the wrong shape or a clip is longer than `clip_seconds`.
        """
        embedded = self.embed(waveforms, num_samples)
        return self.forward_head(self.encode(embedded)[0], key_padding=embedded.key_padding)

    def forward_features(self, waveforms: Tensor, num_samples: Tensor | None = None) -> Tensor:
        """Features `[B, P + N, dim]` after the final norm, `P` special tokens first.

        For padded clips, `key_padding` tells `forward_head` which patches are real.
        """
        return self.encode(self.embed(waveforms, num_samples))[0]

    def forward_intermediates(
        self,
        waveforms: Tensor,
        num_samples: Tensor | None = None,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NLC",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Patch features after several blocks, as in `ImageModel.forward_intermediates`; `"NCHW"`
        is `[B, dim, time, frequency]`, or `[B, dim, time]` with the frame stem."""
        embedded = self.embed(waveforms, num_samples)
        features, taken = self.encode(embedded, self._take_indices(indices), stop_early=stop_early)
        return self._arranged(
            features,
            taken,
            grid=self._grid(waveforms.shape[1]),
            norm=norm,
            output_fmt=output_fmt,
            return_prefix_tokens=return_prefix_tokens,
            intermediates_only=intermediates_only,
            output_dict=output_dict,
        )

    def embed(self, waveforms: Tensor, num_samples: Tensor | None = None) -> Embedded:
        """Turn waveforms into patch tokens, ordered by time, then by frequency."""
        log_mel, num_frames = self._log_mel(waveforms, num_samples)
        if self.augment is not None and self.training:
            log_mel = self.augment(log_mel)
            if num_frames is not None:
                log_mel = zero_beyond(log_mel, num_frames)
        grid = self.stem.grid(log_mel.shape[2])
        tokens = self.stem(log_mel.to(next(self.stem.parameters()).dtype), num_frames)
        if self.positions is not None:
            tokens = tokens + self.positions(tokens.shape[1])
        key_padding = self._key_padding(num_frames, grid) if num_frames is not None else None
        return Embedded(tokens, coordinates(grid, device=tokens.device), key_padding)

    def patchify(self, waveforms: Tensor, num_samples: Tensor | None = None) -> Tensor:
        """The normalized log-mel values of each patch, `[B, N, frames * mel bands]`.

        Raises:
            ValueError: If the stem has no patches or they overlap.
        """
        if not isinstance(self.stem, PatchStem) or self.config.patch_shape is None:
            raise ValueError(NO_PATCHES)
        log_mel, _ = self._log_mel(waveforms, num_samples)
        return patchify(self.stem.fill(log_mel), self.stem.patch_size)

    def num_patches(self, waveforms: Tensor, num_samples: Tensor | None = None) -> int:
        """Number of patches `N`, including padding."""
        return math.prod(self._grid(waveforms.shape[1]))

    def key_padding(self, waveforms: Tensor, num_samples: Tensor) -> Tensor:
        """`[B, N]` booleans, true where a patch contains samples of the clip."""
        check_waveforms(waveforms, num_samples)
        max_samples = waveforms.shape[1]
        num_frames = self.spectrogram.num_frames(num_samples.clamp(1, max_samples))
        return self._key_padding(num_frames, self._grid(max_samples))

    def set_input_size(self, clip_seconds: float) -> None:
        """Change the maximum length of a clip.

        Learned positions are cut for shorter clips and interpolated for longer ones. They become
        a new parameter, so call this before creating an optimizer. Rotary coordinates do not
        change.

        Raises:
            ValueError: If the length is not positive.
        """
        self.config = replace(self.config, clip_seconds=clip_seconds)
        if isinstance(self.spectrogram, FixedSpectrogram):
            self.spectrogram.clip_samples = self.config.samples_in(clip_seconds)
        self._set_grid(self._grid(self.config.samples_in(clip_seconds)))
        self._describe_to_timm()

    @property
    def reduction(self) -> int:
        """Number of spectrogram frames per token."""
        if isinstance(self.stem, PatchStem):
            return as_size(self.config.patch_stride or self.config.patch_size or 16)[0]
        return math.prod(self.config.frame_strides or (1, 2))

    def timm_cfg(self) -> dict[str, Any]:
        return {"sample_rate_hz": self.config.sample_rate_hz}

    def _resample_positions(self, positions: Tensor, grid: Grid) -> Tensor:
        return resample(positions[: grid[0]], grid)

    def _grid(self, num_samples: int) -> Grid:
        return self.stem.grid(self.spectrogram.num_frames(num_samples))

    def _key_padding(self, num_frames: Tensor, grid: Grid) -> Tensor:
        num_steps = self.stem.num_steps(num_frames).clamp(min=1)
        real = torch.arange(grid[0], device=num_frames.device) < num_steps[:, None]
        return real.repeat_interleave(math.prod(grid[1:]), dim=1)

    def _log_mel(
        self, waveforms: Tensor, num_samples: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The spectrogram and its number of frames, as returned by `LogMelSpectrogram`."""
        seconds, longest = (
            waveforms.shape[-1] / self.config.sample_rate_hz,
            self.config.clip_seconds,
        )
        if longest is not None and waveforms.shape[-1] > self.config.samples_in(longest):
            raise ValueError(
                f"clips of {seconds:g} s are longer than clip_seconds={longest:g}: cut them or "
                f"call set_input_size({seconds:g})"
            )
        return self.spectrogram(waveforms, num_samples)
