"""Feed-forward layers."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from diffmm.layers.linear import Linear
from diffmm.layers.registry import Layer, Split, registration


class FeedForward(nn.Module):
    """What feed-forward layers declare about themselves.

    A subclass is made as `FeedForward(dim, width, bias=...)` and maps `[B, N, dim]` to the same.
    """

    num_matrices: ClassVar[int]
    """Matrices of `dim * width` weights, from which an equal number of parameters is derived."""

    split: ClassVar[dict[str, Split]]
    """How tensor parallelism divides each child module, as in `Attention.split`: by its output
    `"columns"` or its input `"rows"`."""


class SwiGLU(FeedForward):
    """`(silu(x W1) * x W3) W2` (Shazeer 2020), as in the paper's decoder.

    Args:
        dim: Width of input and output.
        width: Width in between.
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
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class GELU(FeedForward):
    """`gelu(x W1) W2`, as in ViT and AST. Arguments as in `SwiGLU`."""

    num_matrices = 2
    split: ClassVar[dict[str, Split]] = {"up_proj": "columns", "down_proj": "rows"}

    def __init__(self, dim: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.up_proj = Linear(dim, width, bias=bias)
        self.down_proj = Linear(width, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gelu(self.up_proj(x)))


FEED_FORWARDS: dict[str, type[FeedForward]] = {"swiglu": SwiGLU, "gelu": GELU}
"""What `BackboneConfig.feed_forward` may be."""


def register_feed_forward(name: str) -> Callable[[Layer], Layer]:
    """A class decorator with which `BackboneConfig(feed_forward=name)` takes a `FeedForward`."""
    return registration(FEED_FORWARDS, name, FeedForward)  # type: ignore[arg-type]
