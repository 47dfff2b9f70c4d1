"""The backward pass for wide values on Hopper: every score is formed once.

With values 256 wide the accumulators of dK and dV fill the registers of two warpgroups, and
Triton's own schedule spills. Here the schedule is written out, in Gluon. A program holds a tile of
keys and takes queries two tiles at a time: the second one's scores queue up behind the first one's
dV and dK, so that the tensor cores have work while exponentials are taken, and the copy engine
brings the tiles after that. The warpgroups halve every product by columns and hand each other P and
dS through shared memory.

dS goes to memory, in the inputs' precision, and a plain product `dQ = dS K` reads it back: cheaper
than scores and dP a second time, and the same bits in every run. That memory is bounded by
`SCRATCH_BYTES`: heads take turns in it, and where one head's dS is more, so do bands of its keys.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from diffmm.ops.diff_attention.triton.hopper.common import gluon_describe, opaque
from diffmm.ops.diff_attention.triton.masking import (
    KernelMask,
    key_bounds,
    query_bounds,
    visible,
)
from diffmm.ops.diff_attention.triton.rows import DELTA1, DELTA2, LSE1, LSE2, NUM_ROWS, WEIGHT
from diffmm.ops.diff_attention.triton.tiles import UNSPECIALIZED, describe, pad

SCRATCH_BYTES = 9 << 28  # a causal head of 32,768 tokens
_BLOCK = gl.constexpr(64)  # keys, and queries, of a step
_SPAN = gl.constexpr(128)  # queries of two steps, and of a tile of dQ
# Folded causal dS: how far the long rows move so that the short ones fit in front of them.
_FOLD = gl.constexpr(256)


@triton.jit
def _scratch_place(tile, num_tiles, n0, FOLDED: gl.constexpr):
    """Row (in tiles) and column of dS in its head's scratch. Causal dS is a triangle: folded, the
    last keys' short rows lie in front of the first keys' long ones."""
    if FOLDED:
        short = tile >= (num_tiles + 1) // 2
        row = tl.where(short, num_tiles - 1 - tile, tile)
        column = tl.where(short, n0 - tile * _BLOCK // _SPAN * _SPAN, n0 + _FOLD)
    else:
        row, column = tile, n0
    return row, column


@gluon.jit
def _load(q_desc, g_desc, rows_desc, q, g, rows, bars, stage, batch, H, head, n0, some):
    """Have the copy engine bring a step's queries, gradients of the output and rows, if `some`."""
    full = bars.index(stage)
    size: gl.constexpr = 2 * q_desc.block_type.nbytes + g_desc.block_type.nbytes
    mbarrier.expect(full, size + rows_desc.block_type.nbytes, pred=some)
    for c in gl.static_range(2):
        tma.async_copy_global_to_shared(
            q_desc, [batch, n0, head, c, 0], full, q.index(2 * stage + c), pred=some
        )
    tma.async_copy_global_to_shared(g_desc, [batch, n0, head, 0], full, g.index(stage), pred=some)
    place = (batch * H + head) * NUM_ROWS
    tma.async_copy_global_to_shared(rows_desc, [place, n0], full, rows.index(stage), pred=some)


@gluon.jit
def _scores(k1, k2, v, q, g, stage, layout: gl.constexpr):
    """Begin the products that a step starts from: `k1 q1ᵀ`, `k2 q2ᵀ` and `v gᵀ`."""
    q1 = q.index(2 * stage).reshape(k1.shape)
    q2 = q.index(2 * stage + 1).reshape(k1.shape)
    grad = g.index(stage).reshape(v.shape)
    nothing = gl.zeros([_BLOCK, _BLOCK], gl.float32, layout)
    s1 = warpgroup_mma(k1, q1.permute((1, 0)), nothing, use_acc=False, is_async=True)
    s2 = warpgroup_mma(k2, q2.permute((1, 0)), nothing, use_acc=False, is_async=True)
    dp = warpgroup_mma(v, grad.permute((1, 0)), nothing, use_acc=False, is_async=True)
    return s1, s2, dp


