"""Normalization layers. All compute in float32 (or wider) and return their input's dtype."""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffmm.layers.registry import Layer, registration


def upcast(x: Tensor) -> Tensor:
    """Cast `x` to float32, unless it is float64."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) * weight` over the last axis (Zhang and Sennrich 2019).

    Args:
        dim: Size of the last axis.
        eps: Keeps a row of zeros finite; it also limits the gain to `eps ** -0.5`.

    Attributes:
        init_weight: Initial value of the weights, used by `reset_parameters`; 1 by default.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.init_weight = 1.0
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights."""
        nn.init.constant_(self.weight, self.init_weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = upcast(x)
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class ZeroCenteredRMSNorm(RMSNorm):
    """`x / sqrt(mean(x²) + eps) * (1 + weight)`: the weights start at 0, and in half precision they
    are most precise there (Gemma; Megatron's `layernorm_1p`)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps)
        self.init_weight = 0.0
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        wide = upcast(x)
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * (1.0 + upcast(self.weight))).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`, always in float32, with `eps=1e-6` as in timm's ViT."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class CosineNorm(nn.Module):
    """`x / |x|`, times a learned `exp(logit_scale)` per head if `num_heads` is given.

    Applied to queries (scaled) and keys (unscaled), it turns attention logits into cosines times a
    scale that is initialized to 10 and never exceeds 100 (SwinV2, Liu et al. 2022, eq. 2).

    Args:
        num_heads: Number of heads of the input `[..., num_heads, D]`; None means no scale.
    """

    def __init__(self, num_heads: int | None = None) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1)) if num_heads else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the scales to 10."""
        if self.logit_scale is not None:
            nn.init.constant_(self.logit_scale, math.log(10.0))

    def forward(self, x: Tensor) -> Tensor:
        wide = nn.functional.normalize(upcast(x), dim=-1, eps=1e-6)
        if self.logit_scale is not None:
            wide = wide * self.logit_scale.clamp(max=math.log(100.0)).exp()
        return wide.to(x.dtype)


NORMS: dict[str, type[nn.Module]] = {
    "rmsnorm": RMSNorm,
    "zero_centered_rmsnorm": ZeroCenteredRMSNorm,
    "layernorm": LayerNorm,
}
"""Values of `BackboneConfig.norm`: classes constructed from a width and, if given, `eps`."""


def make_norm(name: str, dim: int, eps: float | None = None) -> nn.Module:
    """Build the norm of this name over `dim` channels.

    Args:
        name: A name in `NORMS`.
        dim: Size of the last axis.
        eps: Added to the mean square or the variance; None uses the default of the norm.

    Raises:
        ValueError: If `eps` is given and not positive, or the norm does not take it.
    """
    if eps is None:
        return NORMS[name](dim)
    if eps <= 0.0:
        raise ValueError(f"norm_eps must be positive, got {eps}")
    if "eps" not in inspect.signature(NORMS[name].__init__).parameters:
        raise ValueError(f"norm_eps={eps} is not used by norm {name!r}, which takes no eps")
    return NORMS[name](dim, eps=eps)


def register_norm(name: str) -> Callable[[Layer], Layer]:
    """Class decorator that makes a norm, constructed as `Norm(dim)`, available as
    `BackboneConfig(norm=name)`; it may take `eps`, the config's `norm_eps`."""
    return registration(NORMS, name)
