"""Differential attention, second version."""

from typing import ClassVar, Literal, Unpack

from torch import Tensor

from diffmm.checks import check_choice
from diffmm.layers.attention.base import Attention, AttentionArgs, HeadShapes, Split
from diffmm.layers.linear import Linear
from diffmm.layers.norm import upcast
from diffmm.ops import AttentionMask, diff_attention


class DiffAttentionV2(Attention):
    """Differential attention, second version (the authors' DIFF V2, 2026): one lambda per token
    and head, twice as many queries, shared keys, no headwise norm.

        head_i = (A1_i - sigmoid(lambda_proj(x))_i A2_i) V_i

    for `num_heads` differential heads; raw query heads `2i, 2i + 1` are the components of head
    `i`, always in one key group.

    Args:
        dim: Width of input and output. The shared arguments are documented in `Attention`.
        combine: `"subtract"`, or `"add"` for `A1 + lambda A2`, an ablation.

    >>> layer = diffmm.DiffAttentionV2(dim=64, num_heads=4)
    >>> layer(torch.randn(2, 10, 64), mask=diffmm.AttentionMask(causal=True)).shape
    torch.Size([2, 10, 64])
    """

    label = "diff v2"
    equation = (
        "(<i>A</i>₁ − <i>λ A</i>₂) <i>V</i>, twice the queries on the same keys, "
        "one <i>λ</i> per token and head"
    )
    is_differential = True
    split: ClassVar[dict[str, Split]] = {**Attention.split, "lambda_proj": "columns"}

    def __init__(
        self,
        dim: int,
        *,
        combine: Literal["subtract", "add"] = "subtract",
        **shared: Unpack[AttentionArgs],
    ) -> None:
        check_choice("combine", combine, ("subtract", "add"))
        super().__init__(dim, **shared)
        self.sign = -1.0 if combine == "add" else 1.0
        self.lambda_proj = Linear(dim, self.num_heads, bias=False)

    def head_shapes(self) -> HeadShapes:
        return (
            (self.num_heads, 2, self.head_dim),
            (self.num_kv_heads, 1, self.head_dim),
            (self.num_kv_heads, self.head_dim),
        )

    def lam(self, x: Tensor) -> Tensor:
        """Lambda per token and head, `[B, N, H]` in float32, between 0 and 1."""
        return self.sign * upcast(self.lambda_proj(x)).sigmoid()

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        return diff_attention(
            q, k, v, self.lam(x), mask=mask, scale=self.scale, backend=self.backend
        )
