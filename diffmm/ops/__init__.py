"""Attention functions (for each, a reference that follows the paper, and faster backends) and the
loss of language models."""

from diffmm.ops.diff_attention import diff_attention
from diffmm.ops.grouped_diff_attention import grouped_diff_attention
from diffmm.ops.linear_cross_entropy import Losses, linear_cross_entropy
from diffmm.ops.mask import AttentionMask
from diffmm.ops.softmax_attention import softmax_attention

__all__ = [
    "AttentionMask",
    "Losses",
    "diff_attention",
    "grouped_diff_attention",
    "linear_cross_entropy",
    "softmax_attention",
]
