"""The k-th largest number of each row, for top-k sampling."""

from importlib.util import find_spec

import torch
from torch import Tensor

_HAS_TRITON = find_spec("triton") is not None


def kth_largest(x: Tensor, k: int) -> Tensor:
    """The `k`-th largest number of each row of `x`, `[B, V]`: `[B, 1]` in its dtype.

    On CUDA devices with Triton, two kernels find it for all rows unless `k` is large; `topk` takes
    about twenty dependent kernels for one long row.

    Args:
        x: Numbers, `[B, V]`, in float32.
        k: From 1 to `V`.
    """
    if x.is_cuda and _HAS_TRITON:
        return _kernel(x.contiguous(), k)
    return x.topk(k, dim=-1).values[:, -1:]


@torch.library.custom_op("diffmm::kth_largest", mutates_args=())
def _kernel(x: Tensor, k: int) -> Tensor:
    from diffmm.ops.kth_largest_kernel import fits, launch

    if not fits(x.shape[1], k):
        return x.topk(k, dim=-1).values[:, -1:].contiguous()
    with torch.cuda.device(x.device):
        return launch(x, k)


@_kernel.register_fake
def _(x: Tensor, k: int) -> Tensor:
    return x.new_empty(x.shape[0], 1)
