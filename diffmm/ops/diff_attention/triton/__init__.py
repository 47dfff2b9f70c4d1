"""Fused kernels of differential attention for NVIDIA GPUs, written in Triton.

`op.py` holds the operators, `forward.py`, `backward.py` and `decode.py` a kernel each, `masking.py`
what they see and `tiles.py` how they cut their work. Importing this package imports Triton, so
`diffmm.ops` does so only when the backend is asked for.
"""

from diffmm.ops.diff_attention.triton.op import triton_backend

__all__ = ["triton_backend"]
