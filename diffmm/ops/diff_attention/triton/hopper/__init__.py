"""Kernels for Hopper, written in Gluon, where Triton's own schedule stops short.

`forward.py` gives each of the two maps a warpgroup. `backward.py` forms every score once: a key
kernel (`wide_keys.py` or `narrow_keys.py`, by how much its accumulators hold) leaves dS in memory,
and a plain product makes dQ of it. `common.py` holds what they share.

Gluon's interface still changes, and only that of Triton 3.6 is known: importing the modules of this
package takes that version, asking whether they serve takes any.
"""

import torch
import triton
from torch import Tensor

from diffmm.ops.diff_attention.triton.tiles import pad


def serves(q: Tensor, v: Tensor) -> bool:
    """Whether these kernels are for such inputs: in 16 bits, keys of 72 to 128 dims and values of
    136 to 256, on Hopper."""
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and triton.__version__.startswith("3.6.")
        and q.element_size() == 2
        and (pad(q.shape[-1]), pad(v.shape[-1])) == (128, 256)
    )
