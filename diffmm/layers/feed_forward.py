"""Feed-forward layers."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from diffmm.layers.linear import Linear
from diffmm.layers.norm import upcast
from diffmm.layers.registry import Layer, Split, registration


class FeedForward(nn.Module):
    """Base class of feed-forward layers.

    A subclass is constructed as `FeedForward(dim, width, bias=...)` and maps `[B, N, dim]` to
    `[B, N, dim]`.
    """

    num_matrices: ClassVar[int]
    """Number of `dim * width` weight matrices, used to equalize parameter counts."""

    split: ClassVar[dict[str, Split]]
    """How tensor parallelism splits each child module, as in `Attention.split`: by its output
    (`"columns"`) or its input (`"rows"`)."""


class SwiGLU(FeedForward):
    """`(silu(x W1) * x W3) W2` (Shazeer 2020), as in the paper's decoder.

    Args:
        dim: Width of input and output.
        width: Hidden width.
        bias: Whether the projections have a bias.
    """

    num_matrices = 3
    split: ClassVar[dict[str, Split]] = {
        "gate_proj": "columns",
        "up_proj": "columns",
        "down_proj": "rows",
    }

    def __init__(self, dim: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, width, bias=bias)
        self.up_proj = Linear(dim, width, bias=bias)
        self.down_proj = Linear(width, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activate(self.gate_proj(x)) * self.up_proj(x))

    def activate(self, x: Tensor) -> Tensor:
        """The activation of the gate."""
        return silu(x)


class TanhGEGLU(SwiGLU):
    """`(gelu(x W1) * x W3) W2` (Shazeer 2020) with the tanh approximation of GELU, as in Gemma.
    Arguments as in `SwiGLU`."""

    def activate(self, x: Tensor) -> Tensor:
        return gelu(x, approximate="tanh")


class PolyNorm(nn.Module):
    """`w1 n(x³) + w2 n(x²) + w3 n(x) + b` with `n(y) = y / sqrt(mean(y²) + eps)` over the last
    axis, a learned activation (Zhuo et al. 2024, "Polynomial Composition Activations").

    Args:
        eps: Keeps rows of zeros finite.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(3))
        self.bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights to 1/3 and the bias to 0."""
        nn.init.constant_(self.weight, 1 / 3)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        wide, weight = upcast(x), upcast(self.weight)
        powers = (wide**3, wide**2, wide)
        terms = (
            weight[i] * power * torch.rsqrt(power.square().mean(dim=-1, keepdim=True) + self.eps)
            for i, power in enumerate(powers)
        )
        return (sum(terms, start=upcast(self.bias))).to(x.dtype)


class PolyNormGLU(SwiGLU):
    """`(polynorm(x W1) * x W3) W2`, as in Motif. Arguments as in `SwiGLU`.

    `split` does not name the activation, so that tensor parallelism, whose devices would normalize
    only a part of the hidden width, is refused.
    """

    def __init__(self, dim: int, width: int, *, bias: bool = False) -> None:
        super().__init__(dim, width, bias=bias)
        self.activation = PolyNorm()

    def activate(self, x: Tensor) -> Tensor:
        return self.activation(x)


class GELU(FeedForward):
    """`gelu(x W1) W2`, as in ViT and AST. Arguments as in `SwiGLU`."""

    num_matrices = 2
    split: ClassVar[dict[str, Split]] = {"up_proj": "columns", "down_proj": "rows"}

    def __init__(self, dim: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.up_proj = Linear(dim, width, bias=bias)
        self.down_proj = Linear(width, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activate(self.up_proj(x)))

    @staticmethod
    def activate(x: Tensor) -> Tensor:
        """The activation."""
        return gelu(x)


class TanhGELU(GELU):
    """`gelu(x W1) W2` with the tanh approximation of GELU (Hendrycks and Gimpel 2016), as in GPT-2.
    Arguments as in `SwiGLU`."""

    @staticmethod
    def activate(x: Tensor) -> Tensor:
        return gelu(x, approximate="tanh")


class QuickGELU(GELU):
    """`a(x W1) W2` with `a(x) = x sigmoid(1.702 x)`, an approximation of GELU (Hendrycks and Gimpel
    2016), as in OpenAI's CLIP. Arguments as in `SwiGLU`."""

    @staticmethod
    def activate(x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


FEED_FORWARDS: dict[str, type[FeedForward]] = {
    "swiglu": SwiGLU,
    "gelu": GELU,
    "gelu_tanh": TanhGELU,
    "quick_gelu": QuickGELU,
    "geglu_tanh": TanhGEGLU,
    "polynorm_glu": PolyNormGLU,
}
"""Values of `BackboneConfig.feed_forward`."""


def register_feed_forward(name: str) -> Callable[[Layer], Layer]:
    """Class decorator that makes a `FeedForward` available as
    `BackboneConfig(feed_forward=name)`."""
    return registration(FEED_FORWARDS, name, FeedForward)  # type: ignore[arg-type]
