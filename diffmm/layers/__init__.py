"""The layers that models consist of; each can be used on its own."""

from diffmm.layers import attention
from diffmm.layers.attention import *  # noqa: F403 (every attention layer, as its package lists them)
from diffmm.layers.block import Block
from diffmm.layers.cache import KVCache
from diffmm.layers.feed_forward import GELU, FeedForward, SwiGLU, register_feed_forward
from diffmm.layers.norm import CosineNorm, LayerNorm, RMSNorm, register_norm
from diffmm.layers.rope import RotaryEmbedding, apply_rope

__all__ = [
    *attention.__all__,
    "GELU",
    "Block",
    "CosineNorm",
    "FeedForward",
    "KVCache",
    "LayerNorm",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
    "apply_rope",
    "register_feed_forward",
    "register_norm",
]
