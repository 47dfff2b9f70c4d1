"""Lighter alternatives to a second map, as attentions of small twins, in plain torch.

Importing this module registers `clipped_softmax`, `strided_sparse`, `routed` and `cosformer` as
values of `BackboneConfig.attention`. The defaults of their own settings suit sequences of about 64
tokens; for others, register a subclass under a name of its own. They have the parameters of softmax
attention. Except for cosFormer, they compute a whole map: they show what their weights do to
quality, not to speed. Gated attention is `output_gate` of any attention.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from diffmm.layers import Attention, register_attention
from diffmm.layers.attention import AttentionArgs, HeadShapes
from diffmm.ops import AttentionMask
from diffmm.ops.checks import check_backend
from diffmm.ops.softmax_attention.reference import masked_softmax

SMALLEST = 1e-6
"""Smallest denominator of `cosformer`: queries and keys without common features give zeros."""


class Alternative(Attention):
    """Base class: heads as in softmax attention, and no maps that the analysis could show.

    Raises:
        ValueError: If `backend` is not `"auto"`: there is one implementation.
    """

    def __init__(self, dim: int, **shared: Unpack[AttentionArgs]) -> None:
        check_backend(shared.get("backend", "auto"), ())
        super().__init__(dim, **shared)

    def head_shapes(self) -> HeadShapes:
        key = (self.num_kv_heads, self.head_dim)
        return (self.num_heads, self.head_dim), key, key

    def components(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Raise an error: the maps of the analysis are softmax over all visible keys.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"the weights of {self.label} attention are not those of softmax(scale * Q Kᵀ): "
            f"analyze a model with softmax or differential attention"
        )

    def refuse(self, mask: AttentionMask, *names: str) -> None:
        """Check that a mask does not use what this attention cannot serve.

        Raises:
            ValueError: If it does; the message names it.
        """
        for name in names:
            if getattr(mask, name) is not None:
                raise ValueError(
                    f"{self.label} attention does not support masks with {name}: use softmax "
                    f"attention, or data without it"
                )

    def refuse_padding(self, mask: AttentionMask, num_queries: int, num_keys: int) -> None:
        """Check that a mask has no padding if there are cached keys: between padding and unwritten
        keys of a cache, keys do not have the positions that patterns depend on.

        Raises:
            ValueError: If it has.
        """
        if num_queries != num_keys and mask.key_padding is not None:
            raise ValueError(
                f"{self.label} attention does not decode with key_padding: generate with "
                f"cuda_graph=False, and prompts of one length"
            )


def by_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[B, H, N, D]`, keys `[B, H, M, D]` and values `[B, H, M, E]`, one key per head."""
    heads_per_group = q.shape[2] // k.shape[2]
    k, v = (each.transpose(1, 2).repeat_interleave(heads_per_group, dim=1) for each in (k, v))
    return q.transpose(1, 2), k, v


