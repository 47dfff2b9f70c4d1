"""What the kernels written for Hopper, in Gluon, have in common."""

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from diffmm.ops.diff_attention.triton.tiles import describe, pad


def serves(q: Tensor, v: Tensor) -> bool:
    """Whether `wide_forward` and `wide_backward` are for such inputs: in 16 bits, keys of 72 to 128
    dims and values of 136 to 256, on Hopper.

    Gluon's interface still changes: only that of Triton 3.6 is known.
    """
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and triton.__version__.startswith("3.6.")
        and q.element_size() == 2
        and (pad(q.shape[-1]), pad(v.shape[-1])) == (128, 256)
    )


def gluon_describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """`describe` for kernels in Gluon, which want the layout in shared memory too."""
    plain = describe(tensor, block)
    swizzle, bits = (128, 16) if tensor.element_size() == 2 else (0, 32)
    layout = gl.NVMMASharedLayout(swizzle, bits, rank=len(block))
    return TensorDescriptor(tensor, plain.shape, plain.strides, block, layout)
