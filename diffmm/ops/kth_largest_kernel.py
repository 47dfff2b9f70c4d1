"""The Triton kernels of `kth_largest`: a search among the maxima of groups, then in few groups."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_GROUPS = 1 << 10
"""Largest number of groups of a row."""
MOST_NUMBERS = 1 << 15
"""Largest number of numbers that a program holds in registers."""
NUMBERS_PER_WARP = 1 << 11
"""Number of them for which one warp is used, whose threads need not wait for each other."""
GROUPS_PER_PROGRAM = 32


@triton.jit
def _number(key):
    """The float32 number of an int32 key; keys have the order of the numbers. Keys below that of
    -inf have no number and stand for -inf."""
    key = tl.maximum(key, -2139095041)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _search(numbers, k):
    """The largest number that at least `k` of `numbers` reach, one bit of its key at a time; -inf
    if they are fewer."""
    found = tl.full((), -2147483648, tl.int64)
    step = tl.full((), 2147483648, tl.int64)
    for _ in range(32):
        reached = tl.sum((numbers >= _number((found + step).to(tl.int32))).to(tl.int32))
        found = tl.where(reached >= k, found + step, found)
        step //= 2
    return _number(found.to(tl.int32))


@triton.jit
def _load(x, groups, is_group, V, SIZE: tl.constexpr):
    """The numbers of groups, `[G, SIZE]`; -inf beyond the end of the row."""
    place = groups[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    return tl.load(x + place, mask=is_group[:, None] & (place < V), other=-float("inf"))


@triton.jit
def _maxima_kernel(x, maxima, V, num_groups, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """The maximum of each group of `SIZE` numbers."""
    row = tl.program_id(1).to(tl.int64)
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    numbers = _load(x + row * V, groups, groups < num_groups, V, SIZE)
    tl.store(maxima + row * num_groups + groups, tl.max(numbers, 1), mask=groups < num_groups)


@triton.jit(do_not_specialize=["k"])
def _kth_kernel(
    x,
    maxima,
    chosen,
    out,
    V,
    num_groups,
    k,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
):
    """The k-th largest maximum is a lower bound. Numbers above it are in groups whose maxima are,
    of which there are fewer than `k`: if the result is not the bound, it is the k-th largest number
    of these groups."""
    row = tl.program_id(0).to(tl.int64)
    x += row * V
    chosen += row * KEPT
    groups = tl.arange(0, GROUPS)
    highest = tl.load(
        maxima + row * num_groups + groups, mask=groups < num_groups, other=-float("inf")
    )
    bound = _search(highest, k)
    is_above = highest > bound
    tl.store(chosen + tl.cumsum(is_above.to(tl.int32), 0) - 1, groups, mask=is_above)
    tl.debug_barrier()  # other threads of the program have written them
    kept = tl.arange(0, KEPT)
    is_kept = kept < tl.sum(is_above.to(tl.int32))
    numbers = _load(x, tl.load(chosen + kept, mask=is_kept, other=0), is_kept, V, SIZE)
    tl.store(out + row, tl.maximum(bound, _search(numbers, k)))


def group_size(size: int) -> int:
    """Number of numbers per group of a row of `size` numbers, a power of two."""
    return triton.next_power_of_2(triton.cdiv(size, MOST_GROUPS))


def fits(size: int, k: int) -> bool:
    """Whether a row has `k` groups or more, and the numbers of `k` groups fit into registers."""
    groups = triton.cdiv(size, group_size(size))
    return k <= groups and triton.next_power_of_2(k) * group_size(size) <= MOST_NUMBERS


def launch(x: Tensor, k: int) -> Tensor:
    """The `k`-th largest number of each row of `x`, contiguous `[B, V]` in float32: `[B, 1]`; for
    sizes of `fits`."""
    (batch, size), out = x.shape, x.new_empty(x.shape[0], 1)
    per_group, kept = group_size(size), triton.next_power_of_2(k)
    groups = triton.cdiv(size, per_group)
    maxima = x.new_empty(batch, groups)
    if not batch:
        return out
    _maxima_kernel[(triton.cdiv(groups, GROUPS_PER_PROGRAM), batch)](
        x, maxima, size, groups, SIZE=per_group, GROUPS=GROUPS_PER_PROGRAM
    )
    num_warps = max(1, min(16, kept * per_group // NUMBERS_PER_WARP))
    _kth_kernel[(batch,)](
        x,
        maxima,
        x.new_empty(batch, kept, dtype=torch.int32),
        out,
        size,
        groups,
        k,
        SIZE=per_group,
        GROUPS=triton.next_power_of_2(groups),
        KEPT=kept,
        num_warps=num_warps,
    )
    return out
