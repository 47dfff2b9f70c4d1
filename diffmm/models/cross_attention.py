"""Adds cross-attention to the blocks of a decoder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from diffmm.layers.block import Block, ResidualBranch
from diffmm.layers.cross_attention import CrossAttention
from diffmm.layers.linear import init_weights
from diffmm.models.backbone import WIDE, Backbone


def add_cross_attention(backbone: Backbone, *, every: int = 1, gated: bool = False) -> None:
    """Add cross-attention (`diffmm.layers.CrossAttention`) to every `every`-th block, between its
    attention and its feed-forward, in place.

    The layers are those of the backbone: the same attention, heads, norms, biases, output gates and
    rates of dropout, in `diff_v1` with the initial lambda of the block's own attention. Rotary
    positions, the window and `exclusive` are of self-attention alone.

    Args:
        backbone: The backbone, whose other weights and their names stay as they are. Its attention
            and feed-forward are not parallel.
        every: Distance between blocks with cross-attention, from 1 to the number of blocks; the
            last one of each `every` has it.
        gated: Whether each has a gate, which is closed at the start.
    """
    config, blocks = backbone.config, list(backbone.blocks)
    layers = replace(config, window=None, full_attention_layers=(), exclusive=False)
    indices = range(every - 1, len(blocks), every)
    for index in indices:
        block = blocks[index]
        assert isinstance(block, Block)
        added = CrossAttention(
            layers.make_attention(index),
            config.make_norm(),
            ResidualBranch(
                config.dim,
                config.dropout,
                config.drop_path * index / max(1, config.depth - 1),
                config.layer_scale,
                config.make_norm() if config.post_norm else None,
            ),
            gated=gated,
        )
        added.apply(partial(init_weights, std=config.init_std))
        # As in the backbone: the standard deviation of what ends a branch falls with their number.
        num_branches = 2 * config.depth + len(indices)
        init_weights(added.attention.out_proj, config.init_std * num_branches**-0.5)
        if config.dim < WIDE:
            added.attention.init_head_size(config.init_std * config.dim**0.5)
        block.cross_attention = added


def cross_attentions(backbone: Backbone) -> dict[int, CrossAttention]:
    """The cross-attention of each block that has one, by the index of the block."""
    return {
        index: block.cross_attention
        for index, block in enumerate(backbone.blocks)
        if isinstance(block, Block) and block.cross_attention is not None
    }


@contextmanager
def without_cross_attention(backbone: Backbone) -> Iterator[None]:
    """Take the cross-attention out of the blocks in the body of the `with` statement: the backbone
    is that of a language model, whose weights it can load."""
    taken = cross_attentions(backbone)
    for index in taken:
        backbone.blocks[index].cross_attention = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for index, layer in taken.items():
            backbone.blocks[index].cross_attention = layer
