"""Stems, which turn log-mel spectrograms `[B, num_mels, T]` into tokens `[B, N, dim]`."""

from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from diffmm.layers.linear import Conv1d
from diffmm.layers.patch import PatchEmbedding, Size
from diffmm.layers.spectrogram import Count, zero_beyond


class PatchStem(nn.Module):
    """Two-dimensional patch embedding of spectrograms (AST, Gong et al. 2021).

    Tokens are ordered by time, then by frequency, so that padding comes last. In frequency, bands
    at the top that no whole patch covers are ignored, as in AST.

    Args:
        num_mels: Number of mel bands of the spectrogram.
        dim: Width of the tokens.
        patch_size: Size of a patch, in frames and mel bands.
        stride: Distance between two patches, in frames and mel bands; the patch size by default.
        partial: Whether the last patch in time may end after the last frame, padded with zeros.
            Otherwise frames at the end that no whole patch covers are ignored, as in AST.

    Raises:
        ValueError: If a patch has more than `num_mels` bands, or the stride leaves gaps.
    """

    def __init__(
        self,
        num_mels: int,
        dim: int,
        patch_size: Size,
        stride: Size | None = None,
        *,
        partial: bool = True,
    ) -> None:
        super().__init__()
        stride = stride or patch_size
        if patch_size[1] > num_mels:
            raise ValueError(
                f"a patch of {patch_size[1]} mel bands does not fit num_mels={num_mels}: "
                f"patch_size is (frames, mel bands)"
            )
        if min(*patch_size, *stride) < 1 or stride[0] > patch_size[0] or stride[1] > patch_size[1]:
            raise ValueError(
                f"patch_stride must be between 1 and patch_size, got {stride} and {patch_size}"
            )
        self.patch_size, self.stride, self.partial = patch_size, stride, partial
        self.num_bands = (num_mels - patch_size[1]) // stride[1] + 1
        self.embedding = PatchEmbedding(1, dim, patch_size, stride)

    def num_steps(self, num_frames: Count) -> Count:
        """Number of patches in time for `num_frames` frames (0 counts as 1)."""
        patch, stride = self.patch_size[0], self.stride[0]
        return (num_frames - patch + (stride - 1 if self.partial else 0)) // stride + 1

    def grid(self, num_frames: int) -> tuple[int, ...]:
        """Number of tokens in time and in frequency."""
        num_steps = self.num_steps(num_frames)
        # Inductor cannot compare the result of `max` with other symbolic sizes.
        return (num_steps if num_steps >= 1 else 1), self.num_bands

    def fill(self, spectrogram: Tensor) -> Tensor:
        """Pad `[B, num_mels, T]` to an image `[B, 1, T', num_mels]` of whole patches in time."""
        num_frames = spectrogram.shape[2]
        patch, stride = self.patch_size[0], self.stride[0]
        whole = (self.grid(num_frames)[0] - 1) * stride + patch
        # Contiguous, because inductor cannot sort the symbolic strides of a view that the backward
        # pass needs.
        return pad(spectrogram, (0, whole - num_frames)).transpose(1, 2).unsqueeze(1).contiguous()

    def forward(self, spectrogram: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Map `[B, num_mels, T]`, zero beyond a clip's frames, to `[B, N, dim]`."""
        return self.embedding(self.fill(spectrogram))


class FrameStem(nn.Module):
    """One token per few frames of a spectrogram, by two convolutions over time, each followed by a
    GELU (Whisper, Radford et al. 2022).

    Args:
        num_mels: Number of mel bands of the spectrogram.
        dim: Width of the tokens.
        strides: Strides of the two convolutions.

    Raises:
        ValueError: If a stride is not between 1 and 3, the kernel size of the convolutions.
    """

    WIDTH = 3

    def __init__(self, num_mels: int, dim: int, strides: Size = (1, 2)) -> None:
        super().__init__()
        if not all(1 <= stride <= self.WIDTH for stride in strides):
            raise ValueError(f"frame_strides must be between 1 and {self.WIDTH}, got {strides}")
        self.strides = strides
        channels = (num_mels, dim)
        self.convs = nn.ModuleList(
            Conv1d(inputs, dim, self.WIDTH, stride=stride, padding=self.WIDTH // 2)
            for inputs, stride in zip(channels, strides, strict=True)
        )

    def num_steps(self, num_frames: Count) -> Count:
        """Number of tokens for `num_frames` frames."""
        for stride in self.strides:
            num_frames = (num_frames + stride - 1) // stride
        return num_frames

    def grid(self, num_frames: int) -> tuple[int, ...]:
        """Number of tokens in time."""
        return (self.num_steps(num_frames),)

    def forward(self, spectrogram: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Map `[B, num_mels, T]`, zero beyond a clip's frames, to `[B, N, dim]`.

        Activations beyond a clip's end are set to zero before the second convolution too, so that
        the result does not depend on padding.
        """
        x = spectrogram
        for conv, stride in zip(self.convs, self.strides, strict=True):
            x = gelu(conv(x))
            if num_frames is not None:
                num_frames = (num_frames + stride - 1) // stride
                x = zero_beyond(x, num_frames)
        return x.transpose(1, 2)
