"""Kernels for Hopper, written in Gluon, where Triton's own schedule stops short.

`forward.py` gives each of the two maps a warpgroup; `backward.py` divides the gradients by roles,
with one of two kernels for the keys (`wide_keys.py`, `narrow_keys.py`). `common.py` holds what they
share.

Gluon's interface still changes, and only that of Triton 3.6 is known: importing the modules of this
package takes that version, asking whether they serve takes any.
"""

import triton
from torch import Tensor

from diffmm.ops.diff_attention.triton.tiles import gpu_of, pad


def serves_forward(q: Tensor, v: Tensor) -> bool:
    """Whether `forward.forward` is for such inputs: in 16 bits, with heads of 72 to 128 dims and
    values of 72 to 256."""
    return _is_known(q) and pad(q.shape[-1]) == 128 and pad(v.shape[-1]) >= 128


def serves_backward(q: Tensor, v: Tensor) -> bool:
    """Whether `backward.gradients` is for such inputs: in 16 bits, with heads of 40 to 128 dims and
    values of 40 to 256."""
    return _is_known(q) and pad(q.shape[-1]) >= 64 and pad(v.shape[-1]) >= 64


def _is_known(q: Tensor) -> bool:
    return (
        q.is_cuda
        and gpu_of(q).capability[0] == 9
        and triton.__version__.startswith("3.6.")
        and q.element_size() == 2
    )
