"""Differential attention, first version."""

import math
from collections.abc import Callable
from typing import ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from diffmm.checks import check_choice
from diffmm.layers.attention.base import (
    Attention,
    AttentionArgs,
    HeadShapes,
    Split,
    shared_by_heads,
)
from diffmm.layers.norm import RMSNorm, upcast
from diffmm.ops import AttentionMask, diff_attention
from diffmm.ops.grouped_diff_attention import paired


def lambda_init_at(layer_index: int) -> float:
    """The paper's initial lambda of v1, `0.8 - 0.6 exp(-0.3 layer_index)` (Ye et al. 2025, section
    2.1; the paper counts layers from 1, `layer_index` from 0)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer_index)


class DiffAttentionV1(Attention):
    """Differential attention (Ye et al. 2025, eqs. 1 to 3): one lambda per layer, values `2D` wide.

        head_i = (1 - lambda_init) RMSNorm((A1_i - lambda A2_i) V_i)
        lambda = exp(lambda_q1·lambda_k1) - exp(lambda_q2·lambda_k2) + lambda_init

    for `num_heads / 2` differential heads; raw head `2i + c` of the projections is component `c`
    of head `i`. The lambda vectors stay in float32 when the module is cast to half precision.

    Args:
        dim: Width of input and output. The shared arguments are documented in `Attention`;
            `num_heads` and `num_kv_heads` must be even.
        share: Share one query (`"q"`) or one key (`"k"`) between both components, an ablation.
        lambda_init: A constant that replaces `lambda_init_at(layer_index)`.
        lambda_layer_offset: Added to `layer_index` for the initial lambda; -1 in models that count
            layers from 0 in the paper's equation, which counts from 1 (Motif).
        dual_lambda: Whether each exponent of lambda is one learned number instead of the product of
            two vectors, `lambda = exp(lambda_a) - exp(lambda_b) + lambda_init`, as in timm. Both
            start at 0.
        heads_per_noise: Number of differential heads that share a second query, which gives them
            the same second map (grouped differential attention, Lim et al. 2025). The raw query
            heads are then ordered by shared query: the first queries of its heads, and then it.
        headwise_norm: Whether heads are normalized. Without the norm, its scale `1 - lambda_init`
            is omitted as well.
        headwise_norm_eps: `eps` of that norm; 1e-5 in the authors' code, whatever the other norms
            have.
        combine: `"subtract"`, or `"add"` for `A1 + lambda A2`, an ablation.

    >>> layer = diffmm.DiffAttentionV1(dim=64, num_heads=4, layer_index=0)
    >>> layer(torch.randn(2, 10, 64), mask=diffmm.AttentionMask(causal=True)).shape
    torch.Size([2, 10, 64])
    """

    label = "diff v1"
    equation = (
        "(<i>A</i>₁ − <i>λ A</i>₂) <i>V</i>, half as many heads with values twice as wide, "
        "one learned <i>λ</i> per layer, heads normalized"
    )
    is_differential = True
    split: ClassVar[dict[str, Split]] = {**Attention.split, "norm": "heads"}

    LAMBDA_NAMES = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    DUAL_LAMBDA_NAMES = ("lambda_a", "lambda_b")

    lambda_q1: nn.Parameter
    lambda_k1: nn.Parameter
    lambda_q2: nn.Parameter
    lambda_k2: nn.Parameter
    lambda_a: nn.Parameter
    lambda_b: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        share: Literal["q", "k"] | None = None,
        lambda_init: float | None = None,
        lambda_layer_offset: int = 0,
        dual_lambda: bool = False,
        heads_per_noise: int = 1,
        headwise_norm: bool = True,
        headwise_norm_eps: float = 1e-5,
        combine: Literal["subtract", "add"] = "subtract",
        **shared: Unpack[AttentionArgs],
    ) -> None:
        check_choice("share", share, (None, "q", "k"))
        check_choice("combine", combine, ("subtract", "add"))
        if heads_per_noise < 1 or (heads_per_noise > 1 and share == "q"):
            raise ValueError(
                f"heads_per_noise must be at least 1, and 1 if share='q', got {heads_per_noise}"
            )
        if lambda_init is not None and lambda_layer_offset:
            raise ValueError(
                f"lambda_layer_offset={lambda_layer_offset} has no effect with a constant "
                f"lambda_init={lambda_init}: remove one of them"
            )
        self.num_keys = 1 if share == "k" else 2
        self.num_queries = 1 if share == "q" else heads_per_noise + 1
        self.heads_per_noise = heads_per_noise
        super().__init__(dim, **shared)
        self.sign = -1.0 if combine == "add" else 1.0
        if lambda_init is None:
            lambda_init = lambda_init_at(self.layer_index + lambda_layer_offset)
        self.lambda_init = lambda_init
        # Of one element instead of none, because FSDP cannot shard scalars.
        self.lambda_names = self.DUAL_LAMBDA_NAMES if dual_lambda else self.LAMBDA_NAMES
        for name in self.lambda_names:
            size = 1 if dual_lambda else self.head_dim
            setattr(self, name, nn.Parameter(upcast(torch.empty(size))))
        self.reset_parameters()
        if headwise_norm_eps <= 0.0:
            raise ValueError(f"headwise_norm_eps must be positive, got {headwise_norm_eps}")
        self.norm = RMSNorm(2 * self.head_dim, headwise_norm_eps) if headwise_norm else None

    def reset_parameters(self) -> None:
        """Initialize the lambda vectors from a normal distribution with standard deviation 0.1, and
        the numbers of `dual_lambda` to 0."""
        for name in self.lambda_names:
            nn.init.normal_(getattr(self, name), std=0.1 if name in self.LAMBDA_NAMES else 0.0)

    def head_shapes(self) -> HeadShapes:
        for name, count in (("num_heads", self.num_heads), ("num_kv_heads", self.num_kv_heads)):
            if count % 2:
                raise ValueError(f"diff_v1 pairs its heads, so {name} must be even, got {count}")
        num_pairs, num_groups, head_dim = self.num_heads // 2, self.num_kv_heads // 2, self.head_dim
        num_noise, rest = divmod(num_pairs, self.heads_per_noise)
        if rest or (self.heads_per_noise > 1 and num_noise % num_groups):
            raise ValueError(
                f"heads_per_noise={self.heads_per_noise} heads share a query within a key group, "
                f"which does not divide {num_pairs} differential heads in {num_groups} groups"
            )
        return (
            (num_noise, self.num_queries, head_dim),
            (num_groups, self.num_keys, head_dim),
            (num_groups, 2 * head_dim),
        )

    def init_head_size(self, size: float) -> None:
        # Initial maps are nearly uniform, so all tokens get the same vector. The norm would scale
        # it to size 1, which dominates the tokens of a narrow model (docs/lab_notes.md, "A slow
        # start").
        if self.norm is not None:
            self.norm.init_weight = min(1.0, size)
            self.norm.reset_parameters()

    def lam(self, x: Tensor) -> Tensor:
        """The layer's lambda, a float32 scalar that does not depend on `x`."""
        vectors = [shared_by_heads(getattr(self, name)) for name in self.lambda_names]
        # Keep an axis: in torch 2.11 a scalar plus a Python number has a float64 tangent.
        if len(vectors) == 2:
            first, second = (exponent.exp() for exponent in vectors)
        else:
            q1, k1, q2, k2 = vectors
            first, second = ((q * k).sum(0, keepdim=True).exp() for q, k in ((q1, k1), (q2, k2)))
        return (self.sign * (first - second + self.lambda_init)).squeeze(0)

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        q, k = self.components(q, k)
        return diff_attention(
            q, k, v, self.lam(x), mask=mask, scale=self.scale, backend=self.backend
        )

    def components(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.num_queries == 2:
            return q, k
        return (q.expand(-1, -1, -1, 2, -1) if self.num_queries == 1 else paired(q)), k

    def finish(self, heads: Tensor) -> Tensor:
        if self.norm is None:
            return heads
        return self.norm(heads) * (1.0 - self.lambda_init)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DiffAttentionV1":
        """Cast and move the module, but keep the lambda vectors in float32: in bfloat16 lambda
        would have an error of 1e-3."""
        lambdas = [getattr(self, name) for name in self.lambda_names]

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            keep = moved.dtype.itemsize < 4 and any(tensor is lam for lam in lambdas)
            return tensor.to(moved.device) if keep else moved

        return super()._apply(move, recurse)
