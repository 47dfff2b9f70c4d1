"""Differential attention as written in the paper, with both maps materialized."""

import torch
from torch import Tensor

from diffmm.ops.mask import AttentionMask
from diffmm.ops.softmax_attention.reference import attention_map


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor,
    *,
    mask: AttentionMask,
    scale: float,
    upcast: bool = True,
) -> Tensor:
    """`(A1 - lam * A2) V` with `Ai = softmax(scale * Qi Kiᵀ + mask)` (Ye et al. 2025, eq. 1).

    Shapes as in `diffmm.ops.diff_attention`, with `lam` expanded to `[B, N, H]`. With `upcast`,
    low-precision inputs are computed in float32, which tests use as the ground truth; without it,
    in their own precision, which defines the error that other backends may have.
    """
    dtype = q.dtype
    if upcast and dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    num_queries, num_keys = q.shape[1], k.shape[1]
    heads_per_group = q.shape[2] // k.shape[2]

    q1, q2 = q.permute(3, 0, 2, 1, 4)  # each [B, H, N, D]
    k = k.repeat_interleave(heads_per_group, dim=2).permute(3, 0, 2, 1, 4)  # [C, B, H, M, D]
    k1, k2 = k[0], k[-1]  # the same key if the components share one
    v = v.repeat_interleave(heads_per_group, dim=2).transpose(1, 2)  # [B, H, M, E]
    lam = lam.transpose(1, 2).unsqueeze(-1).to(q.dtype)  # [B, H, N, 1]

    visible = mask.to_bool(num_queries, num_keys, q.device)
    a1 = attention_map(q1, k1, visible, scale)
    a2 = attention_map(q2, k2, visible, scale)
    return ((a1 - lam * a2) @ v).transpose(1, 2).to(dtype)
