"""Fused kernels of differential attention for NVIDIA GPUs, written in Triton.

`op.py` holds the operators; `forward.py`, `backward.py` and `decode.py` their kernels; `rows.py`
what a backward pass reads of every query; `masking.py` what kernels see, `tiles.py` how they cut
their work. `hopper` has kernels for those GPUs alone. Importing this package imports Triton, so
`diffmm.ops` does so only when the backend is asked for.
"""

from diffmm.ops.diff_attention.triton.op import triton_backend

__all__ = ["triton_backend"]
