"""The backward pass on Hopper, of two maps or one: every score is computed once, and dS is stored
in global memory.

A key kernel computes dK, dV and dS; a matrix product `dQ = dS K` then reads dS. This is cheaper
than computing scores and dP twice, and bit-identical in every run. The scratch memory for dS is
limited to `SCRATCH_BYTES`: heads use it in turns, and if the dS of one head is larger, bands of its
keys do.
"""

from types import ModuleType

import triton
import triton.language as tl
from torch import Tensor

from diffmm.ops.diff_attention.triton.hopper import narrow_keys, wide_keys
from diffmm.ops.diff_attention.triton.hopper.common import (
    BLOCK,
    FOLD,
    SHARED_BYTES,
    SPAN,
    gluon_describe,
    scratch_place,
)
from diffmm.ops.diff_attention.triton.masking import (
    NUM_RANGE,
    KernelMask,
    key_bounds,
    query_bounds,
)
from diffmm.ops.diff_attention.triton.tiles import UNSPECIALIZED, cdiv, describe, pad

SCRATCH_BYTES = 9 << 28  # a causal head of 32,768 tokens
ENOUGH_PROGRAMS = 512
"""Programs of the key kernel up to which the heads of a group are divided among several: with few
long programs, most multiprocessors of the GPU wait for the last ones."""

