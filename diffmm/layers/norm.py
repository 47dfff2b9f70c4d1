"""Normalizations. All compute in float32 (or wider) and give back their input's dtype."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffmm.layers.registry import Layer, registration


def upcast(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where it is wider."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) * weight` over the last axis (Zhang and Sennrich 2019).

    Args:
        dim: size of the last axis.
        eps: keeps a row of zeros finite; it also bounds the gain at `eps ** -0.5`.

    Attributes:
        init_weight: where `reset_parameters` starts the weights, 1 at first.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.init_weight = 1.0
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew."""
        nn.init.constant_(self.weight, self.init_weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = upcast(x)
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` in float32 whatever the input, eps 1e-6 as in timm's ViT."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class CosineNorm(nn.Module):
    """`x / |x|`, times a learned `exp(logit_scale)` a head where `num_heads` is given.

    On queries (scaled) and keys (not) it makes attention logits cosines, bounded by a temperature
    that starts at 10 and never passes 100 (SwinV2, Liu et al. 2022, eq. 2).

    Args:
        num_heads: heads of the input `[..., num_heads, D]` to scale, none by default.
    """

    def __init__(self, num_heads: int | None = None) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1)) if num_heads else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the temperatures anew, at 10."""
        if self.logit_scale is not None:
            nn.init.constant_(self.logit_scale, math.log(10.0))

    def forward(self, x: Tensor) -> Tensor:
        wide = nn.functional.normalize(upcast(x), dim=-1, eps=1e-6)
        if self.logit_scale is not None:
            wide = wide * self.logit_scale.clamp(max=math.log(100.0)).exp()
        return wide.to(x.dtype)


NORMS: dict[str, type[nn.Module]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
"""What `BackboneConfig.norm` may be: classes made from a width."""


def register_norm(name: str) -> Callable[[Layer], Layer]:
    """A class decorator with which `BackboneConfig(norm=name)` takes a norm, `Norm(dim)`."""
    return registration(NORMS, name)
