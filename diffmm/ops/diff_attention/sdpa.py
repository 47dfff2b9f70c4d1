"""Differential attention with torch's fused softmax attention."""

import torch
from torch import Tensor

from diffmm.ops.mask import AttentionMask
from diffmm.ops.softmax_attention.sdpa import sdpa as softmax_sdpa


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, *, mask: AttentionMask, scale: float
) -> Tensor:
    """Compute `A1 V - lam * A2 V` with the two components as heads of one softmax attention.

    Shapes as in `diffmm.ops.diff_attention`, with `lam` expanded to `[B, N, H]`. Lambda and the
    difference are in float32 (or wider), whatever the precision of the maps' outputs.

    There are several ways to compose it: one call, one call per component, value halves as separate
    heads, keys padded to the width of the values. All have correct gradients in compiled models, up
    to bfloat16 rounding; on an H100 the forward and backward passes of this one are the fastest or
    within 8% of it (`python -m benchmarks.sdpa_composition`, `benchmarks.attention`,
    docs/lab_notes.md). Two causal calls with wide values once gave wrong gradients, but only in a
    compiled decoder; `tests/gpu/test_compiled_gradients.py` tests for this.
    """
    if k.shape[3] == 1:
        # Raw head 2i + c reads group i // (H // G): grouped keys with twice as many queries.
        heads = softmax_sdpa(q.flatten(2, 3), k.squeeze(3), v, mask=mask, scale=scale)
        out1, out2 = heads.unflatten(2, (-1, 2)).unbind(3)
    else:
        # The component becomes the slower head index, so that its groups stay together.
        q = q.transpose(2, 3).flatten(2, 3)  # [B, N, 2H, D]
        k = k.transpose(2, 3).flatten(2, 3)  # [B, M, 2G, D]
        v = torch.cat([v, v], dim=2)  # [B, M, 2G, E]
        out1, out2 = softmax_sdpa(q, k, v, mask=mask, scale=scale).chunk(2, dim=2)
    return (out1 - lam.unsqueeze(-1) * out2).to(out1.dtype)
