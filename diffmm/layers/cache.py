"""The key and value cache of generation."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


class KVCache:
    """Keys and values of the tokens seen so far, one preallocated buffer a layer.

    Buffers keep whatever shape a layer's keys and values have, so the three attentions share this
    class. `length` is a plain integer: under `torch.compile` it becomes a symbolic size after the
    second step, and decoding neither recompiles nor reads keys that are not there yet.

    It is a pytree of torch's, so that `torch.export` takes it as an input. What is exported writes
    into the buffers, but cannot count: call `advance` after each of its steps. Likewise a copy by
    `tree_map` counts for itself.

    Args:
        key_shapes: a layer's key shape without batch and tokens, for every layer.
        value_shapes: likewise for the values.
        batch: number of sequences.
        max_length: most tokens a sequence can hold.
        dtype: of the buffers.
        device: of the buffers.
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
        self.length = 0

    def layers(self, count: int) -> list["LayerCache"]:
        """What each of the `count` layers of a model reads and writes.

        Raises:
            ValueError: if the cache was made for more or fewer.
        """
        if len(self.keys) != count:
            raise ValueError(
                f"the cache is for {len(self.keys)} layers, but the model has {count}: "
                f"make another with new_cache"
            )
        pairs = zip(self.keys, self.values, strict=True)
        return [LayerCache(keys, values, self.length) for keys, values in pairs]

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` as seen, once all layers have written them."""
        self.length += num_tokens


class LayerCache:
    """A layer's part of a `KVCache`.

    Args:
        keys: `[B, max_length, ...]`.
        values: likewise.
        length: how many of the tokens are there.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        self.keys, self.values, self.length = keys, values, length

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the layer's new keys and values behind the old ones; all of them come back.

        Raises:
            ValueError: if they do not fit any more.
        """
        end, max_length = self.length + k.shape[1], self.keys.shape[1]
        if end > max_length:
            raise ValueError(
                f"the cache holds {max_length} tokens, but {end} are needed: "
                f"make it longer or generate less"
            )
        self.keys[:, self.length : end] = k
        self.values[:, self.length : end] = v
        return self.keys[:, :end], self.values[:, :end]


def _flatten(cache: KVCache) -> tuple[list[Any], None]:
    return [cache.keys, cache.values, cache.length], None


def _flatten_with_names(cache: KVCache) -> tuple[list[tuple[Any, Any]], None]:
    names = [_pytree.GetAttrKey(name) for name in ("keys", "values", "length")]
    return list(zip(names, _flatten(cache)[0], strict=True)), None


def _unflatten(parts: Any, _: None) -> KVCache:
    cache = KVCache.__new__(KVCache)
    cache.keys, cache.values, cache.length = parts
    return cache


_pytree.register_pytree_node(
    KVCache,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_names,
    serialized_type_name="diffmm.layers.KVCache",
)
