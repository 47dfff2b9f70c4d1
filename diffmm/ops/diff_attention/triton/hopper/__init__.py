"""Kernels for Hopper, written in Gluon, where Triton's own schedule stops short.

`forward.py` gives each of the two maps a warpgroup. `by_columns.py` is the backward pass for wide
values: two warpgroups halve the columns of every product. `backward.py` divides the work by roles
instead, for narrower values too, by one of two kernels for the keys (`wide_keys.py`,
`narrow_keys.py`); no GPU has run it yet, and until then it is a candidate of
`python -m benchmarks.attention_tiles` and nothing else. `common.py` holds what they share.

Gluon's interface still changes, and only that of Triton 3.6 is known: importing the modules of this
package takes that version, asking whether they serve takes any.
"""

import torch
import triton
from torch import Tensor

from diffmm.ops.diff_attention.triton.tiles import pad


def serves(q: Tensor, v: Tensor) -> bool:
    """Whether `forward` and `by_columns` are for such inputs: in 16 bits, heads of 72 to 128 dims
    and values of 136 to 256, on Hopper."""
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and triton.__version__.startswith("3.6.")
        and q.element_size() == 2
        and (pad(q.shape[-1]), pad(v.shape[-1])) == (128, 256)
    )
