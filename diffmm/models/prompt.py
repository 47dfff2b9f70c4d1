"""What comes before generated text: a prompt, with or without images or sounds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffmm.layers.cache import KVCache
from diffmm.ops import AttentionMask


@dataclass(frozen=True)
class Prompt:
    """What comes before the generated tokens.

    Attributes:
        tokens: The prompts, `[B, N]` ids, which may be empty if `num_prefix` is not 0.
        read: Processes the prompts with an empty cache, and returns what follows from them.
        num_prefix: Number of tokens before each prompt: of images or sounds, or a start token.
    """

    tokens: Tensor
    read: Callable[[KVCache], "Read"]
    num_prefix: int = 0

    @property
    def length(self) -> int:
        """Number of tokens in the cache after the prompt."""
        return self.num_prefix + self.tokens.shape[1]


class Read(NamedTuple):
    """What follows from a prompt."""

    features: Tensor
    """Features of the last real token, `[B, dim]`."""
    positions: Tensor
    """Position of the last real token, `[1]` or `[B, 1]`."""
    real: Tensor | None
    """`[B, length]` booleans, true where a token of the prompt is real; None if all are."""


def text_prompt(
    features_of: Callable[..., Tensor], tokens: Tensor, key_padding: Tensor | None
) -> Prompt:
    """The prompt of a text model.

    Args:
        features_of: The model's `forward_features`, compiled or not.
        tokens: Prompts, `[B, N]` ids.
        key_padding: `[B, N]` booleans, true where a token is real; None if all are.
    """

    def read(cache: KVCache) -> Read:
        if key_padding is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        else:
            positions = (key_padding.cumsum(dim=1) - 1).clamp(min=0)
        mask = AttentionMask(causal=True, key_padding=key_padding)
        features = features_of(tokens, mask=mask, positions=positions, cache=cache)
        return Read(features[:, -1], positions[..., -1:], key_padding)

    return Prompt(tokens, read)
