"""The kernels as torch operators, which `torch.compile` can trace and autograd differentiate."""

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from diffmm.ops.diff_attention.triton import hopper
from diffmm.ops.diff_attention.triton.backward import backward
from diffmm.ops.diff_attention.triton.decode import decode, decodes
from diffmm.ops.diff_attention.triton.forward import forward
from diffmm.ops.diff_attention.triton.masking import KernelMask, document_labels
from diffmm.ops.diff_attention.triton.tiles import Tiles, describable, gpu_of, tiles_for
from diffmm.ops.mask import AttentionMask

MAX_HEAD_DIM, MAX_VALUE_DIM = 128, 256
# Whether Triton's interpreter replaces the GPU; Triton decides this when it is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def triton_backend(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, *, mask: AttentionMask, scale: float
) -> Tensor:
    """Differential attention with the fused kernels; shapes as in `diffmm.ops.diff_attention`, with
    `lam` expanded to `[B, N, H]` in float32.

    Raises:
        ValueError: If the kernels do not support the device, dtype, width or scale.
    """
    check_inputs(q, k, v, mask, scale)
    return _run(q, k, v, lam, mask, scale)


def softmax_backend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: AttentionMask, scale: float
) -> Tensor:
    """Softmax attention with the fused kernels; shapes as in `diffmm.ops.softmax_attention`.

    Raises:
        ValueError: If the kernels do not support the device, dtype, width or scale.
    """
    check_inputs(q, k, v, mask, scale)
    return _run(q.unsqueeze(3), k.unsqueeze(3), v, None, mask, scale)


def _run(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor | None, mask: AttentionMask, scale: float
) -> Tensor:
    for_backward = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, lam)
    )
    inputs = q, k, v, lam, mask.causal, mask.window, mask.prefix_lengths
    documents, padding = mask.document_ids, mask.key_padding
    if not for_backward and decodes(q.shape[1], q.shape[2], k.shape[2]):
        return _decode(*inputs, documents, padding, mask.num_keys, scale)
    if mask.num_keys is not None:
        raise ValueError(
            "backend 'triton' supports num_keys for decoding only (no gradients, at most 64 "
            "queries per key group): use 'sdpa'"
        )
    labels = None
    if documents is not None:
        # An operator of its own, so that all layers of a compiled model share one call.
        labels, padding = _document_labels(documents, padding, q.shape[1]), None
    return _attend(*inputs, labels, padding, scale, for_backward)[0]


def check_inputs(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> None:
    """Check that the kernels support the inputs.

    Raises:
        ValueError: If they do not; the message names the value.
    """
    D, E = q.shape[-1], v.shape[-1]
    if not (q.is_cuda or INTERPRETED):
        raise ValueError(f"backend 'triton' needs a CUDA device, but q is on {q.device}")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"backend 'triton' needs bfloat16, float16 or float32, got {q.dtype}")
    for name, width, most in (
        ("head dimension D", D, MAX_HEAD_DIM),
        ("value dimension E", E, MAX_VALUE_DIM),
    ):
        if width % 8 or not 0 < width <= most:
            raise ValueError(
                f"backend 'triton' needs a {name} that is a multiple of 8 and at most {most}, "
                f"got {width}"
            )
    if not scale > 0:
        raise ValueError(f"backend 'triton' needs a positive scale, got {scale}")
    if mask.document_ids is not None:
        if mask.num_keys is not None:
            raise ValueError(
                "backend 'triton' does not support num_keys with documents: use 'sdpa'"
            )
        N, M = q.shape[1], k.shape[1]
        if N > M:
            raise ValueError(
                f"document_ids needs a key for every query, got {N} queries and {M} keys"
            )


def _tiles(q: Tensor, v: Tensor) -> Tiles:
    return tiles_for(q.dtype, q.shape[-1], v.shape[-1], gpu_of(q).capability)


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@torch.library.custom_op("diffmm::document_labels", mutates_args=())
def _document_labels(document_ids: Tensor, key_padding: Tensor | None, num_queries: int) -> Tensor:
    """The labels by which the kernels compare documents, `[B, N + M]` int32 (`KernelMask`)."""
    batch, num_keys = document_ids.shape
    if batch * num_keys == 0:
        return document_ids.new_empty(batch, num_queries + num_keys, dtype=torch.int32)
    with _on(document_ids):
        return document_labels(document_ids, key_padding, num_queries)


@_document_labels.register_fake
def _(document_ids: Tensor, key_padding: Tensor | None, num_queries: int) -> Tensor:
    batch, num_keys = document_ids.shape
    return document_ids.new_empty(batch, num_queries + num_keys, dtype=torch.int32)