@gluon.jit
def _step(
    s1, s2, dp, dk1, dk2, dv, q, g, rows, p_tile, ds_tiles, stage, scale, position, key, M, window,
    prefix, documents, padding, masked, C: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """From scores to dV and dK, whose products are begun and not waited for."""
    BLOCK_D: gl.constexpr = q.shape[-1]
    BLOCK_E: gl.constexpr = g.shape[-1]
    layout: gl.constexpr = s1.type.tensor_type.layout
    row = rows.index(stage)
    s1 = warpgroup_mma_wait(2, deps=[s1])
    p1 = tl.exp2(s1 * scale - row.slice(LSE1, 1).load(layout))
    s2 = warpgroup_mma_wait(1, deps=[s2])
    p2 = tl.exp2(s2 * scale - row.slice(LSE2, 1).load(layout))
    if masked:
        seen = visible(
            position[None, :], key[:, None], M, window, prefix, documents, padding, CAUSAL
        )
        p1, p2 = gl.where(seen, p1, 0.0), gl.where(seen, p2, 0.0)
    p2 = p2 * row.slice(WEIGHT, 1).load(layout)
    p_tile.store((p1 + p2).to(p_tile.dtype))
    fence_async_shared()
    q1 = q.index(2 * stage).reshape([_BLOCK, BLOCK_D])
    q2 = q.index(2 * stage + 1).reshape([_BLOCK, BLOCK_D])
    grad = g.index(stage).reshape([_BLOCK, BLOCK_E])
    dv = warpgroup_mma(p_tile, grad, dv, is_async=True)

    dp = warpgroup_mma_wait(1, deps=[dp])
    ds1 = p1 * (dp - row.slice(DELTA1, 1).load(layout))
    ds2 = p2 * (dp - row.slice(DELTA2, 1).load(layout))
    ds_tiles.index(0).store(ds1.to(p_tile.dtype))
    ds_tiles.index(1).store(ds2.to(p_tile.dtype))
    fence_async_shared()
    dk1 = warpgroup_mma(ds_tiles.index(0), q1, dk1, is_async=True)
    if C == 2:
        dk2 = warpgroup_mma(ds_tiles.index(1), q2, dk2, is_async=True)
    else:
        dk1 = warpgroup_mma(ds_tiles.index(1), q2, dk1, is_async=True)
    return dk1, dk2, dv


@gluon.jit
def _key_kernel(
    q_desc, g_desc, k_desc, v_desc, ds_desc, rows_desc, dk, dv, window, prefix, documents, padding,
    ranges, N, M, H, heads_per_group, first_pair, first_tile, scale,
    CAUSAL: gl.constexpr, FOLDED: gl.constexpr, C: gl.constexpr, D: gl.constexpr, E: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_E: gl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, and dS for every query that sees them."""
    dtype: gl.constexpr = q_desc.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, _BLOCK // 2, 16])
    keys_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_D // 2, 16])
    values_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_E // 2, 16])

    tile, num_tiles = gl.program_id(0), gl.num_programs(0)
    height = (num_tiles + 1) // 2 if FOLDED else num_tiles
    m0 = (first_tile + tile) * _BLOCK
    G = H // heads_per_group
    pair = first_pair + gl.program_id(1)
    batch, group = pair // G, pair % G
    if prefix is not None:
        prefix += batch
    if documents is not None:
        documents += batch.to(gl.int64) * M
    if padding is not None:
        padding += batch.to(gl.int64) * M
    if ranges is not None:
        ranges += (batch * tl.cdiv(M, _BLOCK) + first_tile + tile) * 2
    low, full_low, full_high, high = query_bounds(
        m0, N, M, window, prefix, ranges, CAUSAL, _SPAN, _BLOCK
    )
    high = tl.cdiv(high, _SPAN) * _SPAN
    num_spans = tl.maximum(high - low, 0) // _SPAN * heads_per_group

    k = gl.allocate_shared_memory(dtype, [2, 1, _BLOCK, 1, 1, BLOCK_D], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [1, _BLOCK, 1, BLOCK_E], v_desc.layout)
    q = gl.allocate_shared_memory(dtype, [4, 1, _BLOCK, 1, 1, BLOCK_D], q_desc.layout)
    g = gl.allocate_shared_memory(dtype, [2, 1, _BLOCK, 1, BLOCK_E], g_desc.layout)
    rows = gl.allocate_shared_memory(gl.float32, [2, NUM_ROWS, _BLOCK], rows_desc.layout)
    p_tile = gl.allocate_shared_memory(dtype, [_BLOCK, _BLOCK], ds_desc.layout)
    ds_tiles = gl.allocate_shared_memory(dtype, [2, _BLOCK, _BLOCK], ds_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for bar in gl.static_range(3):
        mbarrier.init(bars.index(bar), count=1)

    held = bars.index(2)
    mbarrier.expect(held, C * k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    for c in gl.static_range(C):
        tma.async_copy_global_to_shared(k_desc, [batch, m0, group, c, 0], held, k.index(c))
    tma.async_copy_global_to_shared(v_desc, [batch, m0, group, 0], held, v)
    head, n0, some = group * heads_per_group, low, num_spans > 0
    _load(q_desc, g_desc, rows_desc, q, g, rows, bars, 0, batch, H, head, n0, some)
    _load(q_desc, g_desc, rows_desc, q, g, rows, bars, 1, batch, H, head, n0 + _BLOCK, some)
    mbarrier.wait(held, 0)

    k1 = k.index(0).reshape([_BLOCK, BLOCK_D])
    k2 = k.index(C - 1).reshape([_BLOCK, BLOCK_D])
    v_tile = v.reshape([_BLOCK, BLOCK_E])
    key = m0 + gl.arange(0, _BLOCK, layout=gl.SliceLayout(1, scores))
    query = gl.arange(0, _BLOCK, layout=gl.SliceLayout(0, scores))
    dk1 = gl.zeros([_BLOCK, BLOCK_D], gl.float32, keys_out)
    dk2 = gl.zeros([_BLOCK, BLOCK_D], gl.float32, keys_out)
    dv_tile = gl.zeros([_BLOCK, BLOCK_E], gl.float32, values_out)

    for span in range(num_spans):
        slot = (batch * H + head - first_pair * heads_per_group) * 2
        for half in gl.static_range(2):
            stage, start = opaque(half), n0 + half * _BLOCK
            mbarrier.wait(bars.index(stage), span % 2)
            s1, s2, dp = _scores(k1, k2, v_tile, q, g, stage, scores)
            if half == 1:
                # Both warpgroups shall be through with the first half, its P and its dS.
                dk1, dk2, dv_tile = warpgroup_mma_wait(3, deps=[dk1, dk2, dv_tile])
                tma.store_wait(0)
                gl.thread_barrier()
                later_n0 = n0 + _SPAN
                later_head = tl.where(later_n0 < high, head, head + 1)
                later_n0 = tl.where(later_n0 < high, later_n0, low)
                some = span + 1 < num_spans
                _load(
                    q_desc, g_desc, rows_desc, q, g, rows, bars, opaque(0), batch, H,
                    later_head, later_n0, some,
                )  # fmt: skip
            masked = (start < full_low) | (start + _BLOCK > full_high)
            dk1, dk2, dv_tile = _step(
                s1, s2, dp, dk1, dk2, dv_tile, q, g, rows, p_tile, ds_tiles, stage, scale,
                start + M - N + query, key, M, window, prefix, documents, padding, masked, C,
                CAUSAL,
            )  # fmt: skip
            row, column = _scratch_place(tile, num_tiles, start, FOLDED)
            for c in gl.static_range(2):
                place = ((slot + c) * height + row) * _BLOCK
                tma.async_copy_shared_to_global(ds_desc, [place, column], ds_tiles.index(c))
        dk1, dk2, dv_tile = warpgroup_mma_wait(0, deps=[dk1, dk2, dv_tile])
        tma.store_wait(0)
        gl.thread_barrier()
        _load(
            q_desc, g_desc, rows_desc, q, g, rows, bars, opaque(1), batch, H,
            later_head, later_n0 + _BLOCK, some,
        )  # fmt: skip
        head, n0 = later_head, later_n0

    rate = scale * 0.6931471805599453
    dim = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, keys_out))
    own = (m0 + gl.arange(0, _BLOCK, layout=gl.SliceLayout(1, keys_out)))[:, None]
    mask = (own < M) & (dim[None, :] < D)
    dk += ((batch.to(gl.int64) * M + own) * G + group) * C * D + dim[None, :]
    gl.store(dk, (dk1 * rate).to(dtype), mask=mask)
    if C == 2:
        gl.store(dk + D, (dk2 * rate).to(dtype), mask=mask)
    width = gl.arange(0, BLOCK_E, layout=gl.SliceLayout(0, values_out))
    own = (m0 + gl.arange(0, _BLOCK, layout=gl.SliceLayout(1, values_out)))[:, None]
    dv += ((batch.to(gl.int64) * M + own) * G + group) * E + width[None, :]
    gl.store(dv, dv_tile.to(dtype), mask=(own < M) & (width[None, :] < E))


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "first_head", "first_tile", "num_tiles"])
def _query_kernel(
    ds_desc, k_desc, dq, partial, window, prefix, ranges, N, M, H, heads_per_group, first_head,
    first_tile, num_tiles, scale,
    CAUSAL: tl.constexpr, FOLDED: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`dQ = dS K` for a tile of one component's queries, over the keys of this band that see it.

    Where there are several bands, `partial` carries the sum from one to the next.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    n0 = tile * BLOCK_N
    slot, component = tl.program_id(1) // 2, tl.program_id(1) % 2
    batch, head = (first_head + slot) // H, (first_head + slot) % H
    group = head // heads_per_group
    if prefix is not None:
        prefix += batch
    if ranges is not None:
        ranges += (batch * tl.num_programs(0) + tile) * 2
    low, _, _, high = key_bounds(n0, N, M, window, prefix, ranges, CAUSAL, BLOCK_N, BLOCK_M)
    first_key = first_tile * BLOCK_M
    low, high = tl.maximum(low, first_key), tl.minimum(high, first_key + num_tiles * BLOCK_M)
    height = (num_tiles + 1) // 2 if FOLDED else num_tiles
    top = tl.program_id(1) * height
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for m0 in range(low, high, BLOCK_M):
        row, column = _scratch_place((m0 - first_key) // BLOCK_M, num_tiles, n0, FOLDED)
        ds = ds_desc.load([(top + row) * BLOCK_M, column])
        k = k_desc.load([batch, m0, group, component if C == 2 else 0, 0])
        acc = tl.dot(ds.T, k.reshape(BLOCK_M, BLOCK_D), acc)
    n, dims = n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask = (n[:, None] < N) & (dims[None, :] < D)
    if partial is not None:
        partial += (tl.program_id(1) * N + n[:, None]).to(tl.int64) * D + dims[None, :]
        acc += tl.load(partial, mask=mask, other=0.0)
        tl.store(partial, acc, mask=mask)
    row = ((batch.to(tl.int64) * N + n[:, None]) * H + head) * 2 + component
    result = (acc * (scale * 0.6931471805599453)).to(dq.dtype.element_ty)
    tl.store(dq + row * D + dims[None, :], result, mask=mask)


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, mask: KernelMask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, that `hopper.serves`, all describable; `rows` from
    `query_rows`."""
    (B, N, H, _, D), (_, M, G, C, _), E = q.shape, k.shape, v.shape[-1]
    block, span, block_d, block_e = _BLOCK.value, _SPAN.value, pad(D), pad(E)
    heads_per_group, pairs = H // G, B * G
    num_tiles, num_query_tiles = triton.cdiv(M, block), triton.cdiv(N, span)
    looked_up = any(x is not None for x in (mask.prefix, mask.documents, mask.padding))
    folded = mask.causal and mask.window is None and N == M and not looked_up
    height = triton.cdiv(num_tiles, 2) if folded else num_tiles
    width = num_query_tiles * span + (_FOLD.value if folded else 0)
    band_bytes = 2 * heads_per_group * block * width * q.element_size()
    if band_bytes * height > SCRATCH_BYTES:
        folded, width = False, num_query_tiles * span
        height = max(SCRATCH_BYTES // band_bytes, 1)
    num_turns = triton.cdiv(pairs, max(SCRATCH_BYTES // (band_bytes * height), 1))
    pairs_at_once = triton.cdiv(pairs, num_turns)
    band = num_tiles if folded else height
    scratch = q.new_empty(pairs_at_once * heads_per_group * 2 * height * block, width)

    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    inputs = [
        gluon_describe(q, [1, block, 1, 1, block_d]),
        gluon_describe(grad, [1, block, 1, block_e]),
        gluon_describe(k, [1, block, 1, 1, block_d]),
        gluon_describe(v, [1, block, 1, block_e]),
        gluon_describe(scratch, [block, block]),
        gluon_describe(rows.flatten(0, 2), [NUM_ROWS.value, block]),
    ]
    read_back = describe(scratch, [block, span]), describe(k, [1, block, 1, 1, block_d])
    query_ranges = mask.query_ranges(B, N, M, block)
    key_ranges = mask.key_ranges(B, N, M, span)
    units = scale * 1.4426950408889634
    for pair in range(0, pairs, pairs_at_once):
        count = min(pairs_at_once, pairs - pair)
        partial = None
        if band < num_tiles:
            partial = rows.new_zeros(count * heads_per_group * 2, N, D)
        for tile in range(0, num_tiles, band):
            tiles = min(band, num_tiles - tile)
            if looked_up:  # The kernels may differ in which empty tiles they skip.
                scratch.zero_()
            _key_kernel[(tiles, count)](
                *inputs, dk, dv, mask.window, mask.prefix, mask.documents, mask.padding,
                query_ranges, N, M, H,
                heads_per_group, pair, tile, units,
                CAUSAL=mask.causal, FOLDED=folded, C=C, D=D, E=E, BLOCK_D=block_d,
                BLOCK_E=block_e, num_warps=8,
            )  # fmt: skip
            _query_kernel[(num_query_tiles, count * heads_per_group * 2)](
                *read_back, dq, partial, mask.window, mask.prefix, key_ranges, N, M, H,
                heads_per_group, pair * heads_per_group, tile, tiles, units, CAUSAL=mask.causal,
                FOLDED=folded, C=C, D=D, BLOCK_N=span, BLOCK_M=block, BLOCK_D=block_d,
                num_warps=8, num_stages=4,
            )  # fmt: skip
    return dq, dk, dv