def distances(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Position of each query less that of each key, `[N, M]`; queries are the last positions."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)
    return query[:, None] - torch.arange(num_keys, device=device)


class ClippedSoftmax(Alternative):
    """Clipped softmax (Bondarenko et al. 2023, "Quantizable Transformers", section 4.1).

        clip((zeta - gamma) softmax(Q Kᵀ / √D) + gamma, 0, 1) V

    Weights reach exactly 0 and 1, so that a head can do nothing without logits that grow. Where a
    weight is clipped, it has no gradient. Serves all masks.

    Args:
        dim: Width of input and output. The shared arguments are documented in `Attention`.
        gamma: Lower end of the stretched interval, at most 0: weights up to
            `-gamma / (zeta - gamma)` become 0. The paper recommends -2 to -4 divided by the length
            of the sequences in tokens.
        zeta: Upper end, at least 1; above 1, large weights become exactly 1.

    Raises:
        ValueError: If `gamma` or `zeta` is out of range.
    """

    label = "clipped softmax"
    equation = "clip((<i>ζ</i> − <i>γ</i>) <i>A</i> + <i>γ</i>, 0, 1) <i>V</i>"

    def __init__(
        self,
        dim: int,
        *,
        gamma: float = -0.03,
        zeta: float = 1.0,
        **shared: Unpack[AttentionArgs],
    ) -> None:
        if not gamma <= 0.0 or not zeta >= 1.0:
            raise ValueError(f"gamma must be at most 0 and zeta at least 1, got {gamma} and {zeta}")
        super().__init__(dim, **shared)
        self.gamma, self.zeta = gamma, zeta

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        q, k, v = by_head(q, k, v)
        visible = mask.to_bool(q.shape[2], k.shape[2], q.device)
        weights = masked_softmax(self.scale * (q @ k.mT), visible)
        weights = ((self.zeta - self.gamma) * weights + self.gamma).clamp(0.0, 1.0)
        return (weights @ v).transpose(1, 2)


class StridedSparse(Alternative):
    """Strided sparse attention (Child et al. 2019, "Sparse Transformers", section 4.3).

    A query at position `i` attends to a key at `j` if `|i - j| < stride` or `stride` divides
    `i - j`: every head has the union of both patterns (the merged head of section 5.1). The mask
    applies in addition. Serves all masks, but does not decode with padding.

    Args:
        dim: Width of input and output. The shared arguments are documented in `Attention`.
        stride: Width of the local pattern and step of the strided one, in tokens, at least 1. The
            paper recommends about the square root of the length.

    Raises:
        ValueError: If `stride` is below 1.
    """

    label = "strided sparse"
    equation = "<i>A V</i>, over keys nearer than a stride or at multiples of it"

    def __init__(self, dim: int, *, stride: int = 8, **shared: Unpack[AttentionArgs]) -> None:
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        super().__init__(dim, **shared)
        self.stride = stride

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        q, k, v = by_head(q, k, v)
        num_queries, num_keys = q.shape[2], k.shape[2]
        self.refuse_padding(mask, num_queries, num_keys)
        gap = distances(num_queries, num_keys, q.device)
        pattern = (gap.abs() < self.stride) | (gap % self.stride == 0)
        visible = mask.to_bool(num_queries, num_keys, q.device) & pattern
        return (masked_softmax(self.scale * (q @ k.mT), visible) @ v).transpose(1, 2)


class Routed(Alternative):
    """Attention routed to blocks of keys by their mean (MoBA, Lu et al. 2025, section 2.2).

    Each query of each head attends to its own block and to the `num_blocks - 1` others whose mean
    key has the largest product with it; with a causal mask, only to earlier ones. The selection has
    no gradient. An unfinished block of a decoder is only chosen by its own queries, so that
    decoding with the cache gives the same as the full pass. Serves causal and full masks, and
    padding, which does not enter the means, except in decoding.

    Args:
        dim: Width of input and output. The shared arguments are documented in `Attention`.
        block_size: Number of keys of a block, at least 1.
        num_blocks: Number of blocks per query, its own included, at least 1. Sequences of no more
            blocks have softmax attention.

    Raises:
        ValueError: If `block_size` or `num_blocks` is below 1.
    """

    label = "routed"
    equation = "<i>A V</i>, over the blocks whose mean key fits the query best"

    def __init__(
        self,
        dim: int,
        *,
        block_size: int = 4,
        num_blocks: int = 3,
        **shared: Unpack[AttentionArgs],
    ) -> None:
        if block_size < 1 or num_blocks < 1:
            raise ValueError(
                f"block_size and num_blocks must be at least 1, got {block_size} and {num_blocks}"
            )
        super().__init__(dim, **shared)
        self.block_size, self.num_blocks = block_size, num_blocks

    def chosen(self, q: Tensor, k: Tensor, mask: AttentionMask) -> Tensor:
        """Which keys are in the blocks of each query, `[B, H, N, M]` booleans, for queries
        `[B, H, N, D]` and keys `[B, H, M, D]`."""
        num_queries, num_keys = q.shape[2], k.shape[2]
        key_block = torch.arange(num_keys, device=q.device) // self.block_size
        own = key_block[num_keys - num_queries :, None]  # [N, 1]
        block = torch.arange(-(-num_keys // self.block_size), device=q.device)
        real = k.new_ones(len(k), 1, num_keys, 1)
        if mask.key_padding is not None:
            real = real * mask.key_padding[:, None, :, None]
        sums, counts = (
            each.new_zeros(*each.shape[:2], len(block), each.shape[3]).index_add(2, key_block, each)
            for each in (k * real, real)
        )
        scores = q @ (sums / counts.clamp(min=1.0)).mT
        scores = scores.masked_fill(counts.mT == 0.0, -torch.inf).masked_fill(
            block == own, torch.inf
        )
        if mask.causal:
            scores = scores.masked_fill(block > own, -torch.inf)
        best = scores.topk(min(self.num_blocks, len(block)), dim=-1).indices
        is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        return is_chosen[..., key_block]

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        self.refuse(mask, "window", "prefix_lengths", "document_ids")
        self.refuse_padding(mask, q.shape[1], k.shape[1])
        q, k, v = by_head(q, k, v)
        with torch.no_grad():
            chosen = self.chosen(q, k, mask)
        visible = mask.to_bool(q.shape[2], k.shape[2], q.device) & chosen
        return (masked_softmax(self.scale * (q @ k.mT), visible) @ v).transpose(1, 2)


class CosFormer(Alternative):
    """cosFormer, a linear attention (Qin et al. 2022, section 3).

        w_ij = relu(q_i) · relu(k_j) cos(π/2 (i - j) / L),   o_i = sum_j w_ij v_j / sum_j w_ij

    without a map: `cos(a - b) = cos a cos b + sin a sin b` makes the weights products of features
    of the query and of the key, which are summed once, or chunk by chunk with a causal mask.
    Rotary positions of the model precede the ReLU. Serves causal and full masks, and padding,
    except in decoding.

    Args:
        dim: Width of input and output. The shared arguments are documented in `Attention`.
        reach: `L`, the distance at which weights reach 0, in tokens, at least as long as any
            sequence. By default the length of the sequence, as in the paper, which changes while
            one token follows another; a cache is then refused.
        chunk_size: Number of queries per chunk of a causal sequence.

    Raises:
        ValueError: If `reach` or `chunk_size` is below 1.
    """

    label = "cosFormer"
    equation = (
        "<i>A V</i>, where <i>A</i> ∝ relu(<i>Q</i>) relu(<i>K</i>)ᵀ "
        "cos(<i>π</i>(<i>i</i> − <i>j</i>)/2<i>L</i>)"
    )

    def __init__(
        self,
        dim: int,
        *,
        reach: int | None = None,
        chunk_size: int = 64,
        **shared: Unpack[AttentionArgs],
    ) -> None:
        if min(reach or 1, chunk_size) < 1 or reach == 0:
            raise ValueError(
                f"reach and chunk_size must be at least 1, got {reach} and {chunk_size}"
            )
        super().__init__(dim, **shared)
        self.reach, self.chunk_size = reach, chunk_size

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        self.refuse(mask, "window", "prefix_lengths", "document_ids")
        num_queries, num_keys = q.shape[1], k.shape[1]
        self.refuse_padding(mask, num_queries, num_keys)
        if num_queries != num_keys and (self.reach is None or not mask.causal):
            raise ValueError(
                f"{self.label} attention decodes with a fixed reach and a causal mask only, got "
                f"reach={self.reach}: give the layer a reach, and generate with cuda_graph=False"
            )
        reach = num_keys if self.reach is None else self.reach
        if num_keys > reach:
            raise ValueError(f"{num_keys} tokens are more than reach={reach}: increase reach")
        real = mask.key_padding
        with torch.autocast(q.device.type, enabled=False):  # sums of many products need float32
            heads = self.heads(q, k, v, reach=reach, causal=mask.causal, real=real)
        return heads.to(q.dtype)

    def heads(
        self, q: Tensor, k: Tensor, v: Tensor, *, reach: int, causal: bool, real: Tensor | None
    ) -> Tensor:
        """The heads `[B, N, H, E]`, in float32 (float64 for such inputs)."""
        num_keys, past = k.shape[1], k.shape[1] - q.shape[1]
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, v = by_head(q.to(dtype), k.to(dtype), v.to(dtype))
        angle = math.pi / 2 / reach * torch.arange(num_keys, device=q.device, dtype=dtype)
        q, k = features(q, angle[past:]), features(k, angle)
        if real is not None:
            k = k * real[:, None, :, None]
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # the last sum is the denominator
        sums = self.causal_sums(q, k, v) if causal else q @ (k.mT @ v)
        return (sums[..., :-1] / sums[..., -1:].clamp(min=SMALLEST)).transpose(1, 2)

    def causal_sums(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`sum_{j <= i} (q_i · k_j) v_j` for `[B, H, N, F]`, `[B, H, M, F]` and `[B, H, M, E]`."""
        past = k.shape[2] - q.shape[2]
        state = k[:, :, :past].mT @ v[:, :, :past]
        sums = []
        chunks = (
            part.split(self.chunk_size, dim=2) for part in (q, k[:, :, past:], v[:, :, past:])
        )
        for queries, keys, values in zip(*chunks, strict=True):
            sums.append(queries @ state + (queries @ keys.mT).tril() @ values)
            state = state + keys.mT @ values
        return torch.cat(sums, dim=2)


def features(x: Tensor, angle: Tensor) -> Tensor:
    """`relu(x)` times the cosine and the sine of the position's angle, `[B, H, N, 2 D]`."""
    x, angle = x.relu(), angle[:, None]
    return torch.cat([x * angle.cos(), x * angle.sin()], dim=-1)


ALTERNATIVES: dict[str, type[Alternative]] = {
    "clipped_softmax": ClippedSoftmax,
    "strided_sparse": StridedSparse,
    "routed": Routed,
    "cosformer": CosFormer,
}
"""The attentions of this module, by name."""


def register() -> None:
    """Make the attentions available as `BackboneConfig.attention`."""
    for name, attention in ALTERNATIVES.items():
        register_attention(name)(attention)


register()
