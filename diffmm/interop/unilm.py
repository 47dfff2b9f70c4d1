"""Attention weights of microsoft/unilm, the authors' own implementation.

Their projections lie as ours do (components interleaved, rotary pairs interleaved), so weights
move without a reordering and only names differ. Their plain v1 module repeats keys so that with
grouped keys both components read one key; their flash modules, and this library, do not.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from diffmm.checks import check_choice
from diffmm.layers import ATTENTIONS, Attention, DiffAttentionV1, RotaryEmbedding
from diffmm.ops import AttentionMask

V1_NAMES = {
    "q_proj.weight": "q_proj.weight",
    "k_proj.weight": "k_proj.weight",
    "v_proj.weight": "v_proj.weight",
    "out_proj.weight": "out_proj.weight",
    "subln.weight": "norm.weight",
    **{name: name for name in DiffAttentionV1.LAMBDA_NAMES},
}
V2_NAMES = {
    "q_proj.weight": "q_proj.weight",
    "k_proj.weight": "k_proj.weight",
    "v_proj.weight": "v_proj.weight",
    "o_proj.weight": "out_proj.weight",
    "lambda_proj.weight": "lambda_proj.weight",
}
"""The authors' names, and ours."""

NAMES = {"v1": V1_NAMES, "v2": V2_NAMES}


class UnilmAttention(nn.Module):
    """An attention layer with its rotary embedding and its mask: `[B, N, dim]` to `[B, N, dim]`.

    Args:
        attention: the layer.
        rope_base: of the rotary embedding.
        causal: whether tokens see the past alone.
    """

    def __init__(self, attention: Attention, *, rope_base: float, causal: bool) -> None:
        super().__init__()
        self.attention = attention
        self.rope = RotaryEmbedding(attention.head_dim, rope_base)
        self.mask = AttentionMask(causal=causal)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        return self.attention(x, mask=self.mask, rope=self.rope(positions))


def load_attention(
    tensors: Mapping[str, Tensor],
    *,
    variant: Literal["v1", "v2"],
    num_heads: int,
    num_kv_heads: int,
    layer_index: int,
    rope_base: float,
    causal: bool = True,
) -> UnilmAttention:
    """The authors' attention layer, from its weights.

    Args:
        tensors: the layer's weights under the authors' names: `q_proj.weight`, `k_proj.weight`,
            `v_proj.weight`, then `out_proj.weight`, `subln.weight` and `lambda_q1` to `lambda_k2`
            (v1), or `o_proj.weight` and `lambda_proj.weight` (v2).
        variant: `"v1"` (MultiheadDiffAttn) or `"v2"`.
        num_heads: in the authors' sense: differential heads in v1, output heads in v2.
        num_kv_heads: likewise, pairs of keys in v1 and keys in v2.
        layer_index: from 0; lambda's start in v1 hangs on it and is in no state dict. v2 does not
            use it.
        rope_base: of the rotary embedding.
        causal: whether tokens see the past alone.

    Returns:
        A module that maps `[B, N, dim]` to `[B, N, dim]`, in the dtype and on the device of
        `q_proj.weight`; v1's lambda vectors are float32 at least.

    Raises:
        ValueError: naming weights that are missing, unknown or of a shape that does not belong to
            these head counts.
    """
    check_choice("variant", variant, NAMES)
    names = NAMES[variant]
    missing, unknown = set(names) - set(tensors), set(tensors) - set(names)
    if missing or unknown:
        faults = [("missing", missing), ("unknown", unknown)]
        told = "; ".join(f"{kind}: {', '.join(sorted(found))}" for kind, found in faults if found)
        raise ValueError(f"these are not the weights of a {variant} attention layer: {told}")

    query = tensors["q_proj.weight"]
    if query.ndim != 2 or query.shape[0] % (2 * num_heads):
        raise ValueError(
            f"q_proj.weight of shape {tuple(query.shape)} does not split into two components of "
            f"num_heads={num_heads} heads"
        )
    # Ours counts a v1 pair as the two softmax heads it replaces.
    heads_each = 2 if variant == "v1" else 1
    attention = ATTENTIONS[f"diff_{variant}"](
        query.shape[1],
        num_heads=heads_each * num_heads,
        num_kv_heads=heads_each * num_kv_heads,
        head_dim=query.shape[0] // (2 * num_heads),
        layer_index=layer_index,
    ).to(dtype=query.dtype, device=query.device)

    expected = attention.state_dict()
    for theirs, ours in names.items():
        if tensors[theirs].shape != expected[ours].shape:
            raise ValueError(
                f"{theirs} has shape {tuple(tensors[theirs].shape)}, but num_heads={num_heads} "
                f"and num_kv_heads={num_kv_heads} need {tuple(expected[ours].shape)}"
            )
    attention.load_state_dict({ours: tensors[theirs] for theirs, ours in names.items()})
    return UnilmAttention(attention, rope_base=rope_base, causal=causal)
