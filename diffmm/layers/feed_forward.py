"""Feed-forward layers."""

from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from diffmm.layers.linear import Linear


class SwiGLU(nn.Module):
    """`(silu(x W1) * x W3) W2` (Shazeer 2020), as in the paper's decoder.

    Args:
        dim: width of input and output.
        width: width in between.
        bias: whether the three projections have one.
    """

    num_matrices = 3

    def __init__(self, dim: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, width, bias=bias)
        self.up_proj = Linear(dim, width, bias=bias)
        self.down_proj = Linear(width, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class GELU(nn.Module):
    """`gelu(x W1) W2`, as in ViT and AST. Arguments as in `SwiGLU`."""

    num_matrices = 2

    def __init__(self, dim: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.up_proj = Linear(dim, width, bias=bias)
        self.down_proj = Linear(width, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gelu(self.up_proj(x)))


FEED_FORWARDS: dict[str, type[SwiGLU] | type[GELU]] = {"swiglu": SwiGLU, "gelu": GELU}
