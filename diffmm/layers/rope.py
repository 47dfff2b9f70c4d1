"""Rotary position embedding (Su et al. 2021) over one or several axes."""

import torch
from torch import Tensor, nn

from diffmm.layers.constant import Constant
from diffmm.layers.rope_scaling import RopeScaling

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, each `[N, D/2]` or `[B, N, D/2]`."""


class RotaryEmbedding(nn.Module):
    """Map positions to rotations: the dimensions `(2j, 2j + 1)` are rotated by the angle
    `position * base^(-2j/D)`.

    With several axes, the first `D / num_axes` dimensions are rotated by the first coordinate, the
    next by the second, and so on. Position 0 means no rotation; it is used for tokens without a
    position (class token, register tokens).

    Args:
        head_dim: Head dimension `D`, a multiple of `2 * num_axes`.
        base: Base of the wavelengths; the slowest pair has a period of about `2π * base` positions.
        num_axes: Number of axes: 1 for text, 2 for images and spectrograms.
        scaling: How the frequencies are changed for longer sequences; one axis only.

    Raises:
        ValueError: If `D` is not a multiple of `2 * num_axes`, `base` is not positive, or there is
            a scaling for several axes.
    """

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        num_axes: int = 1,
        scaling: RopeScaling | None = None,
    ) -> None:
        super().__init__()
        if head_dim % (2 * num_axes):
            raise ValueError(
                f"rotary embedding over {num_axes} axes needs a head_dim that is a multiple of "
                f"{2 * num_axes}, got {head_dim}"
            )
        if base <= 0.0:
            raise ValueError(f"rope_base must be positive, got {base}")
        if scaling is not None and num_axes != 1:
            raise ValueError(f"rope_scaling is for positions of one axis, got {num_axes} axes")
        self.base = base
        self.num_axes = num_axes
        axis_dim = head_dim // num_axes
        # Computed in Python's float64, so that all devices agree, including those without float64.
        frequencies = [base ** (-step / axis_dim) for step in range(0, axis_dim, 2)]
        if scaling is not None:
            frequencies = scaling.scaled(frequencies, base)
        self.factor = 1.0 if scaling is None else scaling.rotation_factor
        self.frequencies = Constant(torch.tensor(frequencies, dtype=torch.float32, device="cpu"))

    def forward(self, positions: Tensor) -> Rotation:
        """Compute the rotation of `positions`, `[N]` or `[B, N]`, with a last axis of size
        `num_axes` if there are several.

        Always in float32: at position 10,000 a bfloat16 angle is wrong by several full turns.
        """
        if self.num_axes == 1:
            positions = positions.unsqueeze(-1)
        # A compiled graph would fuse the sines and cosines into every use and recompute them in
        # every layer; for a single token that is cheaper than an extra kernel. (`is_compiling`
        # would also be true in `torch.export`, which, unless strict, should see torch's own
        # operators here.)
        once = torch.compiler.is_dynamo_compiling() and positions.shape[-2] > 1
        if once and not positions.requires_grad:
            return _rotation_op(positions, self.frequencies.value, self.factor)
        return rotation_at(positions, self.frequencies.value, self.factor)


def rotation_at(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> Rotation:
    """Rotation at `positions`, `[..., N, axes]`, given the `frequencies` of the pairs of one axis,
    `[axis_dim / 2]`, times `factor`."""
    angles = positions.float().unsqueeze(-1) * frequencies.float()  # [..., N, axes, axis_dim/2]
    angles = angles.flatten(-2)
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


@torch.library.custom_op("diffmm::rotation_at", mutates_args=())
def _rotation_op(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """`rotation_at` as a custom operator, which `torch.compile` neither inlines nor recomputes."""
    cos, sin = rotation_at(positions, frequencies, factor)
    return cos.contiguous(), sin.contiguous()


@_rotation_op.register_fake
def _(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    *tokens, num_axes = positions.shape
    shape = (*tokens, num_axes * frequencies.shape[0])
    cos, sin = (positions.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return cos, sin


def apply_rope(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate `x`, `[B, N, ..., D]`; dimensions are paired as `(2j, 2j + 1)`."""
    cos, sin = (
        part.reshape(*part.shape[:-1], *[1] * (x.ndim - 3), part.shape[-1]) for part in rotation
    )
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)