@torch.library.custom_op("diffmm::diff_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor | None,
    causal: bool,
    window: int | None,
    prefix_lengths: Tensor | None,
    labels: Tensor | None,
    key_padding: Tensor | None,
    scale: float,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the output and, for the backward pass, the second map's output (empty for softmax
    attention, which has no lambda and queries `[B, N, H, 1, D]`) and all log-sum-exps."""
    B, N, H, num_maps, M, E = *q.shape[:4], k.shape[1], v.shape[-1]
    shape = (B, N, H, E)
    no_output, no_sums = q.new_empty(0), q.new_empty(0, dtype=torch.float32)
    if B * N * H * M == 0:
        zeros = q.new_zeros(shape)
        if not for_backward:
            return zeros, no_output, no_sums
        zeros2 = no_output if lam is None else q.new_zeros(shape)
        return zeros, zeros2, no_sums.new_full((B, H, num_maps, N), torch.inf)
    q, k, v = describable(q), describable(k), describable(v)
    with _on(q):
        attended = AttentionMask(causal, window, prefix_lengths, None, key_padding)
        mask = KernelMask.of(attended, N, M, labels=labels)
        second: Tensor | None
        if hopper.serves_forward(q, v):
            from diffmm.ops.diff_attention.triton.hopper.forward import forward as by_warpgroups

            out, second, lse = by_warpgroups(q, k, v, lam, mask, scale)
        else:
            tile = _tiles(q, v).forward
            out, second, lse = forward(
                q, k, v, lam, mask, scale, keep_second=for_backward, tile=tile
            )
    if not for_backward:
        return out, no_output, no_sums
    return out, no_output if second is None else second, lse


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor | None,
    causal: bool,
    window: int | None,
    prefix_lengths: Tensor | None,
    labels: Tensor | None,
    key_padding: Tensor | None,
    scale: float,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, N, H, num_maps, E = *q.shape[:4], v.shape[-1]
    out, no_sums = q.new_empty(B, N, H, E), q.new_empty(0, dtype=torch.float32)
    if not for_backward:
        return out, q.new_empty(0), no_sums
    second = q.new_empty(0) if lam is None else q.new_empty(B, N, H, E)
    return out, second, no_sums.new_empty(B, H, num_maps, N)


@torch.library.custom_op("diffmm::diff_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor | None,
    out: Tensor,
    second: Tensor,
    lse: Tensor,
    causal: bool,
    window: int | None,
    prefix_lengths: Tensor | None,
    labels: Tensor | None,
    key_padding: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v and lam, the latter as `[B, N, H]` (empty without lam)."""
    B, N, H, M = *q.shape[:3], k.shape[1]
    no_lam = lse.new_empty(0)
    if B * N * H * M == 0:
        return (
            q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape),
            no_lam if lam is None else lam.new_zeros(lam.shape),
        )  # fmt: skip
    q, k, v = describable(q), describable(k), describable(v)
    with _on(q):
        attended = AttentionMask(causal, window, prefix_lengths, None, key_padding)
        mask = KernelMask.of(attended, N, M, labels=labels)
        dq, dk, dv, dlam = backward(
            grad, q, k, v, lam, out, None if lam is None else second, lse, mask, scale,
            tiles=_tiles(q, v),
        )  # fmt: skip
    return dq, dk, dv, no_lam if dlam is None else dlam


@_attend_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor | None,
    out: Tensor,
    second: Tensor,
    lse: Tensor,
    causal: bool,
    window: int | None,
    prefix_lengths: Tensor | None,
    labels: Tensor | None,
    key_padding: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dlam = lse.new_empty(0) if lam is None else lam.new_empty(lam.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dlam


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, lam, causal, window, prefix_lengths, labels, key_padding, scale, _ = inputs
    out, second, lse = output
    ctx.save_for_backward(q, k, v, lam, out, second, lse, prefix_lengths, labels, key_padding)
    ctx.causal, ctx.window, ctx.scale = causal, window, scale
    # Otherwise zeros would be allocated for the two outputs that have no gradient.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _second: Any, _lse: Any) -> tuple[Any, ...]:
    q, k, v, lam, out, second, lse, prefix_lengths, labels, key_padding = ctx.saved_tensors
    *grads, dlam = _attend_backward(
        grad, q, k, v, lam, out, second, lse, ctx.causal, ctx.window, prefix_lengths,
        labels, key_padding, ctx.scale,
    )  # fmt: skip
    return *grads, None if lam is None else dlam, None, None, None, None, None, None, None


_attend.register_autograd(_differentiate, setup_context=_save)


# A compiled graph launches the kernels of a `triton_op` itself, at a fraction of the host time of
# an opaque operator. It cannot launch interpreted kernels.
_transparent_op = torch.library.custom_op if INTERPRETED else torch.library.triton_op


@_transparent_op("diffmm::diff_attention_decode", mutates_args=())
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor | None,
    causal: bool,
    window: int | None,
    prefix_lengths: Tensor | None,
    document_ids: Tensor | None,
    key_padding: Tensor | None,
    num_keys: Tensor | None,
    scale: float,
) -> Tensor:
    """Compute the output for a few queries, without gradients; `lam` is None for softmax
    attention, which has queries `[B, N, H, 1, D]`."""
    B, N, H, M = *q.shape[:3], k.shape[1]
    if B * N * H * M == 0:
        return q.new_zeros(B, N, H, v.shape[-1])
    with _on(q):
        attended = AttentionMask(causal, window, prefix_lengths, document_ids, key_padding)
        mask = KernelMask.of(attended, N, M)
        return decode(q, k, v, lam, mask, scale, num_keys=num_keys, gpu=gpu_of(q))


@_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])
