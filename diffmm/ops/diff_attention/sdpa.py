"""Differential attention by torch's fused softmax attention."""

import torch
from torch import Tensor

from diffmm.ops.mask import AttentionMask
from diffmm.ops.softmax_attention.sdpa import sdpa as softmax_sdpa


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, *, mask: AttentionMask, scale: float
) -> Tensor:
    """`A1 V - lam * A2 V`, the two components as heads of one softmax attention.

    Shapes as in `diffmm.ops.diff_attention`, with `lam` already `[B, N, H]`. Lambda and the
    difference are float32 (or wider), whatever the maps' outputs are rounded to.

    Of the ways to compose it (one call, a call a component, value halves as heads of their own,
    keys padded to the values' width), all have the right gradients in whole compiled models, to
    what bfloat16 allows, and forward and backward of this one are fastest or within 8% of it on an
    H100: see `python -m benchmarks.sdpa_composition`, `benchmarks.attention` and
    docs/lab_notes.md. It matters because two causal calls with wide values were once seen to give
    wrong gradients in a compiled decoder alone; `tests/gpu/test_compiled_gradients.py` keeps watch.
    """
    if k.shape[3] == 1:
        # Raw head 2i + c already reads group i // (H // G): grouped keys with twice the queries.
        heads = softmax_sdpa(q.flatten(2, 3), k.squeeze(3), v, mask=mask, scale=scale)
        out1, out2 = heads.unflatten(2, (-1, 2)).unbind(3)
    else:
        # The component becomes the slow head index, so that its groups stay together.
        q = q.transpose(2, 3).flatten(2, 3)  # [B, N, 2H, D]
        k = k.transpose(2, 3).flatten(2, 3)  # [B, M, 2G, D]
        v = torch.cat([v, v], dim=2)  # [B, M, 2G, E]
        out1, out2 = softmax_sdpa(q, k, v, mask=mask, scale=scale).chunk(2, dim=2)
    return (out1 - lam.unsqueeze(-1) * out2).to(out1.dtype)
