"""The attention layers, one per file, with a common interface."""

from collections.abc import Callable

from diffmm.layers.attention.base import Attention, AttentionArgs, HeadShapes, shared_by_heads
from diffmm.layers.attention.diff_grouped import GroupedDiffAttention
from diffmm.layers.attention.diff_v1 import DiffAttentionV1, lambda_init_at
from diffmm.layers.attention.diff_v2 import DiffAttentionV2
from diffmm.layers.attention.head_projections import HeadProjections
from diffmm.layers.attention.softmax import SoftmaxAttention
from diffmm.layers.registry import Layer, registration

ATTENTIONS: dict[str, type[Attention]] = {
    "softmax": SoftmaxAttention,
    "diff_v1": DiffAttentionV1,
    "diff_v2": DiffAttentionV2,
    "diff_grouped": GroupedDiffAttention,
}
"""Values of `BackboneConfig.attention`."""


def register_attention(name: str) -> Callable[[Layer], Layer]:
    """Class decorator that makes an `Attention` available as `BackboneConfig(attention=name)`.

    Raises:
        ValueError: If the name is taken, or the class is not an `Attention`.
    """
    return registration(ATTENTIONS, name, Attention)  # type: ignore[arg-type]


__all__ = [
    "ATTENTIONS",
    "Attention",
    "AttentionArgs",
    "DiffAttentionV1",
    "DiffAttentionV2",
    "GroupedDiffAttention",
    "HeadProjections",
    "HeadShapes",
    "SoftmaxAttention",
    "lambda_init_at",
    "register_attention",
    "shared_by_heads",
]
