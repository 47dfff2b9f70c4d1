"""The kernels' version of `AttentionMask`: masking within a tile, and which tiles to visit.

Fields that a mask does not set reach a kernel as `None`, so that Triton compiles them away. Causal,
window and prefix masks limit the loops by arithmetic. Document and padding masks limit them by
`ranges`, the positions to visit per tile, which a small kernel computes beforehand.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmm.ops.diff_attention.triton.tiles import cdiv, is_traced
from diffmm.ops.mask import AttentionMask

_CHUNK = 1024


@triton.jit
def visible(position, key, M, window, prefix, documents, padding, CAUSAL: tl.constexpr):
    """Whether queries at `position` attend to `key`; both are integer tensors that broadcast to
    the tile.

    `prefix`, `documents` and `padding` point to the first element of this sample.
    """
    sees = (key < M) & (position < M)
    if CAUSAL:
        past = key <= position
        if prefix is not None:
            past = past | (key < tl.load(prefix))
        sees = sees & past
    if window is not None:
        sees = sees & (tl.abs(position - key) < window)
    if documents is not None:
        in_range = (position >= 0) & (position < M)
        own = tl.load(documents + position, mask=in_range, other=0)
        sees = sees & (own == tl.load(documents + key, mask=key < M, other=0))
    if padding is not None:
        sees = sees & (tl.load(padding + key, mask=key < M, other=0) != 0)
    return sees


@triton.jit
def key_bounds(
    n0, N, M, window, prefix, ranges, CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The range of keys that the query tile at `n0` visits.

    Returns `low, full_low, full_high, high`, all but the last multiples of `BLOCK_M`. No query of
    the tile attends to keys outside `[low, high)`; all of them attend to all keys in
    `[full_low, full_high)`. `ranges` points to this tile's pair; if given, that range is empty.
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
        full_high = 0
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
    else:
        # The last tile needs no mask, because its rows beyond N have no weight.
        full_high = tl.cdiv(N, BLOCK_N) * BLOCK_N
    if ranges is not None:
        low, high = tl.maximum(low, tl.load(ranges)), tl.minimum(high, tl.load(ranges + 1))
        full_high = 0
    full_high = tl.where(last_key < M, full_high, 0)
    return _to_tiles(low, full_low, full_high, high, tl.cdiv(N, BLOCK_N) * BLOCK_N, BLOCK_N)


@triton.jit
def _to_tiles(low, full_low, full_high, high, LENGTH, BLOCK: tl.constexpr):
    low = tl.maximum(low, 0) // BLOCK * BLOCK
    high = tl.maximum(tl.minimum(high, LENGTH), low)
    full_low = tl.maximum(tl.cdiv(tl.maximum(full_low, 0), BLOCK) * BLOCK, low)
    full_high = tl.maximum(tl.minimum(full_high, LENGTH), 0) // BLOCK * BLOCK
    none = full_high <= full_low
    return low, tl.where(none, low, full_low), tl.where(none, low, full_high), high


@triton.jit(do_not_specialize=["num_own", "num_other", "own_shift", "other_shift", "M"])
def _ranges_kernel(
    ranges, documents, own_padding, other_padding, num_own, num_other, own_shift, other_shift, M,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    batch = tl.program_id(1).to(tl.int64)
    own = block * BLOCK + tl.arange(0, BLOCK)
    real = own < num_own
    if own_padding is not None:
        real = real & (tl.load(own_padding + batch * M + own, mask=real, other=0) != 0)
    far = 9223372036854775807
    lowest, highest = far, -far
    if documents is not None:
        mine = tl.load(documents + batch * M + own + own_shift, mask=real, other=0).to(tl.int64)
        lowest = tl.min(tl.where(real, mine, far), 0)
        highest = tl.max(tl.where(real, mine, -far), 0)
    first, last = num_other, -1
    for start in range(0, num_other, CHUNK):
        other = start + tl.arange(0, CHUNK)
        hit = other < num_other
        if other_padding is not None:
            hit = hit & (tl.load(other_padding + batch * M + other, mask=hit, other=0) != 0)
        if documents is not None:
            place = documents + batch * M + other + other_shift
            theirs = tl.load(place, mask=hit, other=0).to(tl.int64)
            hit = hit & (theirs >= lowest) & (theirs <= highest)
        first = tl.minimum(first, tl.min(tl.where(hit, other, num_other), 0))
        last = tl.maximum(last, tl.max(tl.where(hit, other, -1), 0))
    if tl.max(real.to(tl.int32), 0) == 0:
        first, last = num_other, -1
    tl.store(ranges + (batch * num_blocks + block) * 2, first)
    tl.store(ranges + (batch * num_blocks + block) * 2 + 1, last + 1)


@dataclass(frozen=True)
class KernelMask:
    """`AttentionMask` with contiguous tensors, for the kernels."""

    causal: bool
    window: int | None
    prefix: Tensor | None
    documents: Tensor | None
    padding: Tensor | None

    @classmethod
    def of(cls, mask: AttentionMask, num_keys: int) -> "KernelMask":
        prefix, documents, padding = mask.prefix_lengths, mask.document_ids, mask.key_padding
        return cls(
            causal=mask.causal,
            # A window this large masks nothing; clamping avoids 32-bit overflow.
            window=None if mask.window is None else min(mask.window, 2**30),
            prefix=None if prefix is None else prefix.clamp(0, num_keys).int().contiguous(),
            documents=None if documents is None else documents.contiguous(),
            padding=None if padding is None else padding.contiguous(),
        )

    def key_ranges(self, batch: int, N: int, M: int, block_n: int) -> Tensor | None:
        """The range of keys per tile of queries, `[B, tiles, 2]`, or `None` for all keys."""
        return self._ranges(batch, N, M, M - N, 0, None, self.padding, block_n, M)

    def query_ranges(self, batch: int, N: int, M: int, block_m: int) -> Tensor | None:
        """The range of queries per tile of keys, `[B, tiles, 2]`, or `None` for all queries."""
        return self._ranges(batch, M, N, 0, M - N, self.padding, None, block_m, M)

    def _ranges(
        self,
        batch: int,
        num_own: int,
        num_other: int,
        own_shift: int,
        other_shift: int,
        own_padding: Tensor | None,
        other_padding: Tensor | None,
        block: int,
        M: int,
    ) -> Tensor | None:
        given = self.documents if self.documents is not None else self.padding
        if given is None:
            return None
        num_blocks = cdiv(num_own, block)
        ranges = torch.empty(batch, num_blocks, 2, dtype=torch.int32, device=given.device)
        kernel = torch.library.wrap_triton(_ranges_kernel) if is_traced(given) else _ranges_kernel
        kernel[(num_blocks, batch)](
            ranges, self.documents, own_padding, other_padding,
            num_own, num_other, own_shift, other_shift, M, BLOCK=block, CHUNK=_CHUNK,
        )  # fmt: skip
        return ranges
