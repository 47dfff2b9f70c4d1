"""The text model: a decoder, or an encoder without the causal mask."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from diffmm.batch import IGNORE_INDEX, InputShapes
from diffmm.checks import Settings
from diffmm.layers.cache import KVCache
from diffmm.layers.linear import Embedding, Linear, init_weights
from diffmm.models.backbone import Backbone, BackboneConfig
from diffmm.models.pretrained import Pretrained
from diffmm.ops import AttentionMask, Losses, linear_cross_entropy
from diffmm.ops.linear_cross_entropy import MAX_LOGITS
from diffmm.ops.softmax_attention.reference import capped


@dataclass(frozen=True)
class TextConfig(Settings):
    """Configuration of a text model.

    Attributes:
        vocab_size: Number of token ids.
        max_length: Maximum sequence length, in tokens.
        backbone: Configuration of the blocks; its `rope` must be `"1d"`.
        causal: Whether the model is a decoder, in which each token attends only to earlier ones;
            otherwise it is an encoder, in which each token attends to all.
        tie_embeddings: Whether the output projection shares the embedding's weight.
        embedding_scale: Factor of the embedded tokens.
        logit_softcap: Bounds the logits smoothly to `(-logit_softcap, logit_softcap)` by
            `logit_softcap * tanh(logits / logit_softcap)` (Gemma 2); None means no bound.

    Raises:
        ValueError: If a field is out of range; the message names the field and the value.
    """

    input_fields: ClassVar[tuple[str, ...]] = ("tokens",)

    vocab_size: int
    max_length: int
    backbone: BackboneConfig
    causal: bool = True
    tie_embeddings: bool = True
    embedding_scale: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("embedding_scale", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and value <= 0.0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.backbone.rope != "1d":
            raise ValueError(
                f"the backbone's rope of a text model must be '1d', got {self.backbone.rope!r}"
            )

    def input_shapes(self, batch_size: int, length: int | None = None) -> InputShapes:
        """`length` is in tokens; `max_length` by default."""
        return {"tokens": ((batch_size, length or self.max_length), torch.int64)}


class TextModel(Pretrained, nn.Module):
    """Language model: maps token ids to logits over the vocabulary.

    >>> model = diffmm.create_model("text/stdlib_tiny")
    >>> model(torch.tensor([list(b"def main(")])).shape  # [B, N, vocab_size]
    torch.Size([1, 9, 320])
    """

    input_fields = TextConfig.input_fields

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.backbone.dim)
        self.backbone = Backbone(config.backbone)
        self.head = Linear(config.backbone.dim, config.vocab_size, bias=False)
        for module in (self.embedding, self.head):
            init_weights(module, config.backbone.init_std)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.register_load_state_dict_pre_hook(TextModel._remember_tie)
        self.register_load_state_dict_post_hook(TextModel._tie_again)

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: AttentionMask | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        targets: Tensor | None = None,
    ) -> Any:
        """Compute logits `[B, N, vocab_size]` of `tokens`, `[B, N]` ids; or, given `targets`, their
        cross-entropy (`diffmm.ops.Losses`), for which the logits are never in memory as a whole.

        Args:
            tokens, mask, positions, cache: See `forward_features`.
            targets: Token ids to predict, `[B, N]`; `diffmm.batch.IGNORE_INDEX` where there is
                none.
        """
        features = self.forward_features(tokens, mask=mask, positions=positions, cache=cache)
        return self.logits(features) if targets is None else self.losses(features, targets)

    def logits(self, features: Tensor) -> Tensor:
        """Compute logits `[..., vocab_size]` of features `[..., dim]`."""
        return capped(self.head(features), self.config.logit_softcap)

    def forward_features(
        self,
        tokens: Tensor,
        *,
        mask: AttentionMask | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Compute features `[B, N, dim]` after the final norm.

        Args:
            tokens: Token ids, `[B, N]`.
            mask: Which tokens each token attends to; by default causal or full, as configured.
            positions: `[N]` or `[B, N]`; by default 0, 1, 2, ..., continuing after the cached
                tokens.
            cache: Keys and values of earlier tokens; those of `tokens` are appended.

        Raises:
            ValueError: If the sequence, including cached tokens, is longer than `max_length`.
        """
        length = tokens.shape[1]
        if cache is not None and isinstance(cache.length, int):
            length += cache.length
        if length > self.config.max_length:
            raise ValueError(
                f"a sequence of {length} tokens is longer than max_length="
                f"{self.config.max_length}: shorten it or increase max_length"
            )
        if mask is None:
            mask = AttentionMask(causal=self.config.causal)
        return self.backbone(self.embed(tokens), mask=mask, positions=positions, cache=cache)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed token ids `[B, N]` as the inputs of the backbone, `[B, N, dim]`."""
        x = self.embedding(tokens)
        return x if self.config.embedding_scale == 1.0 else x * self.config.embedding_scale

    def losses(self, features: Tensor, targets: Tensor) -> Losses:
        """Compute the cross-entropy of `targets`, `[...]`, given features `[..., dim]`, as
        `forward` does."""
        head = self.head
        is_plain = type(head) in (Linear, nn.Linear) and not isinstance(head.weight, DTensor)
        is_plain = is_plain and self.config.logit_softcap is None
        if is_plain and not (head._forward_hooks or head._forward_pre_hooks):
            return linear_cross_entropy(features, head.weight, targets, bias=head.bias)
        # Any other head is a function that the backward pass computes again, chunk by chunk.
        rows = max(1, MAX_LOGITS // self.config.vocab_size)
        chunks = zip(
            features.flatten(0, -2).split(rows), targets.flatten().split(rows), strict=True
        )
        each = torch.cat([checkpoint(self._chunk, *c, use_reentrant=False) for c in chunks])
        return Losses(each.sum(), each.detach().view(targets.shape))

    def _chunk(self, features: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(features).float()
        return cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")

    # `to_empty` and `load_state_dict(assign=True)` replace the parameters of every module, so a
    # tied head is tied again afterwards. A head replaced by the user may not be tied.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TextModel":
        self._remember_tie()
        super()._apply(fn, recurse)
        self._tie_again()
        return self

    def _remember_tie(self, *_: object) -> None:
        self._is_tied = getattr(self.head, "weight", None) is self.embedding.weight

    def _tie_again(self, *_: object) -> None:
        if self._is_tied:
            self.head.weight = self.embedding.weight

    def new_cache(self, batch: int, max_length: int | None = None) -> KVCache:
        """Create an empty key-value cache for `batch` sequences of up to `max_length` tokens (the
        model's `max_length` by default)."""
        return self.backbone.new_cache(batch, max_length or self.config.max_length)
