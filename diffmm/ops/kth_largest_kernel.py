"""The Triton kernel of `kth_largest`: a radix search in registers, one program per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_AT_ONCE = 1 << 15
"""Numbers that a program holds in registers. Longer rows are read again for every two bits."""


@triton.jit
def _keys(x, start, V, BLOCK: tl.constexpr):
    """Numbers as int32 with the same order; the smallest one beyond the end."""
    place = start + tl.arange(0, BLOCK)
    bits = tl.load(x + place, mask=place < V, other=-float("inf")).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(place < V, keys, -2147483648)


@triton.jit
def _counts(keys, first, second, third):
    """How many keys reach each of three bounds, in 21 bits each."""
    reached = (keys >= first).to(tl.int64) + ((keys >= second).to(tl.int64) << 21)
    return tl.sum(reached + ((keys >= third).to(tl.int64) << 42), 0)


@triton.jit(do_not_specialize=["k"])
def _kernel(x, out, V, k, BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr):
    """Find the largest bound that at least `k` keys reach, two bits at a time."""
    row = tl.program_id(0).to(tl.int64)
    x += row * V
    whole = _keys(x, 0, V, BLOCK)
    found = tl.full((), -2147483648, tl.int64)
    for pair in tl.static_range(16):
        step = 1 << (30 - 2 * pair)
        first = (found + step).to(tl.int32)
        second, third = (found + 2 * step).to(tl.int32), (found + 3 * step).to(tl.int32)
        if IS_WHOLE:
            counts = _counts(whole, first, second, third)
        else:
            counts = tl.full((), 0, tl.int64)
            for start in range(0, V, BLOCK):
                counts += _counts(_keys(x, start, V, BLOCK), first, second, third)
        low, middle, high = counts & 0x1FFFFF, (counts >> 21) & 0x1FFFFF, counts >> 42
        reached = (low >= k).to(tl.int64) + (middle >= k).to(tl.int64) + (high >= k).to(tl.int64)
        found += reached * step
    key = found.to(tl.int32)
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    tl.store(out + row, bits.to(tl.float32, bitcast=True))


def launch(x: Tensor, k: int) -> Tensor:
    """The `k`-th largest number of each row of `x`, contiguous `[B, V]` in float32: `[B, 1]`."""
    (batch, size), out = x.shape, x.new_empty(x.shape[0], 1, dtype=torch.float32)
    block = min(triton.next_power_of_2(size), MOST_AT_ONCE)
    if batch:
        _kernel[(batch,)](
            x,
            out,
            size,
            k,
            BLOCK=block,
            IS_WHOLE=size <= block,
            num_warps=max(1, min(16, block // 512)),
        )
    return out
