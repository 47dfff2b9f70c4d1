"""Stems: from a log-mel spectrogram to tokens, `[B, num_mels, T]` to `[B, N, dim]`."""

from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from diffmm.layers.linear import Conv1d
from diffmm.layers.patch import PatchEmbedding, Size
from diffmm.layers.spectrogram import Count, zero_beyond


class PatchStem(nn.Module):
    """Spectrogram to tokens by two-dimensional patches (AST, Gong et al. 2021).

    Tokens are ordered by time first, then by frequency, so that padding stands at the end. In time
    the last patch is filled up with zeros; in frequency what no whole patch covers at the top is
    not seen, as in AST.

    Args:
        num_mels: height of the spectrogram.
        dim: of the tokens.
        patch_size: of a patch, in frames and in mel bands.
        stride: from one patch to the next, the patch size by default.

    Raises:
        ValueError: for a patch higher than the spectrogram, or a stride that leaves gaps.
    """

    def __init__(
        self, num_mels: int, dim: int, patch_size: Size, stride: Size | None = None
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
        self.patch_size, self.stride = patch_size, stride
        self.num_bands = (num_mels - patch_size[1]) // stride[1] + 1
        self.embedding = PatchEmbedding(1, dim, patch_size, stride)

    def num_steps(self, num_frames: Count) -> Count:
        """How many patches in time cover so many frames (0 counts as 1)."""
        patch, stride = self.patch_size[0], self.stride[0]
        return (num_frames - patch + stride - 1) // stride + 1

    def grid(self, num_frames: int) -> tuple[int, ...]:
        """Tokens in time and in frequency."""
        num_steps = self.num_steps(num_frames)
        # Not `max`, which inductor cannot compare with other symbolic sizes.
        return (num_steps if num_steps >= 1 else 1), self.num_bands

    def fill(self, spectrogram: Tensor) -> Tensor:
        """`[B, num_mels, T]` as an image `[B, 1, T', num_mels]` of whole patches in time."""
        num_frames = spectrogram.shape[2]
        patch, stride = self.patch_size[0], self.stride[0]
        whole = (self.grid(num_frames)[0] - 1) * stride + patch
        # Contiguous: inductor sorts the strides of a view that the backward pass needs, which it
        # cannot where they are symbols.
        return pad(spectrogram, (0, whole - num_frames)).transpose(1, 2).unsqueeze(1).contiguous()

    def forward(self, spectrogram: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """`[B, num_mels, T]`, zero beyond a clip's frames, to `[B, N, dim]`."""
        return self.embedding(self.fill(spectrogram))


class FrameStem(nn.Module):
    """Spectrogram to a token every few frames, by two convolutions over time, each followed by a
    GELU (Whisper, Radford et al. 2022).

    Args:
        num_mels: channels of the spectrogram.
        dim: of the tokens.
        strides: of the two convolutions.

    Raises:
        ValueError: for a stride that is not between 1 and 3, the width of the convolutions.
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
        """How many tokens so many frames become."""
        for stride in self.strides:
            num_frames = (num_frames + stride - 1) // stride
        return num_frames

    def grid(self, num_frames: int) -> tuple[int, ...]:
        """Tokens in time."""
        return (self.num_steps(num_frames),)

    def forward(self, spectrogram: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """`[B, num_mels, T]`, zero beyond a clip's frames, to `[B, N, dim]`.

        The second convolution must see zeros beyond a clip's end too, as it would if the clip
        stood alone.
        """
        x = spectrogram
        for conv, stride in zip(self.convs, self.strides, strict=True):
            x = gelu(conv(x))
            if num_frames is not None:
                num_frames = (num_frames + stride - 1) // stride
                x = zero_beyond(x, num_frames)
        return x.transpose(1, 2)
