"""Hopper kernels in Gluon, for the widths at which Triton's own scheduling is slower.

`forward.py` computes each of two maps, or each of two tiles of queries of one map, in its own
warpgroup; `backward.py` splits the gradients
by warpgroup roles, with one of two key kernels (`wide_keys.py`, `narrow_keys.py`). `common.py`
contains shared code.

Gluon's interface is not stable yet, and only that of Triton 3.6 is supported: importing the modules
of this package requires that version, while `serves_forward` and `serves_backward` work with any.
"""

import triton
from torch import Tensor

from diffmm.ops.diff_attention.triton.tiles import gpu_of, pad


def serves_forward(q: Tensor, v: Tensor) -> bool:
    """Whether `forward.forward` supports the inputs: 16-bit, with a head dimension of 72 to 128 and
    a value dimension of 72 to 256."""
    return _is_known(q) and pad(q.shape[-1]) == 128 and pad(v.shape[-1]) >= 128


def serves_backward(q: Tensor, v: Tensor) -> bool:
    """Whether `backward.gradients` supports the inputs: 16-bit, with a head dimension of 40 to 128
    and a value dimension of 40 to 256 (to 128 for softmax attention, of one map)."""
    is_wide_enough = pad(q.shape[-1]) >= 64 and pad(v.shape[-1]) >= 64
    return _is_known(q) and is_wide_enough and (q.shape[3] == 2 or pad(v.shape[-1]) <= 128)


def _is_known(q: Tensor) -> bool:
    return (
        q.is_cuda
        and gpu_of(q).capability[0] == 9
        and triton.__version__.startswith("3.6.")
        and q.element_size() == 2
    )