_MOST_HEADS = 65535  # maximum per launch, counting each component as a head


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "first_head", "first_tile", "num_tiles"])
def _query_kernel(
    ds_desc, k_desc, dq, partial, window, prefix, ranges, written, N, M, H, heads_per_group,
    first_head, first_tile, num_tiles, scale,
    CAUSAL: tl.constexpr, FOLDED: tl.constexpr, LOOKED_UP: tl.constexpr, NUM_MAPS: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute `dQ = dS K` for a tile of one component's queries over the keys of this band.

    If there are several bands, `partial` accumulates the sum. Between its ends, the range of keys
    of a tile may include keys that the tile does not attend to, and whose dS was therefore not
    written: `written` has the queries of each tile of `KEYS` keys.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    n0 = tile * BLOCK_N
    slot, component = tl.program_id(1) // NUM_MAPS, tl.program_id(1) % NUM_MAPS
    batch, head = (first_head + slot) // H, (first_head + slot) % H
    group = head // heads_per_group
    if prefix is not None:
        prefix += batch
    if ranges is not None:
        ranges += (batch * tl.num_programs(0) + tile) * NUM_RANGE
    if written is not None:
        written += batch * tl.cdiv(M, KEYS) * NUM_RANGE
    low, _, _, high = key_bounds(n0, N, M, window, prefix, ranges, CAUSAL, BLOCK_N, BLOCK_M)
    first_key = first_tile * BLOCK_M
    low, high = tl.maximum(low, first_key), tl.minimum(high, first_key + num_tiles * BLOCK_M)
    height = (num_tiles + 1) // 2 if FOLDED else num_tiles
    top = tl.program_id(1) * height
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for m0 in range(low, high, BLOCK_M):
        row, shift = scratch_place((m0 - first_key) // BLOCK_M, num_tiles, FOLDED)
        ds = ds_desc.load([(top + row) * BLOCK_M, n0 + shift])
        if LOOKED_UP:
            own = written
            if written is not None:
                own += m0 // KEYS * NUM_RANGE
            begin, _, _, end = query_bounds(m0, N, M, window, prefix, own, CAUSAL, BLOCK_M, BLOCK_M)
            is_written = (begin < end) & (n0 + BLOCK_N > begin) & (n0 < end)
            ds = tl.where(is_written, ds, 0.0)
        k = k_desc.load([batch, m0, group, component if C == 2 else 0, 0])
        acc = tl.dot(ds.T, k.reshape(BLOCK_M, BLOCK_D), acc)
    n, dims = n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask = (n[:, None] < N) & (dims[None, :] < D)
    if partial is not None:
        partial += (tl.program_id(1).to(tl.int64) * N + n[:, None]) * D + dims[None, :]
        acc += tl.load(partial, mask=mask, other=0.0)
        tl.store(partial, acc, mask=mask)
    row = ((batch.to(tl.int64) * N + n[:, None]) * H + head) * NUM_MAPS + component
    result = (acc * (scale * 0.6931471805599453)).to(dq.dtype.element_ty)
    tl.store(dq + row * D + dims[None, :], result, mask=mask)


def kernels_of_keys(block_d: int, block_e: int, components: int) -> ModuleType:
    """The module whose `key_kernel` has enough registers for the accumulators of a tile of keys,
    which have `components * block_d + block_e` columns."""
    return narrow_keys if components * block_d + block_e <= 256 else wide_keys


def num_stages(keys: int, block_d: int, block_e: int, components: int, num_maps: int) -> int:
    """Number of tiles of queries that fit into the shared memory of a key kernel in addition to its
    keys, values and two tiles of scores per map, at two bytes per element."""
    kept = 2 * (keys * (components * block_d + block_e) + 2 * num_maps * BLOCK.value**2)
    stage = (
        2 * BLOCK.value * (num_maps * block_d + block_e) + 4 * BLOCK.value * 5
    )  # float32 vectors
    return min(3, (SHARED_BYTES - 512 - kept) // stage)  # 512 bytes for barriers and arguments


def num_parts(programs: int, heads_per_group: int) -> int:
    """Number of programs among which the heads of a group are divided, if there are `programs`
    groups and tiles of keys. None of them is without a head."""
    wanted = min(cdiv(ENOUGH_PROGRAMS, programs), heads_per_group)
    return cdiv(heads_per_group, cdiv(heads_per_group, wanted))


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, mask: KernelMask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v, for inputs that `hopper.serves_backward` accepts and
    that are all `describable`; `rows` come from `query_rows`."""
    (B, N, H, num_maps, D), (_, M, G, C, _), E = q.shape, k.shape, v.shape[-1]
    block, span, block_d, block_e = BLOCK.value, SPAN.value, pad(D), pad(E)
    keys = kernels_of_keys(block_d, block_e, C)
    stages = num_stages(keys.KEYS.value, block_d, block_e, C, num_maps)
    tiles_at_once = keys.KEYS.value // block
    heads_per_group, pairs = H // G, B * G
    num_tiles = cdiv(M, keys.KEYS.value) * tiles_at_once
    num_query_tiles = cdiv(N, span)
    looked_up = any(x is not None for x in (mask.prefix, mask.labels, mask.padding))
    folded = mask.causal and mask.window is None and N == M and not looked_up
    height = cdiv(num_tiles, 2) if folded else num_tiles
    width = num_query_tiles * span + (FOLD.value if folded else 0)
    maps_per_group = num_maps * heads_per_group
    band_bytes = maps_per_group * block * width * q.element_size()
    if band_bytes * height > SCRATCH_BYTES:
        folded, width = False, num_query_tiles * span
        height = max(SCRATCH_BYTES // band_bytes // tiles_at_once, 1) * tiles_at_once
    most = min(SCRATCH_BYTES // (band_bytes * height), _MOST_HEADS // maps_per_group)
    num_turns = cdiv(pairs, max(most, 1))
    pairs_at_once = cdiv(pairs, num_turns)
    band = num_tiles if folded else height
    scratch = q.new_empty(pairs_at_once * maps_per_group * height * block, width)

    parts = num_parts(min(band, num_tiles) // tiles_at_once * pairs_at_once, heads_per_group)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if parts > 1:
        # Each part has its own sum over heads.
        dk, dv = (x.new_empty(B, M, G, parts, *x.shape[3:], dtype=rows.dtype) for x in (k, v))
    rows = rows.flatten(0, 2)
    inputs = [
        gluon_describe(q, [1, block, 1, 1, block_d]),
        gluon_describe(grad, [1, block, 1, block_e]),
        gluon_describe(k, [1, block, 1, 1, block_d]),
        gluon_describe(v, [1, block, 1, block_e]),
        gluon_describe(scratch, [block, block]),
        gluon_describe(rows, [4, block]),
        gluon_describe(rows, [1, block]),
    ]
    read_back = describe(scratch, [block, span]), describe(k, [1, block, 1, 1, block_d])
    query_ranges = mask.query_ranges(B, N, M, keys.KEYS.value)
    key_ranges = mask.key_ranges(B, N, M, span)
    units = scale * 1.4426950408889634
    for pair in range(0, pairs, pairs_at_once):
        count = min(pairs_at_once, pairs - pair)
        partial = None
        if band < num_tiles:
            partial = rows.new_zeros(count * maps_per_group, N, D)
        for tile in range(0, num_tiles, band):
            tiles = min(band, num_tiles - tile)
            keys.key_kernel[(tiles // tiles_at_once, count * parts)](
                *inputs, dk, dv, mask.window, mask.prefix, mask.labels, mask.padding,
                query_ranges, N, M, H, heads_per_group, parts, pair, tile, tiles, units,
                CAUSAL=mask.causal, FOLDED=folded, NUM_MAPS=num_maps, C=C, D=D, E=E,
                BLOCK_D=block_d, BLOCK_E=block_e, STAGES=stages, num_warps=4,
            )  # fmt: skip
            _query_kernel[(num_query_tiles, count * maps_per_group)](
                *read_back, dq, partial, mask.window, mask.prefix, key_ranges, query_ranges, N, M,
                H, heads_per_group, pair * heads_per_group, tile, tiles, units, CAUSAL=mask.causal,
                FOLDED=folded, LOOKED_UP=looked_up, NUM_MAPS=num_maps, C=C, D=D,
                KEYS=keys.KEYS.value, BLOCK_N=span, BLOCK_M=block, BLOCK_D=block_d, num_warps=8,
                num_stages=4,
            )  # fmt: skip
    if parts > 1:
        dk, dv = dk.sum(3).to(k.dtype), dv.sum(3).to(v.dtype)
    return dq, dk, dv
