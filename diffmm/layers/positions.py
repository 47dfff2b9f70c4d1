"""Positions of tokens on a grid: learned embeddings and rotary coordinates."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

Grid = tuple[int, ...]
"""Number of tokens along each axis: rows and columns, time and frequency, or time alone."""


class LearnedPositions(nn.Module):
    """A learned vector per position of a grid and, if wanted, per special token before it.

    Args:
        grid: Size of the grid, with one or two axes.
        dim: Width of the tokens.
        num_prefix: Number of tokens outside the grid (class token, register tokens) that have a
            vector; 0 if they have none.
        init_std: Standard deviation of the initial vectors.
    """

    def __init__(self, grid: Grid, dim: int, num_prefix: int, init_std: float = 0.02) -> None:
        super().__init__()
        self.init_std = init_std
        self.grid = nn.Parameter(torch.empty(*grid, dim))
        self.prefix = nn.Parameter(torch.empty(num_prefix, dim)) if num_prefix else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the vectors."""
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=self.init_std)

    def forward(self, num_tokens: int) -> Tensor:
        """The vectors of the first `num_tokens` positions, row by row: `[N, dim]`."""
        return self.grid.flatten(0, -2)[:num_tokens]


def resample(positions: Tensor, grid: Grid) -> Tensor:
    """Resample learned positions `[*old_grid, dim]` to another grid: `[*grid, dim]`.

    Bicubic with antialiasing, as in timm's `resample_abs_pos_embed`. If the grids are equal, the
    tensor itself is returned.
    """
    if tuple(positions.shape[:-1]) == grid:
        return positions
    resampled = positions.float()
    # One axis at a time, as a row: the filter is separable, and torch 2.11 gives wrong results
    # for images that it resizes to a width of one pixel.
    for axis, size in enumerate(grid):
        rows = resampled.movedim(axis, -1)
        row = interpolate(
            rows.reshape(1, -1, 1, rows.shape[-1]), (1, size), mode="bicubic", antialias=True
        )
        resampled = row.reshape(*rows.shape[:-1], size).movedim(-1, axis)
    return resampled.to(positions.dtype).contiguous()


def coordinates(
    grid: Grid, reference: Sequence[int] | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Rotary coordinates of a grid, starting at 1; 0 is reserved for tokens outside the grid.

    With a `reference` grid the coordinates refer to that grid: the grid is stretched over it, with
    aligned cell centers, as EVA does for other image sizes (Fang et al. 2023).

        coordinate_i = (i + 1/2) * reference / size + 1/2

    Returns:
        `[N, 2]` in float32, row by row, or `[N]` for a grid of one axis.
    """
    return _on_grid(
        [
            (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (full / size) + 0.5
            for size, full in zip(grid, reference or grid, strict=True)
        ]
    )


def normalized_coordinates(grid: Grid, device: torch.device | str | None = None) -> Tensor:
    """Rotary coordinates of a grid that do not depend on its size: `2π` times a coordinate between
    -1 and 1, with 0 in the middle (DINOv3, Siméoni et al. 2025, section 3.2).

        coordinate_i = 2π (2 (i + 1/2) / size - 1)

    Returns:
        `[N, 2]` in float32, row by row, or `[N]` for a grid of one axis.
    """
    return _on_grid(
        [
            ((torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size * 2.0 - 1.0)
            * (2.0 * math.pi)
            for size in grid
        ]
    )


def _on_grid(axes: list[Tensor]) -> Tensor:
    """The coordinates of all positions of a grid, row by row, given those along each axis."""
    if len(axes) == 1:
        return axes[0]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
