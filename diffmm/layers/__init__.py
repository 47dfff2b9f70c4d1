"""The layers that models consist of; each can be used on its own."""

from diffmm.layers import attention
from diffmm.layers.attention import *  # noqa: F403 (every attention layer, as its package lists them)
from diffmm.layers.block import Block
from diffmm.layers.cache import KVCache
from diffmm.layers.cross_attention import Context, CrossAttention
from diffmm.layers.feed_forward import (
    GELU,
    FeedForward,
    PolyNorm,
    PolyNormGLU,
    SwiGLU,
    TanhGEGLU,
    TanhGELU,
    register_feed_forward,
)
from diffmm.layers.norm import CosineNorm, LayerNorm, RMSNorm, ZeroCenteredRMSNorm, register_norm
from diffmm.layers.rope import RotaryEmbedding, apply_rope
from diffmm.layers.rope_scaling import RopeScaling

__all__ = [
    *attention.__all__,
    "GELU",
    "Block",
    "Context",
    "CosineNorm",
    "CrossAttention",
    "FeedForward",
    "KVCache",
    "LayerNorm",
    "PolyNorm",
    "PolyNormGLU",
    "RMSNorm",
    "RopeScaling",
    "RotaryEmbedding",
    "SwiGLU",
    "TanhGEGLU",
    "TanhGELU",
    "ZeroCenteredRMSNorm",
    "apply_rope",
    "register_feed_forward",
    "register_norm",
]
