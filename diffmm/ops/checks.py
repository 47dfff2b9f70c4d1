"""What every attention op asks of its arguments, and the words in which it refuses."""

from collections.abc import Collection

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffmm.ops.mask import AttentionMask

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> None:
    """Refuse queries, keys and values that do not belong together.

    `q` is `[B, N, H, ..., D]`, `k` is `[B, M, G, ..., D]`, `v` is `[B, M, G, E]`.

    Raises:
        ValueError: naming the shapes, dtypes or devices that disagree.
    """
    if v.ndim != 4:
        raise ValueError(f"v must be [B, M, G, E], got shape {tuple(v.shape)}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"q, k and v must share the batch, k and v the keys and groups: got q "
            f"{tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q and k must have the same head dim D, got {q.shape[-1]} and {k.shape[-1]}"
        )
    num_heads, num_groups = q.shape[2], k.shape[2]
    if num_heads % num_groups:
        raise ValueError(
            f"the key groups must divide the heads, got {num_groups} groups for {num_heads} heads"
        )
    if q.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"q has dtype {q.dtype}; attention takes {names}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, "
                f"but q is {q.dtype} on {q.device}: bring them to one dtype and device"
            )
    mask.check(q.shape[0], k.shape[1])


def check_backend(backend: str, backends: Collection[str]) -> None:
    """Refuse a backend that is neither `"auto"` nor one of `backends`.

    Raises:
        ValueError: naming it, and listing those there are.
    """
    if backend not in ("auto", *backends):
        raise ValueError(f"unknown backend {backend!r}: choose one of {['auto', *backends]}")


def in_forward_mode() -> bool:
    """Whether derivatives are computed forward, by `torch.func.jvp`, `jacfwd` or `dual_level`."""
    return forward_ad._current_level >= 0
