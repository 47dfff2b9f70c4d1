"""The parts that models are made of, each usable alone."""

from diffmm.layers.attention import (
    ATTENTIONS,
    Attention,
    DiffAttentionV1,
    DiffAttentionV2,
    SoftmaxAttention,
)
from diffmm.layers.block import Block
from diffmm.layers.cache import KVCache
from diffmm.layers.feed_forward import GELU, SwiGLU
from diffmm.layers.norm import CosineNorm, LayerNorm, RMSNorm
from diffmm.layers.rope import RotaryEmbedding, apply_rope

__all__ = [
    "ATTENTIONS",
    "GELU",
    "Attention",
    "Block",
    "CosineNorm",
    "DiffAttentionV1",
    "DiffAttentionV2",
    "KVCache",
    "LayerNorm",
    "RMSNorm",
    "RotaryEmbedding",
    "SoftmaxAttention",
    "SwiGLU",
    "apply_rope",
]
