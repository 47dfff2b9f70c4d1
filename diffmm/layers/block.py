"""The transformer block."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffmm.layers.attention import Attention
from diffmm.layers.cache import LayerCache
from diffmm.layers.cross_attention import Context, CrossAttention
from diffmm.layers.rope import Rotation
from diffmm.ops import AttentionMask


class Block(nn.Module):
    """Pre-norm transformer block: attention and feed-forward, each in a residual branch.

        x = x + attention(norm(x));  x = x + feed_forward(norm(x))

    With post-norms, the output of each branch is normalized too (Gemma 2, Swin V2):

        x = x + post_norm(attention(norm(x)));  x = x + post_norm(feed_forward(norm(x)))

    With one norm instead of two, both are in the same branch (ViT-22B, Dehghani et al. 2023):

        x = x + (attention(norm(x)) + feed_forward(norm(x)))

    Between attention and feed-forward, a block of a decoder may read other tokens by its
    `cross_attention` (see `diffmm.layers.CrossAttention`), which is None by default.

    Args:
        attention: Any layer in `diffmm.layers.attention`.
        feed_forward: A module that maps `[B, N, dim]` to `[B, N, dim]`.
        norms: The two norms, for attention and for feed-forward; the second is None if both are in
            the same branch.
        dim: Width of the residual stream.
        dropout: Dropout rate on the output of each residual branch.
        drop_path: Rate at which a sample skips a residual branch (stochastic depth, Huang et al.
            2016).
        layer_scale: Initial value of a learned factor per channel on each residual branch (Touvron
            et al. 2021); None means no such factor.
        post_norms: The norms of the outputs of attention and feed-forward, if there are any.
    """

    def __init__(
        self,
        attention: Attention,
        feed_forward: nn.Module,
        norms: tuple[nn.Module, nn.Module | None],
        *,
        dim: int,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        post_norms: tuple[nn.Module | None, nn.Module | None] = (None, None),
    ) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = norms
        self.attention = attention
        self.cross_attention: CrossAttention | None = None
        self.feed_forward = feed_forward
        self.attention_branch, self.feed_forward_branch = (
            ResidualBranch(dim, dropout, drop_path, layer_scale, post_norm)
            if norm is not None
            else None
            for norm, post_norm in zip(norms, post_norms, strict=True)
        )

    def forward(
        self,
        x: Tensor,
        *,
        mask: AttentionMask,
        rope: Rotation | None = None,
        cache: LayerCache | None = None,
        context: Context | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Map `[B, N, dim]` to `[B, N, dim]`. With `recompute` (activation checkpointing, which
        excludes a cache) the backward pass recomputes all intermediate activations. The context is
        what `cross_attention` reads."""
        if recompute:
            # Checkpoint inside the block, so that a compiled block recomputes in compiled code.
            return checkpoint(self.compute, x, mask, rope, None, context, use_reentrant=False)
        return self.compute(x, mask, rope, cache, context)

    def compute(
        self,
        x: Tensor,
        mask: AttentionMask,
        rope: Rotation | None,
        cache: LayerCache | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """The computation of `forward`, which activation checkpointing runs twice."""
        assert self.attention_branch is not None
        normed = self.attention_norm(x)
        attended = self.attention(normed, mask=mask, rope=rope, cache=cache)
        if self.feed_forward_norm is None or self.feed_forward_branch is None:
            return x + self.attention_branch(attended + self.feed_forward(normed))
        x = x + self.attention_branch(attended)
        if self.cross_attention is not None:
            x = self.cross_attention(x, context, cache)
        return x + self.feed_forward_branch(self.feed_forward(self.feed_forward_norm(x)))


class ResidualBranch(nn.Module):
    """Norm, layer scale, dropout and stochastic depth of a residual branch's output."""

    def __init__(
        self,
        dim: int,
        dropout: float,
        drop_path: float,
        layer_scale: float | None,
        norm: nn.Module | None,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.layer_scale = layer_scale
        self.scale = nn.Parameter(torch.empty(dim)) if layer_scale is not None else None
        self.dropout = nn.Dropout(dropout)
        self.drop_path = drop_path
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the factors."""
        if self.scale is not None and self.layer_scale is not None:
            nn.init.constant_(self.scale, self.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        if self.scale is not None:
            x = x * self.scale
        x = self.dropout(x)
        if self.training and self.drop_path > 0.0:
            keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1.0 - self.drop_path)
            x = x * keep / (1.0 - self.drop_path)
        return x
