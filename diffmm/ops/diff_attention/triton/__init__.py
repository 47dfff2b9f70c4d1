"""Fused Triton kernels of differential attention, and of softmax attention, for NVIDIA GPUs.

`op.py` contains the operators; `forward.py`, `backward.py` and `decode.py` their kernels; `rows.py`
the per-query vectors of the backward pass; `masking.py` the masks; `tiles.py` the block sizes.
`hopper` contains kernels for Hopper GPUs only. Importing this package imports Triton, so
`diffmm.ops` imports it only when the backend is used.
"""

from diffmm.ops.diff_attention.triton.op import softmax_backend, triton_backend

__all__ = ["softmax_backend", "triton_backend"]
