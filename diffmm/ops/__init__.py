"""Functions on tensors, a folder each: a reference that reads like the paper beside fast paths."""

from diffmm.ops.diff_attention import diff_attention
from diffmm.ops.grouped_diff_attention import grouped_diff_attention
from diffmm.ops.mask import AttentionMask
from diffmm.ops.softmax_attention import softmax_attention

__all__ = ["AttentionMask", "diff_attention", "grouped_diff_attention", "softmax_attention"]
