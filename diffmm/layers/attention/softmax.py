"""Softmax attention."""

from typing import ClassVar, Unpack

from torch import Tensor

from diffmm.layers.attention.base import Attention, AttentionArgs, HeadShapes, Split
from diffmm.layers.attention.head_projections import HeadProjections
from diffmm.layers.norm import CosineNorm
from diffmm.ops import AttentionMask, softmax_attention


class SoftmaxAttention(Attention):
    """Softmax attention, `softmax(Q Kᵀ / √D) V`: the baseline of all comparisons.

    Args:
        dim: Width of input and output. The shared arguments are documented in `Attention`.
        cosine_logits: Whether to use cosine-normalized logits with a learned scale per head instead
            of `Q Kᵀ / √D` (SwinV2, Liu et al. 2022); excludes `qk_norm` and `attention_scale`.
        attention_softcap: Bounds the logits smoothly to `(-attention_softcap, attention_softcap)`
            (Gemma 2); None means no bound. Only the backend `"reference"` supports it, which
            `"auto"` then selects.
        dex: Whether to subtract a learned projection of every head from its output (DEX, see
            `diffmm.layers.attention.HeadProjections`), for models trained further from softmax
            weights.

    >>> layer = diffmm.SoftmaxAttention(dim=64, num_heads=4)
    >>> layer(torch.randn(2, 10, 64), mask=diffmm.AttentionMask(causal=True)).shape
    torch.Size([2, 10, 64])
    """

    label = "softmax"
    equation = "<i>A V</i>, where <i>A</i> = softmax(<i>Q K</i>ᵀ / √<i>d</i>)"
    split: ClassVar[dict[str, Split]] = {**Attention.split, "head_projections": "heads"}

    def __init__(
        self,
        dim: int,
        *,
        cosine_logits: bool = False,
        attention_softcap: float | None = None,
        dex: bool = False,
        **shared: Unpack[AttentionArgs],
    ) -> None:
        super().__init__(dim, **shared)
        if attention_softcap is not None:
            backend = shared.get("backend", "auto")
            if attention_softcap <= 0.0:
                raise ValueError(f"attention_softcap must be positive, got {attention_softcap}")
            if backend not in ("auto", "reference"):
                raise ValueError(
                    f"backend {backend!r} does not support attention_softcap={attention_softcap}: "
                    f"use 'auto' or 'reference'"
                )
        self.softcap = attention_softcap
        if cosine_logits and shared.get("qk_norm"):
            raise ValueError(
                "cosine_logits=True already normalizes queries and keys: remove qk_norm"
            )
        if cosine_logits and shared.get("attention_scale") is not None:
            raise ValueError(
                "cosine_logits=True has a learned scale per head: remove attention_scale"
            )
        if cosine_logits:
            self.scale = 1.0
            self.q_norm, self.k_norm = CosineNorm(self.num_heads), CosineNorm()
        self.head_projections = HeadProjections(self.num_heads, self.head_dim) if dex else None

    def head_shapes(self) -> HeadShapes:
        key = (self.num_kv_heads, self.head_dim)
        return (self.num_heads, self.head_dim), key, key

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        return softmax_attention(
            q, k, v, mask=mask, scale=self.scale, softcap=self.softcap, backend=self.backend
        )

    def finish(self, heads: Tensor) -> Tensor:
        return heads if self.head_projections is None else self.head_projections(heads)

    def components(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q.unsqueeze(3), k.unsqueeze(3)
