"""Patches: from an image, or a spectrogram seen as one, to tokens and back."""

from torch import Tensor, nn

from diffmm.layers.linear import Conv2d

Size = tuple[int, int]


def as_size(value: int | tuple[int, int]) -> Size:
    """`(height, width)` of a square given by its side, or as it is."""
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def patchify(images: Tensor, patch_size: Size) -> Tensor:
    """Cut `[B, C, H, W]` into patches of `(h, w)`: `[B, N, h * w * C]`, row by row.

    Within a patch pixels go row by row, channels fastest (He et al. 2022).
    """
    height, width = patch_size
    x = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # [B, C, rows, h, columns, w]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: Size, grid: Size) -> Tensor:
    """The image `[B, C, H, W]` whose `patchify` is `patches`, of `grid` rows and columns."""
    height, width = patch_size
    x = patches.unflatten(2, (height, width, -1)).unflatten(1, grid)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class PatchEmbedding(nn.Module):
    """A linear map of every patch: `[B, C, H, W]` to `[B, N, dim]`, row by row.

    Args:
        in_channels: `C`.
        dim: of the tokens.
        patch_size: height and width of a patch.
        stride: from one patch to the next, the patch size by default. What no whole patch covers
            at the bottom and the right is not seen.
    """

    def __init__(
        self, in_channels: int, dim: int, patch_size: Size, stride: Size | None = None
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.stride = stride or patch_size
        self.proj = Conv2d(in_channels, dim, patch_size, stride=self.stride)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)
