"""The key and value cache of generation."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the tokens seen so far, one preallocated buffer a layer.

    Buffers keep whatever shape a layer's keys and values have, so the three attentions share this
    class. `length` is a plain integer: under `torch.compile` it becomes a symbolic size after the
    second step, and decoding neither recompiles nor reads keys that are not there yet.

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
        self.max_length = max_length
        self.length = 0

    def update(self, layer_index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values behind the old ones; all of them come back.

        Raises:
            ValueError: if they do not fit any more.
        """
        end = self.length + k.shape[1]
        if end > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} tokens, but {end} are needed: "
                f"make it longer or generate less"
            )
        keys, values = self.keys[layer_index], self.values[layer_index]
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        return keys[:, :end], values[:, :end]

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` as seen, once all layers have written them."""
        self.length += num_tokens
