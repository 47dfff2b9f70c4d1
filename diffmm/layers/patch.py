"""Patches: from images (or spectrograms treated as images) to tokens and back."""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from diffmm.layers.linear import Conv2d

Size = tuple[int, int]


def as_size(value: int | tuple[int, int]) -> Size:
    """Convert the side of a square to `(height, width)`; return a pair unchanged."""
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def patchify(images: Tensor, patch_size: Size) -> Tensor:
    """Cut `[B, C, H, W]` into patches of `(h, w)`: `[B, N, h * w * C]`, row by row.

    Within a patch pixels are ordered row by row, with channels last (He et al. 2022).
    """
    height, width = patch_size
    x = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # [B, C, rows, h, columns, w]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: Size, grid: Size) -> Tensor:
    """The image `[B, C, H, W]` whose `patchify` is `patches`, of `grid` rows and columns."""
    height, width = patch_size
    x = patches.unflatten(2, (height, width, -1)).unflatten(1, grid)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def resample_patches(weight: Tensor, patch_size: Size) -> Tensor:
    """Resample the weight `[dim, C, h, w]` of a patch embedding to another patch size.

    Uses the pseudo-inverse of resizing, so that the embedding of a resized patch changes as little
    as possible (FlexiViT, Beyer et al. 2023, section 3.4).
    """
    old = (weight.shape[-2], weight.shape[-1])
    if old == patch_size:
        return weight
    basis = torch.eye(old[0] * old[1], device=weight.device).unflatten(1, old).unsqueeze(1)
    resized = interpolate(basis, patch_size, mode="bicubic", antialias=True).flatten(1)
    # Row `i` of `resized` is the resized image of old pixel `i`.
    new = weight.float().flatten(2) @ torch.linalg.pinv(resized).T
    return new.unflatten(2, patch_size).to(weight.dtype)


class PatchEmbedding(nn.Module):
    """Patch embedding: a linear map from `[B, C, H, W]` to `[B, N, dim]`, row by row.

    Args:
        in_channels: Number of input channels `C`.
        dim: Width of the tokens.
        patch_size: Height and width of a patch.
        stride: Vertical and horizontal distance between two patches; the patch size by default.
            Pixels at the bottom and the right that no whole patch covers are ignored.
        bias: Whether the map has a bias.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        patch_size: Size,
        stride: Size | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.stride = stride or patch_size
        self.proj = Conv2d(in_channels, dim, patch_size, stride=self.stride, bias=bias)

    def set_patch_size(self, patch_size: Size) -> None:
        """Change the patch size and the stride to `patch_size`, with resampled weights."""
        old = self.proj
        self.patch_size = self.stride = patch_size
        self.proj = Conv2d(
            old.in_channels, old.out_channels, patch_size, stride=patch_size, bias=False
        )
        self.proj.init_std = old.init_std
        weight = resample_patches(old.weight.detach(), patch_size)
        self.proj.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
        self.proj.bias = old.bias

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)
