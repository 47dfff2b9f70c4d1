"""Differential attention: one function with several backends."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffmm.ops.checks import check_backend, check_qkv, in_forward_mode, is_for_hopper
from diffmm.ops.diff_attention.reference import reference
from diffmm.ops.diff_attention.sdpa import sdpa
from diffmm.ops.mask import AttentionMask


def _triton(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, *, mask: AttentionMask, scale: float
) -> Tensor:
    """The fused kernels. Triton is imported on the first call."""
    if in_forward_mode():
        raise ValueError(
            "backend 'triton' does not support forward-mode differentiation: use 'sdpa' or "
            "'reference' for torch.func.jvp and jacfwd"
        )
    try:
        from diffmm.ops.diff_attention.triton import triton_backend
    except ImportError as error:
        raise ValueError(f"backend 'triton' needs the triton package: {error}") from None
    return triton_backend(q, k, v, lam, mask=mask, scale=scale)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference,
    "sdpa": sdpa,
    "triton": _triton,
}


def choose_backend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> str:
    """The backend that `"auto"` selects for these tensors.

    `"triton"` requires a Hopper GPU, bfloat16 or float16, a head dimension of 32 to 128 and a value
    dimension of at most 256. It is selected for 128 or more queries, and for decoding (no
    gradients, fewer queries than keys, at most 64 queries per key group) if each component has its
    own key (v1) or the mask has tensors, with which `"sdpa"` does not divide the keys of a sequence
    among multiprocessors. Everything else uses `"sdpa"`. So does v2 with a head dimension of 40 to
    64, a value dimension of at most 64 and 8,192 or more keys, if torch's kernels support the mask
    directly (full, or causal with as many queries as keys); `"sdpa"` needs an eighth of the memory
    there. `num_keys` is supported for decoding without documents only.

    Measured in bfloat16, compiled for the shape, on an H100 (docs/performance.md): for 197 or more
    queries, forward and backward passes with `"triton"` take 0.47 to 0.93 of the time of `"sdpa"`
    for v1 and 0.66 to 0.96 for v2 (for v2 with a head dimension of 64, 1.05 to 1.07 at 4,096 keys
    and 1.10 at 8,192; v2's forward pass alone 0.76 to 1.25). Decoding one token with 256 to 32,768
    keys takes 0.11 to 0.47 of the GPU time for v1 and about the same host time (for v2 0.62 to 1.02
    of the GPU time and more host time). Shapes between the measured ones follow the same rule.
    """
    (_, N, H, _, D), (_, M, G, C, _), E = q.shape, k.shape, v.shape[-1]
    if not is_for_hopper(q, v, scale) or N > M:
        return "sdpa"
    is_long_v2 = C == 1 and 32 < D <= 64 and E <= 64 and M >= 8192
    if is_long_v2 and (mask.is_full or (mask.is_causal and N == M)):
        return "sdpa"
    decodes = N < M and N * H <= 64 * G and not torch.is_grad_enabled()
    if mask.num_keys is not None:
        return "triton" if decodes and mask.document_ids is None else "sdpa"
    return "triton" if N >= 128 or (decodes and (C == 2 or mask.per_sample)) else "sdpa"


def diff_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor | float,
    *,
    mask: AttentionMask,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Differential attention: the difference of two softmax maps times the values (Ye et al. 2025,
    eq. 1):

        (A1 - lam * A2) V,   Ai = softmax(scale * Qi Kiᵀ + mask)

    Noise that both maps have in common cancels. `lam` is not bounded: 0 gives softmax attention of
    the first component; with 1 the rows of the difference sum to zero.

    Args:
        q: Queries, `[B, N, H, 2, D]`: raw head `2i + c` of a projection is component `c` of
            differential head `i`.
        k: Keys, `[B, M, G, C, D]`, with one key per component (`C = 2`, v1) or one shared key
            (`C = 1`, v2, and v1 with shared keys). `G` divides `H`; head `i` reads group
            `i // (H // G)`.
        v: Values, `[B, M, G, E]`, with any `E`; v1 uses `2D`, v2 uses `D`.
        lam: Lambda; broadcasts to `[B, N, H]`. A scalar in v1, one per token and head in v2. Kept
            in float32 (float64 for float64 inputs), since in bfloat16 its error would be 1e-3.
        mask: Which keys each query attends to. If `N != M`, the queries are the last `N` positions.
        scale: Factor of the scores before the softmax; `D ** -0.5` by default, independent of the
            width of the values.
        backend: `"reference"` (materializes the maps, any device), `"sdpa"` (torch's fused softmax
            attention), `"triton"` (diffmm's fused kernels; CUDA, D up to 128, E up to 256), or
            `"auto"`, the faster one: `"triton"` in 16-bit precision on Hopper GPUs for 128 or more
            queries and for decoding with v1, except v2 with a head dimension of 64 and long
            sequences (see `choose_backend`); otherwise `"sdpa"`.

    Returns:
        `[B, N, H, E]` in q's dtype, differentiable with respect to q, k, v and lam. Rows of queries
        that attend to no key are zero, as are their gradients, on every backend.

    Raises:
        ValueError: If shapes, dtypes or devices do not match, or the backend is unknown.

    >>> q = torch.randn(2, 10, 4, 2, 16)  # [B, N, H, 2, D]
    >>> k = torch.randn(2, 10, 2, 2, 16)  # [B, M, G, 2, D]
    >>> v = torch.randn(2, 10, 2, 32)  # [B, M, G, E]
    >>> mask = diffmm.AttentionMask(causal=True)
    >>> diffmm.diff_attention(q, k, v, lam=0.8, mask=mask).shape
    torch.Size([2, 10, 4, 32])
    """
    if q.ndim != 5 or q.shape[3] != 2:
        raise ValueError(f"q must be [B, N, H, 2, D], got shape {tuple(q.shape)}")
    if k.ndim != 5 or k.shape[3] not in (1, 2):
        raise ValueError(f"k must be [B, M, G, C, D] with C 1 or 2, got shape {tuple(k.shape)}")
    check_qkv(q, k, v, mask)
    lam = as_map(lam, q.shape[:3], q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_backend(backend, BACKENDS)
    if backend == "auto":
        backend = choose_backend(q, k, v, mask, scale)
    return BACKENDS[backend](q, k, v, lam, mask=mask, scale=scale)


def as_map(lam: Tensor | float, shape: Sequence[int], q: Tensor) -> Tensor:
    """Expand `lam` to `[B, N, H]`, in float32, or float64 if q is float64."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lam = torch.as_tensor(lam, dtype=dtype, device=q.device)
    try:
        return lam.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"lam of shape {tuple(lam.shape)} does not broadcast to [B, N, H] = {tuple(shape)}"
        ) from None
