"""A learned projection of every head, subtracted from its output."""

import torch
from torch import Tensor, nn


class HeadProjections(nn.Module):
    """`o - λ F o` for the output `o` of each head, with a learned `F = I + weight` and `λ` per
    head: the differential extension (DEX) of softmax attention (Kong et al. 2025, arXiv 2505.16333,
    figure 9).

    `F` starts as the identity and `λ` as 1/2, so that the outputs are halved and both parameters
    have gradients. The paper changes a subset of the heads of each layer and anneals `λ` during
    training; here all heads are changed, and nothing is annealed.

    Args:
        num_heads: Number of heads.
        value_dim: Width of a head's output.
    """

    def __init__(self, num_heads: int, value_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, value_dim, value_dim))
        self.lambda_per_head = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize every `F` to the identity and every `λ` to 1/2."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.lambda_per_head, 0.5)

    def matrices(self) -> Tensor:
        """Compute `I - λ F` of each head, `[H, E, E]`."""
        identity = torch.eye(self.weight.shape[-1]).to(self.weight)
        return identity - self.lambda_per_head[:, None, None] * (identity + self.weight)

    def forward(self, heads: Tensor) -> Tensor:
        """Map `[B, N, H, E]` to the same shape."""
        # Not by `matrices`, because weights can be distributed tensors, and an identity is not.
        projected = heads + torch.einsum("hfe,bnhe->bnhf", self.weight.to(heads.dtype), heads)
        return (heads - self.lambda_per_head[:, None] * projected).to(heads.dtype)
