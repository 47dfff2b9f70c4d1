"""The one backbone: a stack of blocks between an embedding and a head."""

from collections.abc import Collection
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from diffmm.layers.attention import Attention
from diffmm.layers.block import Block
from diffmm.layers.cache import KVCache
from diffmm.layers.linear import init_weights
from diffmm.layers.norm import NORMS
from diffmm.models.backbone_config import BackboneConfig
from diffmm.ops import AttentionMask

__all__ = ["Backbone", "BackboneConfig"]

WIDE = 512
"""From this width on v1's headwise norm starts at 1, which was measured to be better there, and
below it at the size of a value (docs/lab_notes.md, "A slow start")."""


class Backbone(nn.Module):
    """Blocks and a final norm: `[B, N, dim]` to `[B, N, dim]`, for every modality.

    Attributes:
        activation_checkpointing: whether blocks are recomputed in the backward pass in place of
            keeping their activations; a training choice, so it is set here and not in the config.

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
        self.norm = NORMS[config.norm](config.dim)
        self.apply(partial(init_weights, std=config.init_std))
        # Two branches a block are added up: scaled so, their sum does not grow with depth.
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
        indices: Collection[int] | None = None,
        stop_early: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Run the blocks and the final norm.

        Args:
            x: `[B, N, dim]` embedded tokens.
            mask: what each token sees.
            positions: of the tokens, `[N]` or `[B, N]` (with a last axis of 2 for 2-D rope);
                0, 1, 2, ... by default, after what the cache holds. Unused without rope.
            cache: keys and values of earlier tokens, to which these are added.
            indices: blocks whose outputs, before the final norm, are wanted too.
            stop_early: leave out the blocks after the last of `indices`.

        Returns:
            `[B, N, dim]`, and with `indices` the outputs of those blocks, in their order, in a list
            beside it.

        Raises:
            ValueError: for 2-D rope without positions, or a cache of another number of layers or
                without room for these tokens.
        """
        rope = None
        if self.rope is not None:
            if positions is None:
                if self.rope.num_axes > 1:
                    raise ValueError("2-D rope needs positions of shape [N, 2], got None")
                start = cache.length if cache is not None else 0
                positions = torch.arange(start, start + x.shape[1], device=x.device)
            rope = self.rope(positions)
        recompute = self.activation_checkpointing and self.training
        count = len(self.blocks)
        last = max(indices, default=count - 1) if stop_early and indices is not None else count - 1
        # By place and not by `layer_index`, which blocks that were copied have in common.
        caches = [None] * count if cache is None else cache.layers(count)
        intermediates = []
        for index, (block, own) in enumerate(zip(self.blocks, caches, strict=True)):
            x = block(x, mask=mask, rope=rope, cache=own, recompute=recompute)
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
        """An empty cache for this backbone, on its device and in the dtype it computes in."""
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
