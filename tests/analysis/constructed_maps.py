"""Layers whose maps are given."""

import torch

from diffmm.analysis.map_blocks import LayerInputs
from diffmm.ops import AttentionMask


def layer_of(*maps, lam=None, mask=None, name="layer"):
    """A layer with one head whose queries all have the given rows of weights, one row (or a batch
    of rows) per component."""
    rows = torch.stack([torch.as_tensor(row, dtype=torch.float64) for row in maps], dim=-1)
    rows = rows if rows.ndim == 3 else rows[None]  # [B, M, C]
    k = rows.log()[:, :, None, :, None]
    if lam is not None:
        lam = torch.as_tensor(lam, dtype=torch.float64).expand(len(rows), 1, rows.shape[1])
    return LayerInputs(0, name, torch.ones_like(k), k, lam, 1.0, mask or AttentionMask())
