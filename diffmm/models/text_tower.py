"""The text tower: one embedding per text, as in CLIP."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from diffmm.batch import InputShapes
from diffmm.checks import Settings, check_choice
from diffmm.layers.linear import Embedding, Linear, init_weights
from diffmm.layers.norm import upcast
from diffmm.layers.positions import LearnedPositions
from diffmm.models.backbone import Backbone, BackboneConfig
from diffmm.models.pretrained import Pretrained
from diffmm.ops import AttentionMask

POOLS = ("argmax", "eos", "first", "last", "mean")


@dataclass(frozen=True)
class TextTowerConfig(Settings):
    """Configuration of a text tower.

    Attributes:
        vocab_size: Number of token ids.
        max_length: Maximum sequence length, in tokens.
        backbone: Configuration of the blocks; its `rope` is `"none"` with learned positions, and
            `"1d"` without.
        num_outputs: Width of the embedding of a text; 0 means no projection, and the width is that
            of the backbone.
        head_bias: Whether the projection has a bias.
        causal: Whether each token attends only to earlier ones.
        pool: The token whose features are projected: that with the highest id (`"argmax"`, the end
            of the text in CLIP's vocabulary), the first with `eos_id` (`"eos"`), or the `"first"`
            or `"last"` one; or `"mean"`, the mean over all tokens. Padding is neither the last
            token nor part of the mean if `num_tokens` is given.
        eos_id: Id of the token at the end of a text; for the pool `"eos"` only.
        learned_positions: Whether positions have learned embeddings, as in CLIP; otherwise they
            are rotary.

    Raises:
        ValueError: If a field is out of range; the message names the field and the value.
    """

    input_fields: ClassVar[tuple[str, ...]] = ("tokens", "num_tokens")

    vocab_size: int
    max_length: int
    backbone: BackboneConfig
    num_outputs: int = 0
    head_bias: bool = False
    causal: bool = True
    pool: Literal["argmax", "eos", "first", "last", "mean"] = "argmax"
    eos_id: int | None = None
    learned_positions: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("vocab_size", 1), ("max_length", 1), ("num_outputs", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        check_choice("pool", self.pool, POOLS)
        if (self.pool == "eos") != (self.eos_id is not None):
            raise ValueError(f"eos_id is for pool='eos', got {self.eos_id} with {self.pool!r}")
        rope = "none" if self.learned_positions else "1d"
        if self.backbone.rope != rope:
            raise ValueError(
                f"with learned_positions={self.learned_positions} the backbone's rope must be "
                f"{rope!r}, got {self.backbone.rope!r}"
            )

    def input_shapes(self, batch_size: int, length: int | None = None) -> InputShapes:
        """`length` is in tokens; `max_length` by default."""
        return {
            "tokens": ((batch_size, length or self.max_length), torch.int64),
            "num_tokens": ((batch_size,), torch.int64),
        }


class TextTower(Pretrained, nn.Module):
    """Maps token ids `[B, N]` to one embedding per text, `[B, num_outputs]` (CLIP, Radford et al.
    2021, section 2.4).

    >>> backbone = diffmm.BackboneConfig(dim=64, depth=2, num_heads=4)
    >>> config = diffmm.models.TextTowerConfig(
    ...     vocab_size=100, max_length=16, backbone=backbone, num_outputs=32
    ... )
    >>> diffmm.models.TextTower(config)(torch.randint(100, (2, 16))).shape
    torch.Size([2, 32])
    """

    input_fields = TextTowerConfig.input_fields

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.config = config
        dim, init_std = config.backbone.dim, config.backbone.init_std
        self.embedding = Embedding(config.vocab_size, dim)
        self.positions = (
            LearnedPositions((config.max_length,), dim, 0, init_std)
            if config.learned_positions
            else None
        )
        self.backbone = Backbone(config.backbone)
        self.head: nn.Module = nn.Identity()
        if config.num_outputs:
            self.head = Linear(dim, config.num_outputs, bias=config.head_bias)
        for module in (self.embedding, self.head):
            module.apply(partial(init_weights, std=init_std))

    def forward(self, tokens: Tensor, num_tokens: Tensor | None = None) -> Tensor:
        """Compute the embeddings of texts, `[B, num_outputs]`, or `[B, dim]` without a projection.

        Args:
            tokens: Token ids, `[B, N]`, padded on the right.
            num_tokens: `[B]` integers, the number of real tokens of each text (clamped to between 1
                and `N`); all tokens by default. Padding then does not change the embeddings.

        Raises:
            ValueError: As in `forward_features`.
        """
        features = self.forward_features(tokens, num_tokens)
        if self.config.pool == "mean":
            return self.head(_mean(features, _real(tokens, num_tokens)))
        at = self.at(tokens, num_tokens)
        return self.head(features[torch.arange(tokens.shape[0], device=tokens.device), at])

    def forward_features(self, tokens: Tensor, num_tokens: Tensor | None = None) -> Tensor:
        """Compute features `[B, N, dim]` after the final norm. With `num_tokens`, those of real
        tokens do not depend on the padding.

        Raises:
            ValueError: If the texts are longer than `max_length`.
        """
        length = tokens.shape[1]
        if length > self.config.max_length:
            raise ValueError(
                f"a sequence of {length} tokens is longer than max_length="
                f"{self.config.max_length}: shorten it"
            )
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(length)
        # Under the causal mask, no real token attends to the padding after it.
        real = None if self.config.causal else _real(tokens, num_tokens)
        return self.backbone(x, mask=AttentionMask(causal=self.config.causal, key_padding=real))

    def at(self, tokens: Tensor, num_tokens: Tensor | None = None) -> Tensor:
        """The position of the pooled token of each text, `[B]`; not for the pool `"mean"`."""
        if self.config.pool == "argmax":
            return tokens.argmax(dim=1)
        if self.config.pool == "eos":
            assert self.config.eos_id is not None
            return tokens.eq(self.config.eos_id).int().argmax(dim=1)
        if self.config.pool == "last" and num_tokens is not None:
            return num_tokens.clamp(1, tokens.shape[1]) - 1
        last = tokens.shape[1] - 1 if self.config.pool == "last" else 0
        return torch.full((tokens.shape[0],), last, device=tokens.device)


def _real(tokens: Tensor, num_tokens: Tensor | None) -> Tensor | None:
    """`[B, N]` booleans, true for real tokens; None if all are real."""
    if num_tokens is None:
        return None
    return torch.arange(tokens.shape[1], device=tokens.device) < num_tokens.clamp(min=1)[:, None]


def _mean(features: Tensor, real: Tensor | None) -> Tensor:
    """The mean over the real tokens, `[B, dim]`."""
    if real is None:
        return features.mean(dim=1)
    total = upcast(features).masked_fill(~real[..., None], 0.0).sum(dim=1)
    return (total / real.sum(dim=1, keepdim=True)).to(features.dtype)
