"""Grouped differential attention, in which several signal heads share a noise head."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diffmm.ops.checks import check_backend, check_qkv
from diffmm.ops.diff_attention import as_map, diff_attention
from diffmm.ops.mask import AttentionMask
from diffmm.ops.softmax_attention import softmax_attention
from diffmm.ops.softmax_attention.reference import attention_map


def grouped_diff_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor | float,
    *,
    mask: AttentionMask,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Differential attention in which `R` signal heads share one noise head (Lim et al. 2025):

        (A_i - lam_i * A_noise(i)) V,   A = softmax(scale * Q Kᵀ + mask)

    `R = 1` is bit-identical to `diff_attention` with shared keys.

    Args:
        q: Queries, `[B, N, J, R + 1, D]`: for each of `J` noise heads, the `R` signal queries and
            then the noise query that they share. There are `H = J * R` heads; head `i` has noise
            head `i // R`.
        k: Keys, `[B, M, G, D]`; `G` divides `J`, and head `i` reads group `i // (H // G)`.
        v: Values, `[B, M, G, E]`.
        lam: Lambda; broadcasts to `[B, N, H]`. Kept in float32 (float64 for float64 inputs).
        mask: Which keys each query attends to.
        scale: Factor of the scores before the softmax; `D ** -0.5` by default.
        backend: `"reference"` (materializes the maps, any device), or that of one softmax attention
            over all signal and noise heads: `"sdpa"`, `"triton"`, or `"auto"` (see
            `diffmm.ops.softmax_attention.choose_backend`).

    Returns:
        `[B, N, H, E]` in q's dtype, differentiable with respect to q, k, v and lam. Rows of queries
        that attend to no key are zero, as are their gradients, on every backend.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or the backend is unknown.
    """
    if q.ndim != 5 or q.shape[3] < 2:
        raise ValueError(
            f"q must be [B, N, J, R + 1, D] with R at least 1, got shape {tuple(q.shape)}"
        )
    if k.ndim != 4:
        raise ValueError(f"k must be [B, M, G, D], got shape {tuple(k.shape)}")
    check_qkv(q, k, v, mask)
    num_signals = q.shape[3] - 1
    if num_signals == 1:
        key = k.unsqueeze(3)
        return diff_attention(q, key, v, lam, mask=mask, scale=scale, backend=backend)
    lam = as_map(lam, (*q.shape[:2], q.shape[2] * num_signals), q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_backend(backend, BACKENDS)
    return BACKENDS[backend](q, k, v, lam, mask=mask, scale=scale)


def paired(q: Tensor) -> Tensor:
    """Convert `[B, N, J, R + 1, D]` to the queries of `diff_attention`, `[B, N, J * R, 2, D]`, in
    which every signal query is followed by its noise query."""
    signal, noise = q[:, :, :, :-1], q[:, :, :, -1:]
    return torch.stack([signal, noise.expand_as(signal)], dim=4).flatten(2, 3)


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
    """`(A_i - lam_i * A_noise(i)) V` for every signal head `i` (Lim et al. 2025), all maps
    materialized.

    Shapes as in `diffmm.ops.grouped_diff_attention`, with `lam` expanded to `[B, N, H]`; `upcast`
    as in the reference of `diff_attention`.
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


def _by_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor,
    *,
    mask: AttentionMask,
    scale: float,
    backend: str,
) -> Tensor:
    # With this head order, raw head (R + 1) j + c reads group j // (J // G).
    heads = softmax_attention(q.flatten(2, 3), k, v, mask=mask, scale=scale, backend=backend)
    heads = heads.unflatten(2, q.shape[2:4])  # [B, N, J, R + 1, E]
    signal, noise = heads[:, :, :, :-1], heads[:, :, :, -1:]
    lam = lam.unflatten(2, (-1, signal.shape[3])).unsqueeze(-1)
    return (signal - lam * noise).to(heads.dtype).flatten(2, 3)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference,
    **{name: partial(_by_heads, backend=name) for name in ("auto", "sdpa", "triton")},
}
