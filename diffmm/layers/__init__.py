"""The parts that models are made of, each usable alone."""

from diffmm.layers.attention import (
    ATTENTIONS,
    Attention,
    DiffAttentionV1,
    DiffAttentionV2,
    GroupedDiffAttention,
    SoftmaxAttention,
    register_attention,
)
from diffmm.layers.block import Block
from diffmm.layers.cache import KVCache
from diffmm.layers.feed_forward import GELU, FeedForward, SwiGLU, register_feed_forward
from diffmm.layers.norm import CosineNorm, LayerNorm, RMSNorm, register_norm
from diffmm.layers.rope import RotaryEmbedding, apply_rope

__all__ = [
    "ATTENTIONS",
    "GELU",
    "Attention",
    "Block",
    "CosineNorm",
    "DiffAttentionV1",
    "DiffAttentionV2",
    "FeedForward",
    "GroupedDiffAttention",
    "KVCache",
    "LayerNorm",
    "RMSNorm",
    "RotaryEmbedding",
    "SoftmaxAttention",
    "SwiGLU",
    "apply_rope",
    "register_attention",
    "register_feed_forward",
    "register_norm",
]
