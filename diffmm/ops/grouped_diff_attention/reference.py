"""Grouped differential attention as it is written: all maps are materialised."""

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
    """`(A_i - lam_i * A_noise(i)) V` for every signal head `i` (Lim et al. 2025).

    Shapes as in `diffmm.ops.grouped_diff_attention`, with `lam` already `[B, N, H]`; `upcast` as in
    the reference of `diff_attention`.
    """
    dtype = q.dtype
    if upcast and dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    num_queries, num_keys = q.shape[1], k.shape[1]
    num_signals = q.shape[3] - 1
    num_heads = q.shape[2] * num_signals

    signal = q[:, :, :, :-1].flatten(2, 3).transpose(1, 2)  # [B, H, N, D]
    noise = q[:, :, :, -1].transpose(1, 2)  # [B, J, N, D]
    k = k.transpose(1, 2)  # [B, G, M, D]
    v = v.repeat_interleave(num_heads // v.shape[2], dim=2).transpose(1, 2)  # [B, H, M, E]
    lam = lam.transpose(1, 2).unsqueeze(-1).to(q.dtype)  # [B, H, N, 1]

    visible = mask.to_bool(num_queries, num_keys, q.device)
    keys_of = [k.repeat_interleave(x.shape[1] // k.shape[1], dim=1) for x in (signal, noise)]
    a_signal = attention_map(signal, keys_of[0], visible, scale)
    a_noise = attention_map(noise, keys_of[1], visible, scale)
    a_noise = a_noise.repeat_interleave(num_signals, dim=1)
    return ((a_signal - lam * a_noise) @ v).transpose(1, 2).to(dtype)
