"""The backbone: a stack of transformer blocks between an embedding and a head."""

from collections.abc import Collection
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from diffmm.layers.attention import Attention
from diffmm.layers.block import Block
from diffmm.layers.cache import KVCache
from diffmm.layers.cross_attention import Context
from diffmm.layers.linear import init_weights
from diffmm.models.backbone_config import BackboneConfig
from diffmm.ops import AttentionMask
from diffmm.ops.checks import check_mask

__all__ = ["Backbone", "BackboneConfig"]

WIDE = 512
"""At this width and above, the headwise norm of v1 is initialized to 1, which was measured to be
better there; below it, to the size of a value (docs/lab_notes.md, "A slow start")."""


class Backbone(nn.Module):
    """Blocks and a final norm: `[B, N, dim]` to `[B, N, dim]`, for every modality.

    Attributes:
        activation_checkpointing: Whether blocks are recomputed in the backward pass instead of
            storing their activations. This is a training choice and so not part of the config.

    >>> config = diffmm.BackboneConfig(dim=64, depth=2, num_heads=4)
    >>> backbone = diffmm.Backbone(config)
    >>> backbone(torch.randn(2, 10, 64), mask=diffmm.AttentionMask()).shape
    torch.Size([2, 10, 64])
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.rope = config.make_rope() if config.rope != "none" else None
        self.blocks = nn.ModuleList(config.make_block(index) for index in range(config.depth))
        self.norm = config.make_final_norm()
        self.apply(partial(init_weights, std=config.init_std))
        # Each block adds two residual branches; scaled this way, their sum does not grow with
        # depth.
        for name, module in self.named_modules():
            if name.endswith(("out_proj", "down_proj")):
                init_weights(module, config.init_std * (2 * config.depth) ** -0.5)
        if config.dim < WIDE:
            for attention in self.attentions:
                attention.init_head_size(config.init_std * config.dim**0.5)

    def forward(
        self,
        x: Tensor,
        *,
        mask: AttentionMask,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        context: Context | None = None,
        indices: Collection[int] | None = None,
        stop_early: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Run the blocks and the final norm.

        Args:
            x: Embedded tokens, `[B, N, dim]`.
            mask: Which tokens each token attends to.
            positions: Positions of the tokens, `[N]` or `[B, N]` (with a last axis of size 2 for
                2-D rope); by default 0, 1, 2, ..., continuing after the cached tokens. Unused
                without rope.
            cache: Keys and values of earlier tokens; those of `x` are appended.
            context: What the blocks' cross-attention reads, where they have one (see
                `diffmm.models.cross_attention`). Later calls with the same cache leave it out.
            indices: Blocks whose outputs, before the final norm, are also returned.
            stop_early: Skip the blocks after the last of `indices`.

        Returns:
            `[B, N, dim]`; with `indices`, a pair of this and the list of those blocks' outputs, in
            ascending order.

        Raises:
            ValueError: If `x` has another shape, `mask` is not an `AttentionMask`, 2-D rope has no
                positions, the cache has a different number of layers or no room for these tokens,
                or there is a context and no block reads it.
        """
        if x.ndim != 3 or x.shape[2] != self.config.dim:
            raise ValueError(f"x must be [B, N, {self.config.dim}], got shape {tuple(x.shape)}")
        check_mask(mask)
        if context is not None and all(block.cross_attention is None for block in self.blocks):
            raise ValueError("no block has cross-attention, which reads a context: leave it out")
        rope = None
        if self.rope is not None:
            if positions is None:
                if self.rope.num_axes > 1:
                    raise ValueError("2-D rope needs positions of shape [N, 2], got None")
                positions = torch.arange(x.shape[1], device=x.device)
                if cache is not None:
                    positions = positions + cache.length
            rope = self.rope(positions)
        recompute = self.activation_checkpointing and self.training
        count = len(self.blocks)
        last = max(indices, default=count - 1) if stop_early and indices is not None else count - 1
        # Indexed by place in the list: copied blocks share the same `layer_index`.
        caches = [None] * count if cache is None else cache.layers(count)
        intermediates = []
        for index, (block, own) in enumerate(zip(self.blocks, caches, strict=True)):
            x = block(x, mask=mask, rope=rope, cache=own, context=context, recompute=recompute)
            if indices is not None and index in indices:
                intermediates.append(x)
            if index == last:
                break
        if cache is not None:
            cache.advance(x.shape[1])
        x = self.norm(x)
        return x if indices is None else (x, intermediates)

    @property
    def attentions(self) -> list[Attention]:
        """The attention layer of each block."""
        return [cast(Block, block).attention for block in self.blocks]

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """Create an empty key-value cache on this backbone's device, in its compute dtype."""
        weight = self.attentions[0].q_proj.weight
        kind = weight.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        return KVCache(
            [attention.k_shape for attention in self.attentions],
            [attention.v_shape for attention in self.attentions],
            batch=batch,
            max_length=max_length,
            dtype=torch.get_autocast_dtype(kind) if autocast else weight.dtype,
            device=weight.device,
        )
