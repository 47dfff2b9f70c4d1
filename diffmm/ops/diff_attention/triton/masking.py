"""The kernels' version of `AttentionMask`: masking within a tile, and which tiles to visit.

Fields that a mask does not set reach a kernel as `None`, so that Triton compiles them away. Causal,
window and prefix masks limit the loops by arithmetic. Document and padding masks limit them by
`ranges`, which a small kernel computes beforehand: `NUM_RANGE` numbers per tile of queries or keys,

    low, high              the positions to visit
    full_low, full_high    those that the tile sees as a whole, so that they need no mask
    in_runs                for queries: whether their documents are in runs (see `_ranges_kernel`)

Documents are compared by `labels`, 32-bit numbers of their first query, which padding is a part of.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmm.ops.diff_attention.triton.tiles import cdiv, is_traced
from diffmm.ops.mask import AttentionMask

NUM_RANGE = tl.constexpr(5)

_BLOCK = 128
_CHUNK = 1024
_LONG_CHUNK = 8192
_PART = 64


@triton.jit
def visible(query, key, N, M, window, prefix, labels, padding, CAUSAL: tl.constexpr):
    """Whether `query` attends to `key`, of this sample; both are integer tensors that broadcast to
    the tile.

    `prefix`, `labels` and `padding` point to the first element of this sample.
    """
    position = query + M - N
    sees = (key < M) & (query < N)
    if CAUSAL:
        past = key <= position
        if prefix is not None:
            past = past | (key < tl.load(prefix))
        sees = sees & past
    if window is not None:
        sees = sees & (tl.abs(position - key) < window)
    if labels is not None:
        own = tl.load(labels + tl.minimum(query, N - 1))
        sees = sees & (own == tl.load(labels + N + key, mask=key < M, other=-1))
    if padding is not None:
        sees = sees & (tl.load(padding + key, mask=key < M, other=0) != 0)
    return sees


@triton.jit
def first_keys(query, N, window, labels):
    """The first key that each query of a tile attends to if the tile's documents are in runs, the
    mask is causal and there are as many keys as queries: its label, or the start of its window.

    A query then attends to all keys from the first to itself, which takes two comparisons, whereas
    `visible` reads the label of each key in each thread.
    """
    first = tl.load(labels + tl.minimum(query, N - 1))
    if window is not None:
        first = tl.maximum(first, query - window + 1)
    return first


@triton.jit
def key_bounds(
    n0, N, M, window, prefix, ranges, CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The range of keys that the query tile at `n0` visits.

    Returns `low, full_low, full_high, high`, all but the last multiples of `BLOCK_M`. No query of
    the tile attends to keys outside `[low, high)`; all of them attend to all keys in
    `[full_low, full_high)`. `ranges` points to this tile's numbers.
    """
    first = n0 + M - N
    last = tl.minimum(n0 + BLOCK_N, N) - 1 + M - N
    low, full_low = 0, 0
    high, full_high = M, M
    if CAUSAL:
        high, full_high = last + 1, first + 1
        if prefix is not None:
            length = tl.load(prefix).to(tl.int32)
            high, full_high = tl.maximum(high, length), tl.maximum(full_high, length)
    if window is not None:
        low, full_low = first - window + 1, last - window + 1
        high, full_high = tl.minimum(high, last + window), tl.minimum(full_high, first + window)
    if ranges is not None:
        low, high = tl.maximum(low, tl.load(ranges)), tl.minimum(high, tl.load(ranges + 1))
        full_low = tl.maximum(full_low, tl.load(ranges + 2))
        full_high = tl.minimum(full_high, tl.load(ranges + 3))
    return _to_tiles(low, full_low, full_high, high, M, BLOCK_M)


