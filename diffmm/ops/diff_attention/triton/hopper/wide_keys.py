"""Gradients of wide keys and values: one warpgroup for dV, one for dK.

The accumulators of keys of 2 × 128 dimensions and values of 256 fill the registers of two
warpgroups. One computes the maps and accumulates dV; the other computes dS from them and
accumulates dK; a third group of one warp loads the queries by TMA:

    P1 = exp2(K1 Q1ᵀ - lse1),  P2 = -lam exp2(K2 Q2ᵀ - lse2),   dV += (P1 + P2) dO
    dP = V dOᵀ,  dSi = Pi (dP - delta_i),                       dKi += dSi Qi

P1 and P2 are passed from one warpgroup to the other through shared memory, in the inputs'
precision; dS is copied to global memory from the same buffers. One warpgroup thus computes
exponentials while the other multiplies, and operands that a warpgroup computes itself stay in its
registers.
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
    part_of_heads,
    scratch_place,
    write_tile,
)
from diffmm.ops.diff_attention.triton.masking import NUM_RANGE, query_bounds, visible
from diffmm.ops.diff_attention.triton.rows import DELTA1, DELTA2, LSE1, LSE2

KEYS = BLOCK
"""Keys per program."""

_SLOTS = gl.constexpr(2)  # buffers for pairs of maps


@gluon.jit
def _make_maps(
    k, q, g, rows, weights, map1, map2, held, full, empty, made, free, dv, low, full_low,
    full_high, high, heads, m0, N, M, scale, window, prefix, labels, padding,
    values_apart,
    CAUSAL: gl.constexpr, C: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    """Compute P1 and P2 of every query, and dV."""
    BLOCK_D: gl.constexpr = q.shape[-1]
    BLOCK_E: gl.constexpr = g.shape[-1]
    STAGES: gl.constexpr = rows.shape[0]
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_E, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, values, 2)
    key = m0 + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, scores))
    query = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, scores))
    nothing = gl.zeros([BLOCK, BLOCK], gl.float32, scores)
    acc = gl.zeros([BLOCK, BLOCK_E], gl.float32, values)
    mbarrier.wait(held, 0)
    step = 0
    for _ in range(heads):
        for n0 in range(low, high, BLOCK):
            stage, slot = step % STAGES, step % _SLOTS
            mbarrier.wait(full.index(stage), step // STAGES % 2)
            k1 = k.index(opaque(0)).reshape([BLOCK, BLOCK_D])
            k2 = k.index(opaque(C - 1)).reshape([BLOCK, BLOCK_D])
            q1 = q.index(2 * stage).reshape([BLOCK, BLOCK_D])
            q2 = q.index(2 * stage + 1).reshape([BLOCK, BLOCK_D])
            s1 = warpgroup_mma(k1, q1.permute((1, 0)), nothing, use_acc=False, is_async=True)
            s2 = warpgroup_mma(k2, q2.permute((1, 0)), nothing, use_acc=False, is_async=True)
            row = rows.index(stage)
            s1 = warpgroup_mma_wait(1, deps=[s1])
            p1 = tl.exp2(s1 * scale - row.slice(LSE1, 1).load(scores))
            s2 = warpgroup_mma_wait(0, deps=[s2])
            p2 = tl.exp2(s2 * scale - row.slice(LSE2, 1).load(scores))
            if (n0 < full_low) | (n0 + BLOCK > full_high):
                seen = visible(
                    (n0 + query)[None, :], key[:, None], N, M, window, prefix, labels, padding,
                    CAUSAL,
                )  # fmt: skip
                p1, p2 = gl.where(seen, p1, 0.0), gl.where(seen, p2, 0.0)
            p2 = p2 * weights.index(stage).load(scores)
            both = gl.convert_layout((p1 + p2).to(q.dtype), operand)
            acc_next = warpgroup_mma(
                both, g.index(stage).reshape([BLOCK, BLOCK_E]), acc, is_async=True
            )
            mbarrier.wait(free.index(slot), step // _SLOTS % 2)
            map1.index(slot).store(p1.to(q.dtype))
            map2.index(slot).store(p2.to(q.dtype))
            mbarrier.arrive(made.index(slot), count=1)
            acc = warpgroup_mma_wait(0, deps=[acc_next])
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
    write_tile(dv, acc, m0, M, values_apart, E)


@gluon.jit
def _make_gradients(
    ds_desc, v, q, g, rows, map1, map2, held, full, empty, made, free, dk, low, high,
    heads, m0, M, scale, first_slot, height, row, shift, keys_apart,
    C: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Compute dS of every query, which is written to global memory, and dK."""
    BLOCK_D: gl.constexpr = q.shape[-1]
    BLOCK_E: gl.constexpr = g.shape[-1]
    STAGES: gl.constexpr = rows.shape[0]
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, keys, 2)
    nothing = gl.zeros([BLOCK, BLOCK], gl.float32, scores)
    dk1 = gl.zeros([BLOCK, BLOCK_D], gl.float32, keys)
    dk2 = gl.zeros([BLOCK, BLOCK_D], gl.float32, keys)
    clear_margins(
        ds_desc, map1.index(0), first_slot, height, row, shift, low, high, heads, scores, 2,
    )  # fmt: skip
    for each in gl.static_range(_SLOTS):
        mbarrier.arrive(free.index(each), count=1)
    mbarrier.wait(held, 0)
    v_tile = v.reshape([BLOCK, BLOCK_E])
    step = 0
    for head_slot in range(first_slot, first_slot + heads):
        for n0 in range(low, high, BLOCK):
            stage, slot = step % STAGES, step % _SLOTS
            mbarrier.wait(full.index(stage), step // STAGES % 2)
            grad = g.index(stage).reshape([BLOCK, BLOCK_E])
            dp = warpgroup_mma(v_tile, grad.permute((1, 0)), nothing, use_acc=False, is_async=True)
            if step > 0:
                # By now the previous step has been copied to global memory, and its slot is free.
                tma.store_wait(0)
                mbarrier.arrive(free.index((step - 1) % _SLOTS), count=1)
            mbarrier.wait(made.index(slot), step // _SLOTS % 2)
            dp = warpgroup_mma_wait(0, deps=[dp])
            vectors = rows.index(stage)
            p1 = map1.index(slot).load(scores).to(gl.float32)
            ds1 = (p1 * (dp - vectors.slice(DELTA1, 1).load(scores))).to(q.dtype)
            p2 = map2.index(slot).load(scores).to(gl.float32)
            ds2 = (p2 * (dp - vectors.slice(DELTA2, 1).load(scores))).to(q.dtype)
            q1 = q.index(2 * stage).reshape([BLOCK, BLOCK_D])
            q2 = q.index(2 * stage + 1).reshape([BLOCK, BLOCK_D])
            dk1 = warpgroup_mma(gl.convert_layout(ds1, operand), q1, dk1, is_async=True)
            if C == 2:
                dk2 = warpgroup_mma(gl.convert_layout(ds2, operand), q2, dk2, is_async=True)
            else:
                dk1 = warpgroup_mma(gl.convert_layout(ds2, operand), q2, dk1, is_async=True)
            map1.index(slot).store(ds1)
            map2.index(slot).store(ds2)
            fence_async_shared()
            top = (2 * head_slot * height + row) * BLOCK
            tma.async_copy_shared_to_global(ds_desc, [top, n0 + shift], map1.index(slot))
            top += height * BLOCK
            tma.async_copy_shared_to_global(ds_desc, [top, n0 + shift], map2.index(slot))
            dk1, dk2 = warpgroup_mma_wait(0, deps=[dk1, dk2])
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
    tma.store_wait(0)
    rate = scale * 0.6931471805599453
    write_tile(dk, dk1 * rate, m0, M, keys_apart, D)
    if C == 2:
        write_tile(dk + D, dk2 * rate, m0, M, keys_apart, D)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def key_kernel(
    q_desc, g_desc, k_desc, v_desc, ds_desc, rows_desc, weight_desc, dk, dv, window, prefix,
    labels, padding, ranges, N, M, H, heads_per_group, parts, first_pair, first_tile, num_tiles,
    scale,
    CAUSAL: gl.constexpr, FOLDED: gl.constexpr, NUM_MAPS: gl.constexpr, C: gl.constexpr,
    D: gl.constexpr, E: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_E: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Compute the gradients of a tile of keys and values, and dS for every query that attends to
    them."""
    dtype: gl.constexpr = q_desc.dtype
    tile = gl.program_id(0)
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
        ranges += (batch * tl.cdiv(M, BLOCK) + first_tile + tile) * NUM_RANGE
    low, full_low, full_high, high = query_bounds(
        m0, N, M, window, prefix, ranges, CAUSAL, BLOCK, BLOCK
    )
    high = tl.cdiv(high, BLOCK) * BLOCK

    k = gl.allocate_shared_memory(dtype, [C, 1, BLOCK, 1, 1, BLOCK_D], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [1, BLOCK, 1, BLOCK_E], v_desc.layout)
    map1 = gl.allocate_shared_memory(dtype, [_SLOTS, BLOCK, BLOCK], ds_desc.layout)
    map2 = gl.allocate_shared_memory(dtype, [_SLOTS, BLOCK, BLOCK], ds_desc.layout)
    q, g, rows, weights, full, empty = allocate_ring(
        q_desc, g_desc, rows_desc, weight_desc, STAGES, NUM_MAPS
    )
    held = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    made = gl.allocate_shared_memory(gl.int64, [_SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [_SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(held, count=1)
    for slot in gl.static_range(_SLOTS):
        mbarrier.init(made.index(slot), count=1)
        mbarrier.init(free.index(slot), count=1)
    mbarrier.expect(held, C * k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    for c in gl.static_range(C):
        tma.async_copy_global_to_shared(k_desc, [batch, m0, group, c, 0], held, k.index(c))
    tma.async_copy_global_to_shared(v_desc, [batch, m0, group, 0], held, v)

    head = group * heads_per_group + first_head
    row, shift = scratch_place(tile, num_tiles, FOLDED)
    height = (num_tiles + 1) // 2 if FOLDED else num_tiles
    head_slot = batch * H + head - first_pair * heads_per_group
    rows_apart = G * parts
    first_row = batch.to(gl.int64) * M * rows_apart + group * parts + part
    dk += first_row * C * D
    dv += first_row * E
    # fmt: off
    gl.warp_specialize(
        [
            (_make_maps, (
                k, q, g, rows, weights, map1, map2, held, full, empty, made, free, dv, low,
                full_low, full_high, high, heads, m0, N, M, scale, window, prefix, labels,
                padding, rows_apart * E, CAUSAL, C, E,
            )),
            (_make_gradients, (
                ds_desc, v, q, g, rows, map1, map2, held, full, empty, made, free, dk, low, high,
                heads, m0, M, scale, head_slot, height, row, shift, rows_apart * C * D, C, D,
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
