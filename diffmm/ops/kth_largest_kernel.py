"""The Triton kernel of `kth_largest`: a radix search among few candidates, one program per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1 << 13
"""Numbers that a program holds in registers."""
COLUMNS = 512
"""Number of groups whose maxima are searched first. For a larger `k` all numbers are candidates."""
CAPACITY = 1 << 11
"""Number of candidates that are searched in registers; with more, the whole row is searched."""


@triton.jit
def _load(x, start, V, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Numbers as `[BLOCK // COLUMNS, COLUMNS]`, -inf beyond the end; and where it is not."""
    rows, columns = tl.arange(0, BLOCK // COLUMNS), tl.arange(0, COLUMNS)
    place = start + rows[:, None] * COLUMNS + columns[None, :]
    return tl.load(x + place, mask=place < V, other=-float("inf")), place < V


@triton.jit
def _number(key):
    """The float32 number of an int32 key; keys have the order of the numbers. Keys below that of
    -inf have no number and stand for -inf."""
    key = tl.maximum(key, -2139095041)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _counts(numbers, found, step):
    """How many numbers reach the keys one, two and three steps above `found`, in 21 bits each."""
    # Ten bits each are enough for one column, and int64 is slow.
    reached = (numbers >= _number((found + step).to(tl.int32))).to(tl.int32)
    reached += (numbers >= _number((found + 2 * step).to(tl.int32))).to(tl.int32) << 10
    reached += (numbers >= _number((found + 3 * step).to(tl.int32))).to(tl.int32) << 20
    by_column = tl.sum(reached, 0)
    low, middle, high = by_column & 0x3FF, (by_column >> 10) & 0x3FF, by_column >> 20
    return tl.sum(low + (middle.to(tl.int64) << 21) + (high.to(tl.int64) << 42), 0)


@triton.jit
def _next(found, step, counts, k):
    """The largest of four keys, `found` and those of `_counts`, that at least `k` numbers reach."""
    low, middle, high = counts & 0x1FFFFF, (counts >> 21) & 0x1FFFFF, counts >> 42
    reached = (low >= k).to(tl.int64) + (middle >= k).to(tl.int64) + (high >= k).to(tl.int64)
    return found + reached * step


@triton.jit
def _search(numbers, k):
    """The largest number that at least `k` of `numbers`, `[rows, columns]`, reach, two bits of its
    key at a time; -inf if they are fewer."""
    found = tl.full((), -2147483648, tl.int64)
    for pair in tl.static_range(16):
        step = 1 << (30 - 2 * pair)
        found = _next(found, step, _counts(numbers, found, step), k)
    return _number(found.to(tl.int32))


@triton.jit
def _search_all(x, V, k, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """As `_search`, in a row that is read again for every two bits."""
    found = tl.full((), -2147483648, tl.int64)
    for pair in tl.static_range(16):
        step = 1 << (30 - 2 * pair)
        counts = tl.full((), 0, tl.int64)
        for start in range(0, V, BLOCK):
            numbers, _ = _load(x, start, V, BLOCK, COLUMNS)
            counts += _counts(numbers, found, step)
        found = _next(found, step, counts, k)
    return _number(found.to(tl.int32))


@triton.jit(do_not_specialize=["k"])
def _kernel(
    x, out, candidates, V, k, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, CAPACITY: tl.constexpr
):
    """The k-th largest of the maxima of all columns is a lower bound, which few more than `k`
    numbers reach: these are collected in memory, and the search goes on among them."""
    row = tl.program_id(0).to(tl.int64)
    x += row * V
    candidates += row * CAPACITY
    maxima = tl.full((COLUMNS,), -float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        numbers, _ = _load(x, start, V, BLOCK, COLUMNS)
        maxima = tl.maximum(maxima, tl.max(numbers, 0))
    bound = _search(maxima[None, :], k)

    num_candidates = tl.full((), 0, tl.int32)
    for start in range(0, V, BLOCK):
        numbers, is_inside = _load(x, start, V, BLOCK, COLUMNS)
        is_candidate = (numbers >= bound) & is_inside
        in_column = tl.cumsum(is_candidate.to(tl.int32), 0)
        by_column = tl.sum(is_candidate.to(tl.int32), 0)
        before = num_candidates + tl.cumsum(by_column, 0) - by_column
        slot = before[None, :] + in_column - 1
        tl.store(candidates + slot, numbers, mask=is_candidate & (slot < CAPACITY))
        num_candidates += tl.sum(by_column, 0)

    if num_candidates <= CAPACITY:
        tl.debug_barrier()  # other threads of the program have written them
        numbers, _ = _load(candidates, 0, num_candidates, CAPACITY, COLUMNS)
        tl.store(out + row, _search(numbers, k))
    else:
        tl.store(out + row, _search_all(x, V, k, BLOCK, COLUMNS))


def launch(x: Tensor, k: int) -> Tensor:
    """The `k`-th largest number of each row of `x`, contiguous `[B, V]` in float32: `[B, 1]`."""
    (batch, size), out = x.shape, x.new_empty(x.shape[0], 1, dtype=torch.float32)
    if batch:
        _kernel[(batch,)](
            x,
            out,
            x.new_empty(batch, CAPACITY),
            size,
            k,
            BLOCK=BLOCK,
            COLUMNS=COLUMNS,
            CAPACITY=CAPACITY,
            num_warps=COLUMNS // 32,
        )
    return out
