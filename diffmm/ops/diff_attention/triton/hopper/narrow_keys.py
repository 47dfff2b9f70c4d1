"""Gradients of keys and values narrow enough for one warpgroup: two tiles of keys per program, one
per warpgroup.

A tile of 64 keys has accumulators of C·D + E columns. For up to 256 columns, one warpgroup computes
everything:

    P1 = exp2(K1 Q1ᵀ - lse1),  P2 = -lam exp2(K2 Q2ᵀ - lse2),   dV += (P1 + P2) dO
    dP = V dOᵀ,  dSi = Pi (dP - delta_i),                       dKi += dSi Qi

P and dS stay in its registers as operands; dS is also written to global memory. Softmax attention
has the first map only. Two such warpgroups
share the queries, which a third group of one warp loads by TMA, and are independent otherwise: one
computes exponentials while the other multiplies.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from diffmm.ops.diff_attention.triton.hopper.common import (
    BLOCK,
    UNSPECIALIZED,
    allocate_ring,
    clear_margins,
    load_queries,
    opaque,
    packed,
    part_of_heads,
    scratch_place,
    write_tile,
)
from diffmm.ops.diff_attention.triton.masking import NUM_RANGE, query_bounds, visible
from diffmm.ops.diff_attention.triton.rows import DELTA1, DELTA2, LSE1, LSE2

KEYS = gl.constexpr(2 * BLOCK.value)
"""Keys per program."""


@gluon.jit
def _skip_queries(full, empty, step, first, last, STAGES: gl.constexpr):
    """Release the queries in `[first, last)`, which only the other warpgroup needs."""
    for _ in range(first, last, BLOCK):
        mbarrier.wait(full.index(step % STAGES), step // STAGES % 2)
        mbarrier.arrive(empty.index(step % STAGES), count=1)
        step += 1
    return step


@gluon.jit
def _attend(
    ds_desc, k, v, q, g, rows, weights, ds1_tiles, ds2_tiles, held, full, empty, dk, dv, first, low,
    full_low, full_high, high, last, heads, m0, N, M, rows_apart, scale, window, prefix, labels,
    padding, first_slot, height, row, shift,
    half: gl.constexpr, CAUSAL: gl.constexpr, NUM_MAPS: gl.constexpr, C: gl.constexpr,
    D: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    """One warpgroup: compute all gradients of a tile of keys. Of the loaded queries `[first, last)`
    it needs those in `[low, high)`."""
    BLOCK_D: gl.constexpr = q.shape[-1]
    BLOCK_E: gl.constexpr = g.shape[-1]
    STAGES: gl.constexpr = rows.shape[0]
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_E, 16])
    by_queries: gl.constexpr = gl.DotOperandLayout(0, keys, 2)
    by_gradients: gl.constexpr = gl.DotOperandLayout(0, values, 2)
    key = m0 + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, scores))
    query = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, scores))
    nothing = gl.zeros([BLOCK, BLOCK], gl.float32, scores)
    dk1 = gl.zeros([BLOCK, BLOCK_D], gl.float32, keys)
    dk2 = gl.zeros([BLOCK, BLOCK_D], gl.float32, keys)
    dv_tile = gl.zeros([BLOCK, BLOCK_E], gl.float32, values)
    clear_margins(
        ds_desc, ds1_tiles.index(half), first_slot, height, row, shift, low, high, heads, scores,
        NUM_MAPS,
    )  # fmt: skip
    mbarrier.wait(held, 0)
    step = 0
    for head_slot in range(first_slot, first_slot + heads):
        step = _skip_queries(full, empty, step, first, low, STAGES)
        for n0 in range(low, high, BLOCK):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES % 2)
            k1 = k.index(opaque(half * C)).reshape([BLOCK, BLOCK_D])
            k2 = k.index(opaque(half * C + C - 1)).reshape([BLOCK, BLOCK_D])
            v_tile = v.index(opaque(half)).reshape([BLOCK, BLOCK_E])
            q1 = q.index(NUM_MAPS * stage).reshape([BLOCK, BLOCK_D])
            q2 = q.index(NUM_MAPS * stage + NUM_MAPS - 1).reshape([BLOCK, BLOCK_D])
            grad = g.index(stage).reshape([BLOCK, BLOCK_E])
            vectors = rows.index(stage)
            s1 = warpgroup_mma(k1, q1.permute((1, 0)), nothing, use_acc=False, is_async=True)
            if NUM_MAPS == 2:
                s2 = warpgroup_mma(k2, q2.permute((1, 0)), nothing, use_acc=False, is_async=True)
            s1 = warpgroup_mma_wait(NUM_MAPS - 1, deps=[s1])
            p1 = tl.exp2(s1 * scale - vectors.slice(LSE1, 1).load(scores))
            if NUM_MAPS == 2:
                s2 = warpgroup_mma_wait(0, deps=[s2])
                p2 = tl.exp2(s2 * scale - vectors.slice(LSE2, 1).load(scores))
            if (n0 < full_low) | (n0 + BLOCK > full_high):
                seen = visible(
                    (n0 + query)[None, :], key[:, None], N, M, window, prefix, labels, padding,
                    CAUSAL,
                )  # fmt: skip
                p1 = gl.where(seen, p1, 0.0)
                if NUM_MAPS == 2:
                    p2 = gl.where(seen, p2, 0.0)
            p = p1
            if NUM_MAPS == 2:
                p2 = p2 * weights.index(stage).load(scores)
                p = p1 + p2
                p2 = packed(p2.to(q.dtype))
            both = gl.convert_layout(p.to(q.dtype), by_gradients)
            p1 = packed(p1.to(q.dtype))
            dp = warpgroup_mma(v_tile, grad.permute((1, 0)), nothing, use_acc=False, is_async=True)
            dv_tile = warpgroup_mma(both, grad, dv_tile, is_async=True)
            dp = warpgroup_mma_wait(1, deps=[dp])
            ds1 = (p1.to(gl.float32) * (dp - vectors.slice(DELTA1, 1).load(scores))).to(q.dtype)
            if NUM_MAPS == 2:
                delta2 = vectors.slice(DELTA2, 1).load(scores)
                ds2 = (p2.to(gl.float32) * (dp - delta2)).to(q.dtype)
            dk1 = warpgroup_mma(gl.convert_layout(ds1, by_queries), q1, dk1, is_async=True)
            if C == 2:
                dk2 = warpgroup_mma(gl.convert_layout(ds2, by_queries), q2, dk2, is_async=True)
            elif NUM_MAPS == 2:
                dk1 = warpgroup_mma(gl.convert_layout(ds2, by_queries), q2, dk1, is_async=True)
            tma.store_wait(0)
            gl.thread_barrier()
            ds1_tiles.index(half).store(ds1)
            if NUM_MAPS == 2:
                ds2_tiles.index(half).store(ds2)
            fence_async_shared()
            top = (NUM_MAPS * head_slot * height + row) * BLOCK
            tma.async_copy_shared_to_global(ds_desc, [top, n0 + shift], ds1_tiles.index(half))
            if NUM_MAPS == 2:
                top += height * BLOCK
                tma.async_copy_shared_to_global(ds_desc, [top, n0 + shift], ds2_tiles.index(half))
            dk1, dk2, dv_tile = warpgroup_mma_wait(0, deps=[dk1, dk2, dv_tile])
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
        step = _skip_queries(full, empty, step, high, last, STAGES)
    tma.store_wait(0)
    rate = scale * 0.6931471805599453
    write_tile(dv, dv_tile, m0, M, rows_apart * E, E)
    write_tile(dk, dk1 * rate, m0, M, rows_apart * C * D, D)
    if C == 2:
        write_tile(dk + D, dk2 * rate, m0, M, rows_apart * C * D, D)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def key_kernel(
    q_desc, g_desc, k_desc, v_desc, ds_desc, rows_desc, weight_desc, dk, dv, window, prefix,
    labels, padding, ranges, N, M, H, heads_per_group, parts, first_pair, first_tile, num_tiles,
    scale,
    CAUSAL: gl.constexpr, FOLDED: gl.constexpr, NUM_MAPS: gl.constexpr, C: gl.constexpr,
    D: gl.constexpr, E: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_E: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Compute the gradients of two tiles of keys and values, and dS for every query that attends to
    them."""
    dtype: gl.constexpr = q_desc.dtype
    tile = 2 * gl.program_id(0)
    m0 = (first_tile + tile) * BLOCK
    G = H // heads_per_group
    pair, part = first_pair + gl.program_id(1) // parts, gl.program_id(1) % parts
    batch, group = pair // G, pair % G
    heads, first_head = part_of_heads(heads_per_group, part, parts)
    if prefix is not None:
        prefix += batch
    if labels is not None:
        labels += batch.to(gl.int64) * (N + M)
    if padding is not None:
        padding += batch.to(gl.int64) * M
    if ranges is not None:
        ranges += (batch * tl.cdiv(M, KEYS) + (first_tile + tile) // 2) * NUM_RANGE
    low1, full_low1, full_high1, high1 = query_bounds(
        m0, N, M, window, prefix, ranges, CAUSAL, BLOCK, BLOCK
    )
    low2, full_low2, full_high2, high2 = query_bounds(
        m0 + BLOCK, N, M, window, prefix, ranges, CAUSAL, BLOCK, BLOCK
    )
    high1, high2 = tl.cdiv(high1, BLOCK) * BLOCK, tl.cdiv(high2, BLOCK) * BLOCK
    low, high = tl.minimum(low1, low2), tl.maximum(high1, high2)

    k = gl.allocate_shared_memory(dtype, [2 * C, 1, BLOCK, 1, 1, BLOCK_D], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [2, 1, BLOCK, 1, BLOCK_E], v_desc.layout)
    ds1_tiles = gl.allocate_shared_memory(dtype, [2, BLOCK, BLOCK], ds_desc.layout)
    ds2_tiles = ds1_tiles
    if NUM_MAPS == 2:
        ds2_tiles = gl.allocate_shared_memory(dtype, [2, BLOCK, BLOCK], ds_desc.layout)
    q, g, rows, weights, full, empty = allocate_ring(
        q_desc, g_desc, rows_desc, weight_desc, STAGES, NUM_MAPS
    )
    held = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(held, count=1)
    mbarrier.expect(held, 2 * (C * k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for half in gl.static_range(2):
        first = m0 + half * BLOCK
        for c in gl.static_range(C):
            tma.async_copy_global_to_shared(
                k_desc, [batch, first, group, c, 0], held, k.index(half * C + c)
            )
        tma.async_copy_global_to_shared(v_desc, [batch, first, group, 0], held, v.index(half))

    head = group * heads_per_group + first_head
    row1, shift1 = scratch_place(tile, num_tiles, FOLDED)
    row2, shift2 = scratch_place(tile + 1, num_tiles, FOLDED)
    height = (num_tiles + 1) // 2 if FOLDED else num_tiles
    head_slot = batch * H + head - first_pair * heads_per_group
    rows_apart = G * parts
    first_row = batch.to(gl.int64) * M * rows_apart + group * parts + part
    dk += first_row * C * D
    dv += first_row * E
    # fmt: off
    gl.warp_specialize(
        [
            (_attend, (
                ds_desc, k, v, q, g, rows, weights, ds1_tiles, ds2_tiles, held, full, empty, dk, dv,
                low, low1, full_low1, full_high1, high1, high, heads, m0, N, M, rows_apart,
                scale, window, prefix, labels, padding, head_slot, height, row1, shift1,
                gl.constexpr(0), CAUSAL, NUM_MAPS, C, D, E,
            )),
            (_attend, (
                ds_desc, k, v, q, g, rows, weights, ds1_tiles, ds2_tiles, held, full, empty, dk, dv,
                low, low2, full_low2, full_high2, high2, high, heads, m0 + BLOCK, N, M, rows_apart,
                scale, window, prefix, labels, padding, head_slot, height, row2, shift2,
                gl.constexpr(1), CAUSAL, NUM_MAPS, C, D, E,
            )),
            (load_queries, (
                q_desc, g_desc, rows_desc, weight_desc, q, g, rows, weights, full, empty, batch, H,
                head, heads, low, high, NUM_MAPS,
            )),
        ],
        [4, 1],
        [240, 24],
    )
    # fmt: on
