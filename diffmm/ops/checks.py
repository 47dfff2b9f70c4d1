"""Checks that all attention ops share: of their arguments, and of the device."""

import importlib.util
from collections.abc import Collection

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffmm.ops.mask import AttentionMask

HAS_TRITON = importlib.util.find_spec("triton") is not None

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> None:
    """Check that queries, keys and values have matching shapes, dtypes and devices.

    `q` is `[B, N, H, ..., D]`, `k` is `[B, M, G, ..., D]`, `v` is `[B, M, G, E]`.

    Raises:
        ValueError: If they do not match, or `mask` is not an `AttentionMask`; the message names the
            ones that differ.
    """
    check_mask(mask)
    if v.ndim != 4:
        raise ValueError(f"v must be [B, M, G, E], got shape {tuple(v.shape)}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"q, k and v must have the same batch size, and k and v the same keys and groups: "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q and k must have the same head dimension D, got {q.shape[-1]} and {k.shape[-1]}"
        )
    num_heads, num_groups = q.shape[2], k.shape[2]
    if num_heads % num_groups:
        raise ValueError(
            f"the number of key groups must divide the number of heads, got {num_groups} groups "
            f"and {num_heads} heads"
        )
    if q.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"q has dtype {q.dtype}, but attention supports {names}: cast q, k and v")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, "
                f"but q is {q.dtype} on {q.device}: convert them to the same dtype and device"
            )
    mask.check(q.shape[0], k.shape[1])


def check_mask(mask: object) -> None:
    """Check that a mask is an `AttentionMask`.

    Raises:
        ValueError: If it is not, such as a tensor of booleans or `None`.
    """
    if not isinstance(mask, AttentionMask):
        got = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(
            f"mask must be an AttentionMask, got {got}: AttentionMask() lets every query attend to "
            f"every key, causal=True only to earlier ones, and key_padding=[B, M] only to real ones"
        )


def check_backend(backend: str, backends: Collection[str]) -> None:
    """Check that a backend is `"auto"` or one of `backends`.

    Raises:
        ValueError: If it is not; the message lists the valid backends.
    """
    if backend not in ("auto", *backends):
        raise ValueError(f"unknown backend {backend!r}: choose one of {['auto', *backends]}")


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation (`torch.func.jvp`, `jacfwd`, `dual_level`) is active."""
    return forward_ad._current_level >= 0


def is_for_hopper(q: Tensor, v: Tensor, scale: float) -> bool:
    """Whether `"auto"` may select the fused kernels for these queries and values: on a Hopper GPU,
    in 16-bit precision, for widths that the kernels support and for which they were measured."""
    D, E = q.shape[-1], v.shape[-1]
    return (
        HAS_TRITON
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
