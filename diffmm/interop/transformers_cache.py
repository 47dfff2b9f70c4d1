"""The key-value caches of Hugging Face transformers, as those that diffmm's layers write to."""

from typing import Any

import torch
from torch import Tensor

from diffmm.layers.cache import KVCache, LayerCache
from diffmm.ops import AttentionMask


class TransformersCache(KVCache):
    """A `transformers.Cache` for the layers of a backbone.

    A static cache returns whole buffers. Of these, layers attend to the part that is written, or,
    while torch compiles a step of one token, to all with a mask that hides the rest: the shapes of
    all steps are then equal.

    Args:
        cache: The cache, which holds a key and a value per key group.
        num_tokens: Number of new tokens `N`.

    Attributes:
        attends_to_buffers: Whether layers attend to whole buffers.
        length: Number of tokens already written; a tensor if they do.
        size: Number of places of a static cache.
        end: Number of tokens after this call; None if layers attend to whole buffers.
    """

    def __init__(self, cache: Any, num_tokens: int) -> None:
        self.cache = cache
        length: Any = cache.get_seq_length()
        is_static = len(cache.layers) > 0 and cache.is_compileable
        self.attends_to_buffers = is_static and num_tokens == 1 and torch.compiler.is_compiling()
        self.size: int | None = cache.get_max_length() if is_static else None
        self.end: int | None = None
        if self.attends_to_buffers:
            self.length = length.clone()  # the cache changes its own in place
        else:
            self.length = int(length)
            self.end = self.length + num_tokens
            if self.size is not None and self.size < self.end:
                raise ValueError(
                    f"the cache holds {self.size} tokens, but {self.end} are needed: create a "
                    f"longer one or generate fewer tokens"
                )

    def layers(self, count: int) -> list[LayerCache]:
        return [TransformersLayerCache(self, index) for index in range(count)]

    def advance(self, num_tokens: int) -> None:
        """Does nothing, because the layers of the cache count their tokens."""

    def mask(self, attention_mask: Tensor | None) -> AttentionMask:
        """The mask over all keys so far.

        Args:
            attention_mask: `[B, M]`, 0 where a token is padding, for all tokens so far, or for all
                places of a static cache; None if no token is padding.

        Raises:
            ValueError: If `attention_mask` has another shape.
        """
        if self.end is not None:
            if attention_mask is not None and attention_mask.shape[1] == self.size:
                attention_mask = attention_mask[:, : self.end]
            return AttentionMask(causal=True, key_padding=real_tokens(attention_mask, self.end))
        assert self.size is not None
        length: Any = self.length
        real = real_tokens(attention_mask, self.size)
        return AttentionMask(causal=True, key_padding=real, num_keys=length + 1)


class TransformersLayerCache(LayerCache):
    """One layer's part of a `TransformersCache`."""

    def __init__(self, whole: TransformersCache, index: int) -> None:
        self.whole, self.index = whole, index

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        shape = k.shape[3:]
        keys, values = self.whole.cache.update(
            k.flatten(3).transpose(1, 2), v.transpose(1, 2), self.index
        )
        if self.whole.end is not None:
            keys, values = keys[:, :, : self.whole.end], values[:, :, : self.whole.end]
        return keys.transpose(1, 2).unflatten(3, shape), values.transpose(1, 2)


def real_tokens(attention_mask: Tensor | None, num_keys: int) -> Tensor | None:
    """The mask of padding, `[B, M]` booleans; None if no token is padding.

    Args:
        attention_mask: `[B, M]`, 0 where a token is padding, or None.
        num_keys: Number of keys `M`.

    Raises:
        ValueError: If it has another shape.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] != num_keys:
        raise ValueError(
            f"attention_mask must be [B, {num_keys}], one entry per token so far, got shape "
            f"{tuple(attention_mask.shape)}; masks per query are not supported"
        )
    real = attention_mask.bool()
    # Without padding, the kernels need no mask in memory; to know this, the host waits.
    if not torch.compiler.is_compiling() and bool(real.all()):
        return None
    return real
