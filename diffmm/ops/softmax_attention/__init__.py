"""Softmax attention with diffmm's masks and backends."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffmm.ops.checks import check_backend, check_qkv, in_forward_mode, is_for_hopper
from diffmm.ops.mask import AttentionMask
from diffmm.ops.softmax_attention.reference import reference
from diffmm.ops.softmax_attention.sdpa import sdpa


def _triton(q: Tensor, k: Tensor, v: Tensor, *, mask: AttentionMask, scale: float) -> Tensor:
    """The fused kernels. Triton is imported on the first call."""
    if in_forward_mode():
        raise ValueError(
            "backend 'triton' does not support forward-mode differentiation: use 'sdpa' or "
            "'reference' for torch.func.jvp and jacfwd"
        )
    try:
        from diffmm.ops.diff_attention.triton import softmax_backend
    except ImportError as error:
        raise ValueError(f"backend 'triton' needs the triton package: {error}") from None
    return softmax_backend(q, k, v, mask=mask, scale=scale)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference,
    "sdpa": sdpa,
    "triton": _triton,
}


def choose_backend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> str:
    """The backend that `"auto"` selects for these tensors.

    torch's kernels (`"sdpa"`) support full masks, and causal ones with as many queries as keys, as
    flags; any other mask is a tensor of `N * M` booleans for them, which takes them at least twice
    the time of a causal one and skips nothing. For such a mask, `"triton"` is selected on Hopper
    GPUs, in bfloat16 or float16 and with a head dimension of 32 to 128: for 128 or more queries,
    and for decoding (no gradients, fewer queries than keys, at most 64 queries per key group) if
    the mask has tensors. `num_keys` is supported for decoding without documents only.
    """
    (N, H), (M, G) = q.shape[1:3], k.shape[1:3]
    is_flag = mask.is_full or (mask.is_causal and N in (1, M))
    if is_flag or N > M or not is_for_hopper(q, v, scale):
        return "sdpa"
    decodes = N < M and N * H <= 64 * G and not torch.is_grad_enabled()
    if mask.num_keys is not None:
        return "triton" if decodes and mask.document_ids is None else "sdpa"
    return "triton" if N >= 128 or (decodes and mask.per_sample) else "sdpa"


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: AttentionMask,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention, `softmax(scale * Q Kᵀ + mask) V`: the baseline for differential attention.

    Args:
        q: Queries, `[B, N, H, D]`.
        k: Keys, `[B, M, G, D]`; `G` divides `H`, and head `i` reads group `i // (H // G)`.
        v: Values, `[B, M, G, E]`.
        mask: Which keys each query attends to.
        scale: Factor of the scores before the softmax; `D ** -0.5` by default.
        softcap: Bounds the scores to `softcap * tanh(score / softcap)` before the mask; None means
            no bound. Only `"reference"` supports it, which `"auto"` then selects.
        backend: `"reference"` (materializes the maps, any device), `"sdpa"` (torch's fused
            kernels), `"triton"` (diffmm's fused kernels; CUDA, D up to 128), or `"auto"` (see
            `choose_backend`).

    Returns:
        `[B, N, H, E]` in q's dtype. Rows of queries that attend to no key are zero, as are their
        gradients.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, `softcap` is not positive, or the
            backend is unknown or does not support `softcap`.

    >>> q, k, v = (torch.randn(2, 10, 4, 16) for _ in "qkv")
    >>> diffmm.softmax_attention(q, k, v, mask=diffmm.AttentionMask(window=3)).shape
    torch.Size([2, 10, 4, 16])
    """
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"q and k must be [B, N, H, D] and [B, M, G, D], "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    check_qkv(q, k, v, mask)
    check_backend(backend, BACKENDS)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if softcap is not None:
        if softcap <= 0.0:
            raise ValueError(f"softcap must be positive, got {softcap}")
        if backend not in ("auto", "reference"):
            raise ValueError(
                f"backend {backend!r} does not support softcap={softcap}: use 'reference'"
            )
        return reference(q, k, v, mask=mask, scale=scale, softcap=softcap)
    if backend == "auto":
        backend = choose_backend(q, k, v, mask, scale)
    return BACKENDS[backend](q, k, v, mask=mask, scale=scale)
