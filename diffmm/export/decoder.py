"""Text models as functions of tensors alone, with the key-value cache as inputs and outputs."""

from typing import Any

import torch
from torch import Tensor, nn

from diffmm.layers.cache import KVCache, LayerCache
from diffmm.models.text import TextModel
from diffmm.ops import AttentionMask


class PaddedText(nn.Module):
    """A text model with padding: `[B, N]` tokens, and `[B, N]` booleans, true where a token is
    real, to logits `[B, N, vocab_size]`.

    Positions count the real tokens, so that a text padded on the left has the logits that it has
    alone.
    """

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, key_padding: Tensor) -> Tensor:
        """Compute the logits."""
        mask = AttentionMask(causal=self.model.config.causal, key_padding=key_padding)
        positions = (key_padding.long().cumsum(dim=1) - 1).clamp(min=0)
        return self.model(tokens, mask=mask, positions=positions)


class CachedDecoder(nn.Module):
    """A decoder whose cache is a value: it takes the keys and values of `P` tokens, which may be
    0, and returns those of all tokens. Nothing is changed in place.

        logits, present_key_0, present_value_0, ... = decoder(tokens, num_padding, past_key_0, ...)

    Prompts of different lengths are padded on the left, by `num_padding` tokens per row; each is
    continued as if it were alone. The axes of `past_*_i` after the first two are those of the
    layer's keys and values (`Attention.k_shape`, `v_shape`).
    """

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, num_padding: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Compute the logits `[B, N, vocab_size]` of `tokens`, and all keys and values.

        Args:
            tokens: `[B, N]` ids.
            num_padding: `[B]` integers, the number of tokens before the first real one, the same
                in all steps.
            past: `past_key_0, past_value_0, past_key_1, ...`, each `[B, P, ...]`.
        """
        cache = GrowingCache(past)
        num_past = cache.length
        for tensor in past:
            torch._check(tensor.shape[1] == num_past)
        places = torch.arange(num_past + tokens.shape[1], device=tokens.device)
        places = places - num_padding[:, None]  # [B, P + N], from 0 at the first real token
        mask = AttentionMask(causal=True, key_padding=places >= 0)
        positions = places[:, num_past:].clamp(min=0)
        logits = self.model(tokens, mask=mask, positions=positions, cache=cache)
        return logits, *cache.tensors()


class GrowingCache(KVCache):
    """Keys and values that are concatenated instead of written into buffers.

    Args:
        past: The keys and the values of each layer in turn, `[B, P, ...]`.
    """

    def __init__(self, past: tuple[Tensor, ...]) -> None:
        self.keys, self.values = list(past[::2]), list(past[1::2])
        self.length: Any = past[0].shape[1]

    def layers(self, count: int) -> list[LayerCache]:
        return [GrowingLayer(self, index) for index in range(count)]

    def tensors(self) -> list[Tensor]:
        """The keys and the values of each layer in turn."""
        return [part for pair in zip(self.keys, self.values, strict=True) for part in pair]


class GrowingLayer(LayerCache):
    """One layer's part of a `GrowingCache`."""

    def __init__(self, cache: GrowingCache, index: int) -> None:
        super().__init__(cache.keys[index], cache.values[index], cache.length)
        self.cache, self.index = cache, index

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = torch.cat([self.keys, k], dim=1), torch.cat([self.values, v], dim=1)
        self.cache.keys[self.index], self.cache.values[self.index] = keys, values
        return keys, values
