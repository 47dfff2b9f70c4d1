"""Attention functions: for each, a reference that follows the paper, and faster backends."""

from diffmm.ops.diff_attention import diff_attention
from diffmm.ops.grouped_diff_attention import grouped_diff_attention
from diffmm.ops.mask import AttentionMask
from diffmm.ops.softmax_attention import softmax_attention

__all__ = ["AttentionMask", "diff_attention", "grouped_diff_attention", "softmax_attention"]
