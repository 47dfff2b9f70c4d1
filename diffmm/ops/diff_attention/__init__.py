"""Differential attention: one function, several backends, one truth."""

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffmm.ops.checks import check_backend, check_qkv, in_forward_mode
from diffmm.ops.diff_attention.reference import reference
from diffmm.ops.diff_attention.sdpa import sdpa
from diffmm.ops.mask import AttentionMask


def _triton(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, *, mask: AttentionMask, scale: float
) -> Tensor:
    """The fused kernels; Triton is imported at the first call."""
    if in_forward_mode():
        raise ValueError(
            "backend 'triton' has no forward-mode derivatives: use 'sdpa' or 'reference' for "
            "torch.func.jvp and jacfwd"
        )
    try:
        from diffmm.ops.diff_attention.triton import triton_backend
    except ImportError as error:
        raise ValueError(f"backend 'triton' needs the package triton: {error}") from None
    return triton_backend(q, k, v, lam, mask=mask, scale=scale)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": reference,
    "sdpa": sdpa,
    "triton": _triton,
}


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose_backend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> str:
    """What `"auto"` is for these tensors: `"triton"` on Hopper GPUs, in bfloat16 and float16, with
    heads of 32 to 128 and values up to 256, from 128 queries on; and for decoding (without
    gradients, fewer queries than keys, at most 64 of them a group) where each component has its
    key (v1); else `"sdpa"`. Also `"sdpa"` for v2 with heads of 40 to 64, values up to 64 and 8,192
    keys or more, if torch's kernels take the mask as it is: full, or causal over as many queries as
    keys. It needs an eighth of the memory there.

    Measured in bfloat16, compiled for the shape, on an H100 (docs/performance.md): from 197 queries
    on `"triton"` takes 0.47 to 0.93 of the time of `"sdpa"` for v1 and 0.66 to 0.96 for v2, forward
    and backward (with v2's heads of 64 1.05 to 1.07 at 4,096 keys and 1.10 at 8,192; v2's forward
    pass alone 0.76 to 1.25). A token against 256 to 32,768 keys takes 0.11 to 0.47 of the GPU's
    time for v1, and about as much of the host's (for v2 0.62 to 1.02, and more). What lies beside
    that is taken along.
    """
    (_, N, H, _, D), (_, M, G, C, _), E = q.shape, k.shape, v.shape[-1]
    serves = (
        _HAS_TRITON
        and torch.version.cuda is not None
        and q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and 32 <= D <= 128
        and E <= 256
        and D % 8 == E % 8 == 0
        and scale > 0
        and not in_forward_mode()
        and torch.cuda.get_device_properties(q.device).major == 9
    )
    if not serves or N > M:
        return "sdpa"
    is_long_v2 = C == 1 and 32 < D <= 64 and E <= 64 and M >= 8192
    if is_long_v2 and (mask.is_full or (mask.is_causal and N == M)):
        return "sdpa"
    decodes = C == 2 and N < M and N * H <= 64 * G and not torch.is_grad_enabled()
    return "triton" if N >= 128 or decodes else "sdpa"


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
    """The difference of two softmax maps times the values (Ye et al. 2025, eq. 1):

        (A1 - lam * A2) V,   Ai = softmax(scale * Qi Kiᵀ + mask)

    What both maps share, the noise, cancels. `lam` is not bounded: at 0 this is softmax attention
    of the first component, at 1 the rows of the difference sum to zero.

    Args:
        q: `[B, N, H, 2, D]`, the two components' queries side by side: raw head `2i + c` of a
            projection is component `c` of differential head `i`.
        k: `[B, M, G, C, D]`. `C = 2`: a key for each component (v1). `C = 1`: one key that both
            share (v2, and v1 with shared keys). `G` divides `H`; head `i` reads group
            `i // (H // G)`.
        v: `[B, M, G, E]`, any `E`: v1 uses `2D`, v2 uses `D`.
        lam: broadcasts to `[B, N, H]`; a scalar in v1, one a token and head in v2. Kept in float32
            (float64 for float64 inputs), for in bfloat16 it would be off by 1e-3.
        mask: what each query sees. `N != M` is decoding: the queries are the last `N` positions.
        scale: multiplies the scores before the softmax, `D ** -0.5` by default (never `2D`,
            whatever the width of the values).
        backend: `"reference"` (materialises the maps, any device), `"sdpa"` (torch's fused softmax
            attention), `"triton"` (own fused kernels; CUDA, D up to 128, E up to 256), or
            `"auto"`: `"triton"` in 16 bits on Hopper GPUs from 128 queries on, and for decoding
            with v1, but not for v2 with heads of 64 and long sequences: where it wins (see
            `choose_backend`); else `"sdpa"`.

    Returns:
        `[B, N, H, E]` in q's dtype. Gradients go to q, k, v and lam. A row that sees no key is
        zero, and so are its gradients, on every backend.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or a backend unknown by name.

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
        raise ValueError(f"k must be [B, M, G, C, D] with C of 1 or 2, got shape {tuple(k.shape)}")
    check_qkv(q, k, v, mask)
    lam = as_map(lam, q.shape[:3], q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_backend(backend, BACKENDS)
    if backend == "auto":
        backend = choose_backend(q, k, v, mask, scale)
    return BACKENDS[backend](q, k, v, lam, mask=mask, scale=scale)


def as_map(lam: Tensor | float, shape: Sequence[int], q: Tensor) -> Tensor:
    """`lam` in the shape `[B, N, H]`, in float32, or float64 where q is."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lam = torch.as_tensor(lam, dtype=dtype, device=q.device)
    try:
        return lam.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"lam of shape {tuple(lam.shape)} does not broadcast to [B, N, H] = {tuple(shape)}"
        ) from None
