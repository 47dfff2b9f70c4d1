"""Attention pooling."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from diffmm.layers.linear import Linear
from diffmm.layers.norm import LayerNorm
from diffmm.ops import AttentionMask, softmax_attention


class AttentionPool(nn.Module):
    """A learned query attends to all tokens (MAP, Zhai et al. 2022, "Scaling Vision Transformers").

        o = proj(softmax(Q Kᵀ / √D) V);  pooled = o + W2 activation(W1 norm(o))

    with `Q` from the learned query and `K`, `V` from the tokens, as in timm's
    `AttentionPoolLatent`, whose parameter names it uses.

    Args:
        dim: Width of the tokens.
        num_heads: Number of attention heads.
        width: Width of the feed-forward layer.
        init_std: Standard deviation of the initial query.
        norm_eps: `eps` of the norm, which is a LayerNorm; 1e-6 by default.
        activation: Activation of the feed-forward layer.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        width: int,
        init_std: float,
        *,
        norm_eps: float | None = None,
        activation: Callable[[Tensor], Tensor] = gelu,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.num_heads = num_heads
        self.init_std = init_std
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        self.norm = LayerNorm(dim) if norm_eps is None else LayerNorm(dim, norm_eps)
        self.mlp = nn.ModuleDict({"fc1": Linear(dim, width), "fc2": Linear(width, dim)})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the query."""
        nn.init.trunc_normal_(self.latent, std=self.init_std)

    def forward(self, x: Tensor, key_padding: Tensor | None = None) -> Tensor:
        """Map `[B, N, dim]` to `[B, dim]`; `key_padding`, `[B, N]`, is true for real tokens."""
        q = self.q(self.latent).expand(x.shape[0], -1, -1).unflatten(-1, (self.num_heads, -1))
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        mask = AttentionMask(key_padding=key_padding)
        pooled = self.proj(softmax_attention(q, k, v, mask=mask).flatten(2)).squeeze(1)
        hidden = self.activation(self.mlp["fc1"](self.norm(pooled)))
        return pooled + self.mlp["fc2"](hidden)
