"""Attention weights of microsoft/unilm, the authors' implementation.

Its projections have the same layout as in diffmm (interleaved components and rotary pairs), so
weights need no reordering and only names differ. Its plain v1 module repeats keys such that, with
grouped keys, both components read one key; its flash modules and diffmm do not.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from diffmm.checks import check_choice
from diffmm.layers import (
    ATTENTIONS,
    Attention,
    DiffAttentionV1,
    DiffAttentionV2,
    RotaryEmbedding,
)
from diffmm.layers.attention.diff_v1 import lambda_init_at
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
"""The authors' parameter names and those of diffmm."""

NAMES = {"v1": V1_NAMES, "v2": V2_NAMES}


class UnilmAttention(nn.Module):
    """An attention layer with its rotary embedding and mask, from `[B, N, dim]` to `[B, N, dim]`.

    Args:
        attention: The layer.
        rope_base: Base of the rotary embedding.
        causal: Whether each token attends only to earlier ones.
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
    """Create an attention layer from the authors' weights.

    Args:
        tensors: Weights of the layer under the authors' names: `q_proj.weight`, `k_proj.weight`,
            `v_proj.weight`, then `out_proj.weight`, `subln.weight` and `lambda_q1` to `lambda_k2`
            (v1), or `o_proj.weight` and `lambda_proj.weight` (v2).
        variant: `"v1"` (MultiheadDiffAttn) or `"v2"`.
        num_heads: Number of heads as the authors count them: differential heads in v1, output heads
            in v2.
        num_kv_heads: Number of key heads as the authors count them: pairs in v1, keys in v2.
        layer_index: Index of the layer from 0. It determines the initial lambda of v1, which is not
            in the state dict; unused by v2.
        rope_base: Base of the rotary embedding.
        causal: Whether each token attends only to earlier ones.

    Returns:
        A module that maps `[B, N, dim]` to `[B, N, dim]`, with the dtype and device of
        `q_proj.weight`; v1's lambda vectors are at least float32.

    Raises:
        ValueError: If weights are missing or unknown, or their shapes do not match the number of
            heads.
    """
    check_choice("variant", variant, NAMES)
    names = NAMES[variant]
    missing, unknown = set(names) - set(tensors), set(tensors) - set(names)
    if missing or unknown:
        faults = [("missing", missing), ("unknown", unknown)]
        details = "; ".join(
            f"{kind}: {', '.join(sorted(found))}" for kind, found in faults if found
        )
        raise ValueError(f"these are not the weights of a {variant} attention layer: {details}")

    query = tensors["q_proj.weight"]
    if query.ndim != 2 or query.shape[0] % (2 * num_heads):
        raise ValueError(
            f"q_proj.weight of shape {tuple(query.shape)} does not split into two components of "
            f"num_heads={num_heads} heads"
        )
    # diffmm counts a v1 pair as the two softmax heads it replaces.
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


def attention_tensors(attention: Attention) -> dict[str, Tensor]:
    """The weights of an attention layer under the authors' names, which `load_attention` reads.

    Args:
        attention: A layer of class `DiffAttentionV1` or `DiffAttentionV2`.

    Raises:
        ValueError: If it is of another class, or has weights or settings that the authors' modules
            do not have; the message names all of them.
    """
    variants = {DiffAttentionV1: "v1", DiffAttentionV2: "v2"}
    variant = variants.get(type(attention))
    if variant is None:
        raise ValueError(
            f"the authors have no {type(attention).__name__}, only diff_v1 and diff_v2"
        )
    names, weights = NAMES[variant], attention.state_dict()
    faults = [f"without {ours}" for ours in names.values() if ours not in weights]
    faults += sorted(weights.keys() - set(names.values()))
    settings = {
        "window": (attention.window, None),
        "exclusive": (attention.exclusive, False),
        "attention_scale": (attention.scale, attention.head_dim**-0.5),
    }
    if isinstance(attention, DiffAttentionV1):
        eps = 1e-5 if attention.norm is None else attention.norm.eps
        settings |= {
            "number of queries and keys per head": (
                (attention.num_queries, attention.num_keys),
                (2, 2),
            ),
            "lambda_init": (attention.lambda_init, lambda_init_at(attention.layer_index)),
            "headwise_norm_eps": (eps, 1e-5),
            "combine": ("add" if attention.sign < 0 else "subtract", "subtract"),
        }
    faults += [f"{name}={own!r}" for name, (own, theirs) in settings.items() if own != theirs]
    if faults:
        raise ValueError(f"the authors' {variant} attention cannot hold {', '.join(faults)}")
    return {theirs: weights[ours] for theirs, ours in names.items()}
