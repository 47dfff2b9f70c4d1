"""The three attention layers: softmax, differential (v1) and differential (v2).

They take the same arguments and differ in what they project to and how they combine it. Letters:
B batch, N tokens, H heads, G key groups, C components, D head dim, E value dim.
"""

import math
from collections.abc import Callable
from typing import Literal, NotRequired, TypedDict, Unpack

import torch
from torch import Tensor, nn

from diffmm.checks import check_choice
from diffmm.layers.cache import LayerCache
from diffmm.layers.linear import Linear
from diffmm.layers.norm import CosineNorm, RMSNorm, upcast
from diffmm.layers.rope import Rotation, apply_rope
from diffmm.ops import AttentionMask, diff_attention, softmax_attention

HeadShapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class AttentionArgs(TypedDict):
    """The arguments that all three layers share; `Attention` says what they mean."""

    num_heads: int
    num_kv_heads: NotRequired[int | None]
    head_dim: NotRequired[int | None]
    layer_index: NotRequired[int]
    qkv_bias: NotRequired[bool]
    out_bias: NotRequired[bool]
    qk_norm: NotRequired[bool]
    backend: NotRequired[str]


class Attention(nn.Module):
    """What the three layers share: project, turn, remember, attend, project back.

    Args:
        dim: width of input and output.
        num_heads: query heads of `head_dim` **in the softmax layer of this size**. v1 pairs them
            into `num_heads / 2` differential heads, v2 doubles them into `num_heads` pairs.
        num_kv_heads: key and value heads, counted in the same way; `num_heads` by default. Fewer
            means grouped keys.
        head_dim: `D`, `dim / num_heads` by default.
        layer_index: the layer's number from 0, in v1 lambda's start. It stays with a layer whatever
            happens to its neighbours.
        qkv_bias: whether the query, key and value projections have a bias.
        out_bias: whether the output projection has one.
        qk_norm: whether queries and keys get an RMSNorm over `D` each.
        backend: of the op, see `diffmm.ops.diff_attention`.

    Raises:
        ValueError: for counts that do not divide each other.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_index: int = 0,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(
                f"num_heads must divide dim, got {num_heads} heads for dim {dim}: "
                f"change one of them or give head_dim"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads, got {self.num_kv_heads} and {num_heads}"
            )
        self.layer_index = layer_index
        self.backend = backend
        self.q_shape, self.k_shape, self.v_shape = self.head_shapes()
        self.q_proj = Linear(dim, math.prod(self.q_shape), bias=qkv_bias)
        self.k_proj = Linear(dim, math.prod(self.k_shape), bias=qkv_bias)
        self.v_proj = Linear(dim, math.prod(self.v_shape), bias=qkv_bias)
        self.out_proj = Linear(num_heads * self.head_dim, dim, bias=out_bias)
        self.q_norm: nn.Module = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(self.head_dim) if qk_norm else nn.Identity()

    def head_shapes(self) -> HeadShapes:
        """How one token's query, key and value split: `(H, [C,] D)`, `(G, [C,] D)`, `(G, E)`."""
        raise NotImplementedError

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        """Queries, keys and values to `[B, N, H, E]`; `x` is the layer's input."""
        raise NotImplementedError

    def init_head_size(self, size: float) -> None:
        """Start with heads whose root mean square is at most `size`, which is that of a value.
        Averages of values already are no larger."""

    def project(self, x: Tensor, rope: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values of `x`, as the op takes them."""
        # Under tensor parallelism a process has a share of the heads: hence -1.
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, *self.q_shape[1:])))
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, *self.k_shape[1:])))
        v = self.v_proj(x).unflatten(-1, (-1, *self.v_shape[1:]))
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        *,
        mask: AttentionMask,
        rope: Rotation | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """`[B, N, dim]` to `[B, N, dim]`. With a cache, `mask` speaks of all keys seen so far."""
        q, k, v = self.project(x, rope)
        if cache is not None:
            k, v = cache.update(k, v)
        return self.out_proj(self.attend(x, q, k, v, mask).flatten(2))


class SoftmaxAttention(Attention):
    """`softmax(Q Kᵀ / √D) V`: the layer that the other two are compared with.

    Args:
        dim: as in `Attention`, like the shared arguments that are not listed.
        cosine: cosine-normalized logits with a learned temperature a head in place of `Q Kᵀ / √D`
            (SwinV2, Liu et al. 2022); excludes `qk_norm`.

    >>> layer = diffmm.SoftmaxAttention(dim=64, num_heads=4)
    >>> layer(torch.randn(2, 10, 64), mask=diffmm.AttentionMask(causal=True)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(self, dim: int, *, cosine: bool = False, **shared: Unpack[AttentionArgs]) -> None:
        super().__init__(dim, **shared)
        if cosine and shared.get("qk_norm"):
            raise ValueError("cosine=True normalizes queries and keys already: drop qk_norm")
        self.scale = 1.0 if cosine else self.head_dim**-0.5
        if cosine:
            self.q_norm, self.k_norm = CosineNorm(self.num_heads), CosineNorm()

    def head_shapes(self) -> HeadShapes:
        key = (self.num_kv_heads, self.head_dim)
        return (self.num_heads, self.head_dim), key, key

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        return softmax_attention(q, k, v, mask=mask, scale=self.scale, backend=self.backend)


def shared_by_heads(parameter: Tensor) -> Tensor:
    """A parameter that all heads use, as a plain tensor. Under tensor parallelism each process has
    all of it and some of the heads, so that the gradients of all processes add up to its own."""
    if type(parameter) in (Tensor, nn.Parameter):
        return parameter
    from torch.distributed.tensor import DTensor, Partial  # a third of a second

    # Not `hasattr(parameter, "to_local")`, which is false while Dynamo traces.
    if isinstance(parameter, DTensor):
        return parameter.to_local(grad_placements=[Partial()])
    return parameter


def lambda_init_at(layer_index: int) -> float:
    """`0.8 - 0.6 exp(-0.3 layer_index)`, where lambda starts in v1 (Ye et al. 2025, section 2.1;
    the paper counts layers from 1)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer_index)


class DiffAttentionV1(Attention):
    """Differential attention (Ye et al. 2025, eqs. 1 to 3): one lambda a layer, values `2D` wide.

        head_i = (1 - lambda_init) RMSNorm((A1_i - lambda A2_i) V_i)
        lambda = exp(lambda_q1·lambda_k1) - exp(lambda_q2·lambda_k2) + lambda_init

    for `num_heads / 2` differential heads; raw head `2i + c` of the projections is component `c`
    of head `i`. The lambda vectors are float32 and stay so when the module is cast to half.

    Args:
        dim: as in `Attention`, like the shared arguments that are not listed; `num_heads` and
            `num_kv_heads` must be even.
        share: let both components use one query (`"q"`) or one key (`"k"`), an ablation.
        lambda_init: a constant in place of the layer's `lambda_init_at(layer_index)`.
        headwise_norm: whether heads are normalized. Without it the factor `1 - lambda_init`, which
            is that norm's scale, goes too.
        combine: `"add"` gives `A1 + lambda A2`, an ablation.

    >>> layer = diffmm.DiffAttentionV1(dim=64, num_heads=4, layer_index=0)
    >>> layer(torch.randn(2, 10, 64), mask=diffmm.AttentionMask(causal=True)).shape
    torch.Size([2, 10, 64])
    """

    LAMBDA_NAMES = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")

    lambda_q1: nn.Parameter
    lambda_k1: nn.Parameter
    lambda_q2: nn.Parameter
    lambda_k2: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        share: Literal["q", "k"] | None = None,
        lambda_init: float | None = None,
        headwise_norm: bool = True,
        combine: Literal["subtract", "add"] = "subtract",
        **shared: Unpack[AttentionArgs],
    ) -> None:
        check_choice("share", share, (None, "q", "k"))
        check_choice("combine", combine, ("subtract", "add"))
        self.num_keys, self.num_queries = 1 if share == "k" else 2, 1 if share == "q" else 2
        super().__init__(dim, **shared)
        self.sign = -1.0 if combine == "add" else 1.0
        self.lambda_init = lambda_init_at(self.layer_index) if lambda_init is None else lambda_init
        for name in self.LAMBDA_NAMES:
            setattr(self, name, nn.Parameter(upcast(torch.empty(self.head_dim))))
        self.reset_parameters()
        self.norm = RMSNorm(2 * self.head_dim, eps=1e-5) if headwise_norm else None

    def reset_parameters(self) -> None:
        """Start the lambda vectors anew, at N(0, 0.1)."""
        for name in self.LAMBDA_NAMES:
            nn.init.normal_(getattr(self, name), std=0.1)

    def head_shapes(self) -> HeadShapes:
        for name, count in (("num_heads", self.num_heads), ("num_kv_heads", self.num_kv_heads)):
            if count % 2:
                raise ValueError(f"diff_v1 pairs its heads, so {name} must be even, got {count}")
        num_pairs, num_groups, head_dim = self.num_heads // 2, self.num_kv_heads // 2, self.head_dim
        return (
            (num_pairs, self.num_queries, head_dim),
            (num_groups, self.num_keys, head_dim),
            (num_groups, 2 * head_dim),
        )

    def init_head_size(self, size: float) -> None:
        # Nearly uniform maps give all tokens one vector, which the norm would blow up to size 1:
        # in a narrow model that drowns the tokens themselves (docs/lab_notes.md, "A slow start").
        if self.norm is not None:
            self.norm.init_weight = min(1.0, size)
            self.norm.reset_parameters()

    def lam(self, x: Tensor) -> Tensor:
        """This layer's lambda, a float32 scalar (the same for every `x`)."""
        q1, k1, q2, k2 = (shared_by_heads(getattr(self, name)) for name in self.LAMBDA_NAMES)
        # With an axis: torch 2.11 gives a scalar plus a Python number a tangent in float64.
        first, second = ((q * k).sum(0, keepdim=True).exp() for q, k in ((q1, k1), (q2, k2)))
        return (self.sign * (first - second + self.lambda_init)).squeeze(0)

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        q = q.expand(-1, -1, -1, 2, -1)
        heads = diff_attention(q, k, v, self.lam(x), mask=mask, backend=self.backend)
        if self.norm is None:
            return heads
        return self.norm(heads) * (1.0 - self.lambda_init)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DiffAttentionV1":
        """Move the module as usual, but leave the lambda vectors their precision: in bfloat16
        lambda would be off by 1e-3."""
        lambdas = [getattr(self, name) for name in self.LAMBDA_NAMES]

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            keep = moved.dtype.itemsize < 4 and any(tensor is lam for lam in lambdas)
            return tensor.to(moved.device) if keep else moved

        return super()._apply(move, recurse)


class DiffAttentionV2(Attention):
    """Differential attention, second version (the authors' DIFF V2, 2026): a lambda for each token
    and head, twice the queries, keys shared, no norm.

        head_i = (A1_i - sigmoid(lambda_proj(x))_i A2_i) V_i

    for `num_heads` differential heads; raw query heads `2i, 2i + 1` are the components of head
    `i`, always in one key group.

    Args:
        dim: as in `Attention`, like the shared arguments that are not listed.
        combine: `"add"` gives `A1 + lambda A2`, an ablation.

    >>> layer = diffmm.DiffAttentionV2(dim=64, num_heads=4)
    >>> layer(torch.randn(2, 10, 64), mask=diffmm.AttentionMask(causal=True)).shape
    torch.Size([2, 10, 64])
    """

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
        """Lambda of each token and head, `[B, N, H]` in float32, between 0 and 1."""
        return self.sign * upcast(self.lambda_proj(x)).sigmoid()

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        return diff_attention(q, k, v, self.lam(x), mask=mask, backend=self.backend)


ATTENTIONS: dict[str, type[Attention]] = {
    "softmax": SoftmaxAttention,
    "diff_v1": DiffAttentionV1,
    "diff_v2": DiffAttentionV2,
}
