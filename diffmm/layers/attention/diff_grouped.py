"""Grouped differential attention."""

from typing import Literal, Unpack

from torch import Tensor

from diffmm.layers.attention.base import AttentionArgs, HeadShapes
from diffmm.layers.attention.diff_v2 import DiffAttentionV2
from diffmm.ops import AttentionMask, grouped_diff_attention
from diffmm.ops.grouped_diff_attention import paired


class GroupedDiffAttention(DiffAttentionV2):
    """Grouped differential attention (Lim et al. 2025): `r` signal heads share a noise head.

        head_i = (A_i - sigmoid(lambda_proj(x))_i A_noise(i)) V_i,   noise(i) = floor(i / r)

    for `num_heads` signal heads and `num_heads / r` noise heads, with keys and values grouped as in
    `diff_v2`. `r = 1` is bit-identical to `diff_v2`. The raw query heads are ordered by noise head:
    its `r` signal heads, then the noise head itself, always in one key group.

    Args:
        dim: Width of input and output. The shared arguments are documented in `Attention`;
            `num_kv_heads` must divide `num_heads / r`.
        signal_per_noise: Number of signal heads per noise head, `r`.
        combine: `"subtract"`, or `"add"` for `A + lambda A_noise`, an ablation.
    """

    label = "grouped diff"
    equation = (
        "(<i>A</i> − <i>λ A</i><sub>noise</sub>) <i>V</i>, one noise map per several heads, "
        "one <i>λ</i> per token and head"
    )

    def __init__(
        self,
        dim: int,
        *,
        signal_per_noise: int = 4,
        combine: Literal["subtract", "add"] = "subtract",
        **shared: Unpack[AttentionArgs],
    ) -> None:
        if signal_per_noise < 1:
            raise ValueError(f"signal_per_noise must be at least 1, got {signal_per_noise}")
        self.signal_per_noise = signal_per_noise
        super().__init__(dim, combine=combine, **shared)

    def head_shapes(self) -> HeadShapes:
        num_noise, rest = divmod(self.num_heads, self.signal_per_noise)
        if rest or num_noise % self.num_kv_heads:
            raise ValueError(
                f"diff_grouped has one noise head per {self.signal_per_noise} signal heads of "
                f"one key group, so num_kv_heads must divide num_heads / signal_per_noise, got "
                f"{self.num_heads} heads and {self.num_kv_heads} key and value heads: set a "
                f"smaller num_kv_heads or another signal_per_noise"
            )
        return (
            (num_noise, self.signal_per_noise + 1, self.head_dim),
            (self.num_kv_heads, self.head_dim),
            (self.num_kv_heads, self.head_dim),
        )

    @property
    def shares(self) -> dict[str, int]:
        return {"number of noise heads": self.q_shape[0], "number of key groups": self.k_shape[0]}

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        return grouped_diff_attention(
            q, k, v, self.lam(x), mask=mask, scale=self.scale, backend=self.backend
        )

    def components(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return paired(q), k.unsqueeze(3)
