"""The Triton kernel of `kth_largest`: a radix search, one program per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_AT_ONCE = 1 << 15
"""Numbers that a program holds in registers. Longer rows are read again for every two bits."""
COLUMNS = 64
"""Counts that are added up at the end, each over at most 512 numbers."""


@triton.jit
def _load(x, start, V, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Numbers as `[BLOCK // COLUMNS, COLUMNS]`; -inf beyond the end."""
    rows, columns = tl.arange(0, BLOCK // COLUMNS), tl.arange(0, COLUMNS)
    place = start + rows[:, None] * COLUMNS + columns[None, :]
    return tl.load(x + place, mask=place < V, other=-float("inf"))


@triton.jit
def _number(key):
    """The float32 number of an int32 key; keys have the order of the numbers. Keys below that of
    -inf have no number and stand for -inf."""
    key = tl.maximum(key, -2139095041)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _counts(numbers, first, second, third):
    """How many numbers reach each of three bounds, in 21 bits each."""
    # Ten bits each are enough for one column, and int64 is slow.
    reached = (numbers >= first).to(tl.int32) + ((numbers >= second).to(tl.int32) << 10)
    by_column = tl.sum(reached + ((numbers >= third).to(tl.int32) << 20), 0)
    low, middle, high = by_column & 0x3FF, (by_column >> 10) & 0x3FF, by_column >> 20
    return tl.sum(low + (middle.to(tl.int64) << 21) + (high.to(tl.int64) << 42), 0)


@triton.jit(do_not_specialize=["k"])
def _kernel(x, out, V, k, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, IS_WHOLE: tl.constexpr):
    """Find the largest bound that at least `k` numbers reach, two bits of its key at a time."""
    row = tl.program_id(0).to(tl.int64)
    x += row * V
    whole = _load(x, 0, V, BLOCK, COLUMNS)
    found = tl.full((), -2147483648, tl.int64)
    for pair in tl.static_range(16):
        step = 1 << (30 - 2 * pair)
        first = _number((found + step).to(tl.int32))
        second = _number((found + 2 * step).to(tl.int32))
        third = _number((found + 3 * step).to(tl.int32))
        if IS_WHOLE:
            counts = _counts(whole, first, second, third)
        else:
            counts = tl.full((), 0, tl.int64)
            for start in range(0, V, BLOCK):
                counts += _counts(_load(x, start, V, BLOCK, COLUMNS), first, second, third)
        low, middle, high = counts & 0x1FFFFF, (counts >> 21) & 0x1FFFFF, counts >> 42
        reached = (low >= k).to(tl.int64) + (middle >= k).to(tl.int64) + (high >= k).to(tl.int64)
        found += reached * step
    tl.store(out + row, _number(found.to(tl.int32)))


def launch(x: Tensor, k: int) -> Tensor:
    """The `k`-th largest number of each row of `x`, contiguous `[B, V]` in float32: `[B, 1]`."""
    (batch, size), out = x.shape, x.new_empty(x.shape[0], 1, dtype=torch.float32)
    block = min(max(triton.next_power_of_2(size), COLUMNS), MOST_AT_ONCE)
    if batch:
        _kernel[(batch,)](
            x,
            out,
            size,
            k,
            BLOCK=block,
            COLUMNS=COLUMNS,
            IS_WHOLE=size <= block,
            num_warps=max(1, min(16, block // 512)),
        )
    return out
