"""Softmax attention with torch's fused `scaled_dot_product_attention`."""

from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from diffmm.ops.checks import in_forward_mode
from diffmm.ops.mask import AttentionMask


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: AttentionMask, scale: float) -> Tensor:
    """Compute the result of `reference` with the fused kernel that torch selects for the device.

    Full and causal masks are passed to the kernels as flags and need no memory. Every other mask is
    expanded to `[1 or B, 1, N, M]` booleans. Rows without visible keys are computed without a mask
    and then replaced by zeros, because the results of torch's kernels differ for such rows. This
    way neither the row nor its gradient depends on the kernel.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    heads_per_group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu" and v.shape[-1] > q.shape[-1]:
        # torch's fused CPU kernel needs equal head dimensions; zeros do not change the scores.
        wider = (0, v.shape[-1] - q.shape[-1])
        q, k = pad(q, wider), pad(k, wider)

    # `if` makes these plain booleans: when compiled with dynamic shapes, a comparison is symbolic,
    # which torch's function does not accept.
    is_full, is_causal, is_grouped = mask.is_full, False, False
    if mask.is_causal:
        if num_queries == 1:
            is_full = True
        elif num_queries == num_keys:  # torch aligns top-left, which agrees only if square
            is_causal = True
    if heads_per_group > 1:
        is_grouped = True

    if is_full or is_causal:
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": is_grouped}
        return _torch_sdpa(q, k, v, **options).transpose(1, 2)

    # Kernels with a mask do not support grouped keys. If there is one query, the heads of a group
    # are several queries of one head; otherwise keys and values are repeated.
    num_heads = q.shape[1]
    if is_grouped and num_queries == 1:
        q = q.view(*k.shape[:2], heads_per_group, q.shape[-1])
    elif is_grouped:
        k = k.repeat_interleave(heads_per_group, dim=1)
        v = v.repeat_interleave(heads_per_group, dim=1)
    visible = mask.to_bool(num_queries, num_keys, q.device)
    sees_nothing = ~visible.any(dim=-1, keepdim=True)
    out = _torch_sdpa(q, k, v, attn_mask=visible | sees_nothing, scale=scale)
    out = out.masked_fill(sees_nothing, 0.0)
    return out.reshape(out.shape[0], num_heads, num_queries, out.shape[-1]).transpose(1, 2)


def _torch_sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Call torch's attention; in forward mode with its math kernel, the only one that supports
    forward-mode differentiation."""
    if not in_forward_mode():
        return scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, k, v, **options)