@triton.jit
def query_bounds(
    m0, N, M, window, prefix, ranges, CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The range of queries that the key tile at `m0` visits, like `key_bounds` in tiles of
    `BLOCK_N`.

    Queries beyond the end need no mask, because the kernels give them no weight.
    """
    shift = N - M
    last_key = m0 + BLOCK_M - 1
    low, full_low = 0, 0
    high, full_high = N, N
    if CAUSAL:
        low, full_low = m0 + shift, last_key + shift
        if prefix is not None:
            length = tl.load(prefix).to(tl.int32)
            low = tl.where(m0 < length, 0, low)
            full_low = tl.where(last_key < length, 0, full_low)
    if window is not None:
        low = tl.maximum(low, m0 - window + 1 + shift)
        full_low = tl.maximum(full_low, last_key - window + 1 + shift)
        high = tl.minimum(high, tl.minimum(last_key, M - 1) + window + shift)
        full_high = tl.minimum(full_high, m0 + window + shift)
    if ranges is not None:
        low, high = tl.maximum(low, tl.load(ranges)), tl.minimum(high, tl.load(ranges + 1))
        full_low = tl.maximum(full_low, tl.load(ranges + 2))
        full_high = tl.minimum(full_high, tl.load(ranges + 3))
    end = tl.cdiv(N, BLOCK_N) * BLOCK_N
    # The last tile needs no mask, because its rows beyond N have no weight.
    full_high = tl.where(full_high >= N, end, full_high)
    full_high = tl.where(last_key < M, full_high, 0)
    return _to_tiles(low, full_low, full_high, high, end, BLOCK_N)


@triton.jit
def _to_tiles(low, full_low, full_high, high, LENGTH, BLOCK: tl.constexpr):
    low = tl.maximum(low, 0) // BLOCK * BLOCK
    high = tl.maximum(tl.minimum(high, LENGTH), low)
    full_low = tl.maximum(tl.cdiv(tl.maximum(full_low, 0), BLOCK) * BLOCK, low)
    full_high = tl.maximum(tl.minimum(full_high, LENGTH), 0) // BLOCK * BLOCK
    none = full_high <= full_low
    return low, tl.where(none, low, full_low), tl.where(none, low, full_high), high


@triton.jit(do_not_specialize=["N", "M"])
def _labels_kernel(
    labels, documents, padding, N, M,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Label a tile of keys, and the queries at their positions, with the first query of the same
    document; -1 for padding and for documents without queries."""
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    inside = key < M
    documents += batch * M
    own = tl.load(documents + key, mask=inside, other=0).to(tl.int64)
    far = 9223372036854775807
    lowest = tl.min(tl.where(inside, own, far), 0)
    highest = tl.max(tl.where(inside, own, -far), 0)
    label = key * 0 + N
    for start in range(0, N, CHUNK):
        query = start + tl.arange(0, CHUNK)
        theirs = tl.load(documents + query + M - N, mask=query < N, other=0).to(tl.int64)
        hit = (query < N) & (theirs >= lowest) & (theirs <= highest)
        if tl.max(hit.to(tl.int32), 0) > 0:
            for part in range(start, tl.minimum(start + CHUNK, N), PART):
                few = part + tl.arange(0, PART)
                of_few = tl.load(documents + few + M - N, mask=few < N, other=0).to(tl.int64)
                near = (few < N) & (of_few >= lowest) & (of_few <= highest)
                if tl.max(near.to(tl.int32), 0) > 0:
                    same = (own[:, None] == of_few[None, :]) & (few < N)[None, :]
                    label = tl.minimum(label, tl.min(tl.where(same, few[None, :], N), 1))
    labels += batch * (N + M)
    position = key - (M - N)
    tl.store(labels + position, label, mask=inside & (position >= 0))
    label = tl.where(label < N, label, -1)
    if padding is not None:
        real = tl.load(padding + batch * M + key, mask=inside, other=0) != 0
        label = tl.where(real, label, -1)
    tl.store(labels + N + key, label, mask=inside)


@triton.jit(do_not_specialize=["N", "M"])
def _ranges_kernel(
    ranges, labels, padding, N, M,
    OF_KEYS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Find the range of keys for a tile of queries or, with `OF_KEYS`, that of queries for a tile
    of keys. Without labels, those of all queries, and of all keys that are not padding, are 0.

    A tile of queries is `in_runs` if there are as many keys as queries, and all keys from the start
    of its first document to its own end are real, and each begins a document or continues that of
    the key before it.
    """
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    batch = tl.program_id(1).to(tl.int64)
    num_own, num_other = N, M
    if OF_KEYS:
        num_own, num_other = M, N
    own = block * BLOCK + tl.arange(0, BLOCK)
    mine = _labels_of(labels, padding, own, batch, N, M, OF_KEYS)
    seen = mine >= 0
    lowest = tl.min(tl.where(seen, mine, N), 0)
    highest = tl.max(mine, 0)
    end = tl.minimum(block * BLOCK + BLOCK, num_own)
    first, last, full_first, full_last, count, gaps = num_other, 0, num_other, 0, 0, 0
    for start in range(0, num_other, CHUNK):
        other = start + tl.arange(0, CHUNK)
        theirs = _labels_of(labels, padding, other, batch, N, M, not OF_KEYS)
        hit = (theirs >= lowest) & (theirs <= highest)
        first = tl.minimum(first, tl.min(tl.where(hit, other, num_other), 0))
        last = tl.maximum(last, tl.max(tl.where(hit, other + 1, 0), 0))
        equal = theirs == lowest
        full_first = tl.minimum(full_first, tl.min(tl.where(equal, other, num_other), 0))
        full_last = tl.maximum(full_last, tl.max(tl.where(equal, other + 1, 0), 0))
        count += tl.sum(equal.to(tl.int32), 0)
        if not OF_KEYS and labels is not None:
            before = _labels_of(labels, padding, other - 1, batch, N, M, True)
            goes_on = (theirs >= 0) & ((theirs == other) | (theirs == before))
            gap = (other >= lowest) & (other < end) & (goes_on == 0)
            gaps += tl.sum(gap.to(tl.int32), 0)
    # The whole tile has one label, and those with the same label are in one piece.
    is_one = tl.min(tl.where(own < num_own, mine, lowest), 0) == highest
    is_one = is_one & (highest >= 0) & (count == full_last - full_first)
    ranges += (batch * num_blocks + block) * NUM_RANGE
    tl.store(ranges, first)
    tl.store(ranges + 1, last)
    tl.store(ranges + 2, full_first)
    tl.store(ranges + 3, tl.where(is_one, full_last, 0))
    tl.store(ranges + 4, ((gaps == 0) & (N == M)).to(tl.int32))


@triton.jit
def _labels_of(labels, padding, index, batch, N, M, OF_KEYS: tl.constexpr):
    """The labels of some keys or queries; -1 before the first and beyond the last."""
    inside = (index >= 0) & (index < (M if OF_KEYS else N))
    if labels is not None:
        place = labels + batch * (N + M) + index
        if OF_KEYS:
            place += N
        label = tl.load(place, mask=inside, other=-1)
    elif OF_KEYS:
        label = tl.load(padding + batch * M + index, mask=inside, other=0).to(tl.int32) - 1
    else:
        label = inside.to(tl.int32) - 1
    return label


@dataclass(frozen=True)
class KernelMask:
    """`AttentionMask` with contiguous tensors, for the kernels.

    Attributes:
        prefix: Lengths of the prefixes, `[B]` int32.
        labels: Labels of `N` queries and then of `M` keys, `[B, N + M]` int32. A query attends only
            to keys that have its label. None without documents.
        padding: `[B, M]` booleans, true where a key is real. None with `labels`, which contain it.
    """

    causal: bool
    window: int | None
    prefix: Tensor | None
    labels: Tensor | None
    padding: Tensor | None

    @classmethod
    def of(
        cls, mask: AttentionMask, N: int, M: int, *, labels: Tensor | None = None
    ) -> "KernelMask":
        """The mask of `N` queries and `M` keys. `labels` may be given in place of the mask's
        documents and padding."""
        prefix, padding = mask.prefix_lengths, mask.key_padding
        if mask.document_ids is not None:
            labels, padding = document_labels(mask.document_ids, padding, N), None
        elif padding is not None:
            padding = padding.contiguous()
        return cls(
            causal=mask.causal,
            # A window this large masks nothing; clamping avoids 32-bit overflow.
            window=None if mask.window is None else min(mask.window, 2**30),
            prefix=None if prefix is None else prefix.clamp(0, M).int().contiguous(),
            labels=labels,
            padding=padding,
        )

    def key_ranges(self, batch: int, N: int, M: int, block_n: int) -> Tensor | None:
        """The ranges of keys per tile of queries, `[B, tiles, NUM_RANGE]`, or `None` for all."""
        return self._ranges(batch, N, M, block_n, of_keys=False)

    def query_ranges(self, batch: int, N: int, M: int, block_m: int) -> Tensor | None:
        """The ranges of queries per tile of keys, `[B, tiles, NUM_RANGE]`, or `None` for all."""
        return self._ranges(batch, N, M, block_m, of_keys=True)

    def _ranges(self, batch: int, N: int, M: int, block: int, *, of_keys: bool) -> Tensor | None:
        given = self.padding if self.labels is None else self.labels
        if given is None:
            return None
        num_blocks = cdiv(M if of_keys else N, block)
        ranges = given.new_empty(batch, num_blocks, NUM_RANGE.value, dtype=torch.int32)
        chunk = _LONG_CHUNK if self.labels is None else _CHUNK
        _launchable(_ranges_kernel, given)[(num_blocks, batch)](
            ranges, self.labels, self.padding, N, M, OF_KEYS=of_keys, BLOCK=block, CHUNK=chunk
        )
        return ranges


def document_labels(document_ids: Tensor, key_padding: Tensor | None, N: int) -> Tensor:
    """The labels of `KernelMask` for the documents of keys, `[B, M]`, of which the last `N` are
    also queries."""
    documents, (batch, M) = document_ids.contiguous(), document_ids.shape
    padding = None if key_padding is None else key_padding.contiguous()
    labels = documents.new_empty(batch, N + M, dtype=torch.int32)
    _launchable(_labels_kernel, documents)[(cdiv(M, _BLOCK), batch)](
        labels, documents, padding, N, M, BLOCK=_BLOCK, CHUNK=_CHUNK, PART=_PART
    )
    return labels


def _launchable(kernel: Any, tensor: Tensor) -> Any:
    """The kernel, as a part of the graph if `tensor` is traced."""
    return torch.library.wrap_triton(kernel) if is_traced(tensor) else kernel
