"""Softmax attention as written in papers, with the map materialized."""

import torch
from torch import Tensor

from diffmm.ops.mask import AttentionMask


def attention_map(
    q: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """`softmax(scale * q kᵀ)` over the visible keys; zeros for queries without visible keys.

    Args:
        q: Queries, `[..., N, D]`.
        k: Keys, `[..., M, D]`.
        visible: Booleans that broadcast to `[..., N, M]`, true where a query attends to a key.
        scale: Factor of the scores before the softmax.
        softcap: Bound of the scores; see `capped`.
    """
    return masked_softmax(capped(scale * (q @ k.transpose(-2, -1)), softcap), visible)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Bound scores smoothly to `(-softcap, softcap)` by `softcap * tanh(scores / softcap)`
    (Gemma 2, Riviere et al. 2024, section 2); None leaves them unchanged."""
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax of `[..., N, M]` scores over the visible keys; zeros for queries without any."""
    # The lowest finite number, because a row of -inf has a NaN softmax and NaN gradients.
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return weights.masked_fill(~visible, 0.0)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: AttentionMask,
    scale: float,
    softcap: float | None = None,
    upcast: bool = True,
) -> Tensor:
    """`softmax(scale * Q Kᵀ + mask) V`, with shapes as in `diffmm.ops.softmax_attention`.

    With `upcast`, low-precision inputs are computed in float32, which tests use as the ground
    truth; without it, in their own precision, which defines the error that other backends may have.
    """
    dtype = q.dtype
    if upcast and dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    num_queries, num_keys = q.shape[1], k.shape[1]
    heads_per_group = q.shape[2] // k.shape[2]

    q = q.transpose(1, 2)  # [B, H, N, D]
    k = k.transpose(1, 2).repeat_interleave(heads_per_group, dim=1)  # [B, H, M, D]
    v = v.transpose(1, 2).repeat_interleave(heads_per_group, dim=1)  # [B, H, M, E]
    visible = mask.to_bool(num_queries, num_keys, q.device)
    return (attention_map(q, k, visible, scale, softcap) @ v).transpose(1, 2).to(dtype)
