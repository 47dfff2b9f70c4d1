"""The key-value cache for generation."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from diffmm.ops import AttentionMask

KeptContext = tuple[Tensor, Tensor, AttentionMask]
"""Keys and values of a context, `[B, M, ...]`, and which of them each token attends to."""


class KVCache:
    """Keys and values of the tokens seen so far, in preallocated buffers per layer.

    Buffers have the shape of each layer's keys and values, so all attentions share this class.
    `length` is a plain integer by default: under `torch.compile` it becomes a symbolic size after
    the second step, so decoding neither recompiles nor reads unwritten keys. After `freeze_shapes`
    it is a tensor, and layers return whole buffers, so that all steps are the same computation, as
    a CUDA graph needs; the mask must then have the number of keys (`AttentionMask.num_keys`).

    The cache is registered as a pytree, so that `torch.export` accepts it as an input. An exported
    program writes into the buffers but does not update `length`: call `advance` after each step.
    A copy made by `tree_map` has its own `length`.

    Of layers with cross-attention, `contexts` has the keys and values of what they read, by the
    index of the layer; they are computed once.

    Args:
        key_shapes: Key shape of each layer, without the batch and token axes.
        value_shapes: Value shape of each layer, without the batch and token axes.
        batch: Number of sequences.
        max_length: Maximum number of tokens per sequence.
        dtype: Data type of the buffers.
        device: Device of the buffers.
    """

    def __init__(
        self,
        key_shapes: list[tuple[int, ...]],
        value_shapes: list[tuple[int, ...]],
        *,
        batch: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        def buffers(shapes: list[tuple[int, ...]]) -> list[Tensor]:
            return [torch.zeros(batch, max_length, *s, dtype=dtype, device=device) for s in shapes]

        self.keys = buffers(key_shapes)
        self.values = buffers(value_shapes)
        self.length: int | Tensor = 0
        self.contexts: dict[int, KeptContext] = {}

    def freeze_shapes(self) -> None:
        """Turn `length` into a tensor on the device of the buffers."""
        self.length = torch.as_tensor(self.length, device=self.keys[0].device)

    def layers(self, count: int) -> list["LayerCache"]:
        """The caches of the `count` layers of a model.

        Raises:
            ValueError: If the cache has a different number of layers.
        """
        if len(self.keys) != count:
            raise ValueError(
                f"the cache has {len(self.keys)} layers, but the model has {count}: "
                f"create one with the model's new_cache"
            )
        pairs = zip(self.keys, self.values, strict=True)
        return [
            LayerCache(keys, values, self.length, self.contexts, index)
            for index, (keys, values) in enumerate(pairs)
        ]

    def advance(self, num_tokens: int) -> None:
        """Add `num_tokens` to `length`, after all layers have written them."""
        self.length += num_tokens


class LayerCache:
    """One layer's part of a `KVCache`.

    Args:
        keys: Key buffer, `[B, max_length, ...]`.
        values: Value buffer, `[B, max_length, ...]`.
        length: Number of tokens already written; a tensor if shapes are frozen.
        contexts: The cache's contexts, by the index of the layer.
        index: Index of the layer.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        length: int | Tensor,
        contexts: dict[int, KeptContext],
        index: int,
    ) -> None:
        self.keys, self.values, self.length = keys, values, length
        self.contexts, self.index = contexts, index

    @property
    def context(self) -> KeptContext | None:
        """The keys and values of the layer's context; None if there are none."""
        return self.contexts.get(self.index)

    def keep_context(self, context: KeptContext) -> None:
        """Keep the keys and values of the layer's context for later calls."""
        self.contexts[self.index] = context

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values, `[B, N, ...]`, and return all of them; the whole buffers if
        shapes are frozen.

        Raises:
            ValueError: If the cache is too short for them. (With frozen shapes, that would need to
                wait for the device: the caller must know the length.)
        """
        if isinstance(self.length, Tensor):
            places = self.length + torch.arange(k.shape[1], device=k.device)
            self.keys.index_copy_(1, places, k)
            self.values.index_copy_(1, places, v)
            return self.keys, self.values
        end, max_length = self.length + k.shape[1], self.keys.shape[1]
        if end > max_length:
            raise ValueError(
                f"the cache holds {max_length} tokens, but {end} are needed: "
                f"create a longer one or generate fewer tokens"
            )
        self.keys[:, self.length : end] = k
        self.values[:, self.length : end] = v
        return self.keys[:, :end], self.values[:, :end]


def _flatten(cache: KVCache) -> tuple[list[Any], None]:
    parts = [cache.keys, cache.values, cache.length]
    return [*parts, cache.contexts] if cache.contexts else parts, None


def _flatten_with_names(cache: KVCache) -> tuple[list[tuple[Any, Any]], None]:
    names = [_pytree.GetAttrKey(name) for name in ("keys", "values", "length", "contexts")]
    parts = _flatten(cache)[0]
    return list(zip(names[: len(parts)], parts, strict=True)), None


def _unflatten(parts: Any, _: None) -> KVCache:
    cache = KVCache.__new__(KVCache)
    cache.keys, cache.values, cache.length, *contexts = parts
    cache.contexts = contexts[0] if contexts else {}
    return cache


_pytree.register_pytree_node(
    KVCache,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_names,
    serialized_type_name="diffmm.layers.KVCache",
)
