"""Softmax attention with the mask type and the backends of this library."""

from collections.abc import Callable

from torch import Tensor

from diffmm.ops.checks import check_backend, check_qkv
from diffmm.ops.mask import AttentionMask
from diffmm.ops.softmax_attention.reference import reference
from diffmm.ops.softmax_attention.sdpa import sdpa

BACKENDS: dict[str, Callable[..., Tensor]] = {"reference": reference, "sdpa": sdpa}


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: AttentionMask,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`softmax(scale * Q Kᵀ + mask) V`: the attention that differential attention is compared with.

    Args:
        q: `[B, N, H, D]` queries.
        k: `[B, M, G, D]` keys; `G` divides `H`, head `i` reads group `i // (H // G)`.
        v: `[B, M, G, E]` values.
        mask: what each query sees.
        scale: multiplies the scores before the softmax, `D ** -0.5` by default.
        backend: `"reference"` (materialises the maps, any device), `"sdpa"` (torch's fused
            kernels), or `"auto"`, which is `"sdpa"`.

    Returns:
        `[B, N, H, E]` in q's dtype. A row that sees no key is zero, and so are its gradients.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or a backend unknown by name.

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
    return BACKENDS["sdpa" if backend == "auto" else backend](q, k, v, mask=mask, scale=scale)
