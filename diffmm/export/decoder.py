"""Text models as functions of tensors alone, with the key-value cache as inputs and outputs."""

from typing import Any

import torch
from torch import Tensor, nn

from diffmm.layers.cache import KVCache, LayerCache
from diffmm.layers.cross_attention import context_mask
from diffmm.models.cross_attention import cross_attentions
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
        return self.continued(tokens, num_padding, GrowingCache(past))

    def continued(
        self, tokens: Tensor, num_padding: Tensor, cache: "GrowingCache"
    ) -> tuple[Tensor, ...]:
        """As `forward`, with the past in a cache."""
        num_past = cache.length
        for tensor in cache.tensors():
            torch._check(tensor.shape[1] == num_past)
        places = torch.arange(num_past + tokens.shape[1], device=tokens.device)
        places = places - num_padding[:, None]  # [B, P + N], from 0 at the first real token
        mask = AttentionMask(causal=True, key_padding=places >= 0)
        positions = places[:, num_past:].clamp(min=0)
        logits = self.model(tokens, mask=mask, positions=positions, cache=cache)
        return logits, *cache.tensors()


class CrossDecoder(CachedDecoder):
    """A decoder with cross-attention, likewise, which also takes the keys and values of the media:

        decoder(tokens, num_padding, past_key_0, ..., context_key_0, context_value_0, ...)

    for each layer with cross-attention in turn, `[B, M, ...]` each; of sounds, at last `[B]`
    integers, `num_context`: how many of the `M` are real, which are the first ones.

    Args:
        model: The decoder.
        has_padding: Whether there is a `num_context`.
    """

    def __init__(self, model: TextModel, *, has_padding: bool) -> None:
        super().__init__(model)
        self.has_padding = has_padding

    def forward(self, tokens: Tensor, num_padding: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Compute the logits `[B, N, vocab_size]` of `tokens`, and all keys and values of texts.

        Args:
            tokens: As in `CachedDecoder`.
            num_padding: As there; 0, because a start token precedes the prompts.
            past: As there, and then the keys and values of the media and `num_context`.
        """
        count = 2 * len(self.model.backbone.attentions)
        cache, contexts = GrowingCache(past[:count]), past[count:]
        real = None
        if self.has_padding:
            *contexts, num_context = contexts  # type: ignore[assignment]
            real = torch.arange(contexts[0].shape[1], device=tokens.device) < num_context[:, None]
        mask = context_mask(real)
        pairs = zip(contexts[::2], contexts[1::2], strict=True)
        for index, (k, v) in zip(cross_attentions(self.model.backbone), pairs, strict=True):
            cache.contexts[index] = (k, v, mask)
        return self.continued(tokens, num_padding, cache)


class GrowingCache(KVCache):
    """Keys and values that are concatenated instead of written into buffers.

    Args:
        past: The keys and the values of each layer in turn, `[B, P, ...]`.
    """

    def __init__(self, past: tuple[Tensor, ...]) -> None:
        self.keys, self.values = list(past[::2]), list(past[1::2])
        self.length: Any = past[0].shape[1]
        self.contexts = {}

    def layers(self, count: int) -> list[LayerCache]:
        return [GrowingLayer(self, index) for index in range(count)]

    def tensors(self) -> list[Tensor]:
        """The keys and the values of each layer in turn, without those of contexts."""
        return [part for pair in zip(self.keys, self.values, strict=True) for part in pair]


class GrowingLayer(LayerCache):
    """One layer's part of a `GrowingCache`."""

    def __init__(self, cache: GrowingCache, index: int) -> None:
        super().__init__(
            cache.keys[index], cache.values[index], cache.length, cache.contexts, index
        )
        self.cache, self.index = cache, index

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = torch.cat([self.keys, k], dim=1), torch.cat([self.values, v], dim=1)
        self.cache.keys[self.index], self.cache.values[self.index] = keys, values
        return keys, values
