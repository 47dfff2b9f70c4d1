"""The forward pass on Hopper: one warpgroup per map, or per tile of queries if there is one map (of
softmax attention).

A map's output of 64 queries and 256 dimensions fills the registers of a warpgroup; Triton alone
would need two launches. Here, in Gluon, two warpgroups loop over the same keys and values, each
with its own online softmax, and a third group of one warp loads them by TMA. While one warpgroup
computes exponentials the other one multiplies; within each, the scores of the next keys are
computed during the product of the current weights and values.

`m_i`, `l_i` and `alpha` are the running maximum, the running sum and the rescaling factor.
"""

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from diffmm.ops.diff_attention.triton.hopper.common import (
    BLOCK,
    SHARED_BYTES,
    UNSPECIALIZED,
    gluon_describe,
)
from diffmm.ops.diff_attention.triton.masking import (
    NUM_RANGE,
    KernelMask,
    first_keys,
    key_bounds,
    visible,
)
from diffmm.ops.diff_attention.triton.tiles import cdiv, pad, strides_of


@gluon.jit
def _load_keys(
    k_desc, v_desc, k, v, k_full, v_full, empty, batch, group, low, num_steps,
    C: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Keep the ring buffer of keys and values full."""
    KEYS: gl.constexpr = v.shape[2]
    for step in range(num_steps):
        stage = step % STAGES
        # Waiting for the phase before the first returns at once on a new barrier.
        mbarrier.wait(empty.index(stage), (step // STAGES + 1) % 2)
        m0 = low + step * KEYS
        full = k_full.index(stage)
        mbarrier.expect(full, C * k_desc.block_type.nbytes)
        for c in gl.static_range(C):
            tma.async_copy_global_to_shared(
                k_desc, [batch, m0, group, c, 0], full, k.index(C * stage + c)
            )
        full = v_full.index(stage)
        mbarrier.expect(full, v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [batch, m0, group, 0], full, v.index(stage))


@gluon.jit
def _softmax(
    s, m_i, l_i, masked, m0, query, N, M, scale, window, prefix, labels, padding, in_runs,
    first, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Add one tile of keys to an online softmax; return its weights, and `alpha` for the
    accumulator."""
    layout: gl.constexpr = s.type.layout
    key = m0 + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, layout))
    if masked & in_runs:
        runs = (key[None, :] >= first[:, None]) & (key[None, :] <= query[:, None])
        s = gl.where(runs, s, -float("inf"))
    if masked & (in_runs == 0):
        seen = visible(query[:, None], key[None, :], N, M, window, prefix, labels, padding, CAUSAL)
        s = gl.where(seen, s, -float("inf"))
    m_new = gl.maximum(m_i, gl.max(s, 1) * scale)
    # A row without any visible key so far keeps a maximum of -inf and weights exp2(-inf) = 0.
    shift = gl.where(m_new == -float("inf"), 0.0, m_new)
    weights = tl.exp2(s * scale - shift[:, None])
    alpha = tl.exp2(m_i - shift)
    return weights, alpha, m_new, l_i * alpha + gl.sum(weights, 1)


@gluon.jit
def _attend(
    q, k, v, held, k_full, v_full, empty, second_ready, lam, out, second,
    lse, low, full_low, full_high, num_steps, n0, N, M, H, batch, head, scale, window, prefix,
    labels, padding, in_runs, lam_b, lam_n, lam_h,
    which: gl.constexpr, CAUSAL: gl.constexpr, C: gl.constexpr, E: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup, the first or second by `which`: compute one map. The second map's output is
    written to global memory, and the warpgroup of the first map subtracts it. If there is a single
    map, `second` is None, and each warpgroup has its own queries."""
    dtype: gl.constexpr = q.dtype
    BLOCK_D: gl.constexpr = q.shape[-1]
    BLOCK_E: gl.constexpr = v.shape[-1]
    KEYS: gl.constexpr = v.shape[2]
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_E, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    if second is None:
        n0 += which * BLOCK
    query = n0 + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, scores))
    first = query
    if in_runs:
        first = first_keys(query, N, window, labels)
    m_i = gl.full([BLOCK], -float("inf"), gl.float32, gl.SliceLayout(1, scores))
    l_i = gl.full([BLOCK], 0.0, gl.float32, gl.SliceLayout(1, scores))
    acc = gl.zeros([BLOCK, BLOCK_E], gl.float32, wide)
    nothing = gl.zeros([BLOCK, KEYS], gl.float32, scores)

    mbarrier.wait(held, 0)
    q_tile = q.index(which).reshape([BLOCK, BLOCK_D])
    kc: gl.constexpr = which if C == 2 else 0
    if num_steps > 0:
        mbarrier.wait(k_full.index(0), 0)
        k_tile = k.index(kc).reshape([KEYS, BLOCK_D])
        s = warpgroup_mma(q_tile, k_tile.permute((1, 0)), nothing, use_acc=False)
        masked = (low < full_low) | (low + KEYS > full_high)
        weights, alpha, m_i, l_i = _softmax(
            s, m_i, l_i, masked, low, query, N, M, scale, window, prefix, labels, padding,
            in_runs, first, CAUSAL,
        )  # fmt: skip
        weights = gl.convert_layout(weights.to(dtype), operand)
        for step in range(num_steps - 1):
            stage, later = step % STAGES, (step + 1) % STAGES
            mbarrier.wait(k_full.index(later), (step + 1) // STAGES % 2)
            k_next = k.index(C * later + kc).reshape([KEYS, BLOCK_D])
            s_next = warpgroup_mma(
                q_tile, k_next.permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            mbarrier.wait(v_full.index(stage), step // STAGES % 2)
            v_tile = v.index(stage).reshape([KEYS, BLOCK_E])
            acc_next = warpgroup_mma(weights, v_tile, acc, is_async=True)
            s_next = warpgroup_mma_wait(1, deps=[s_next])
            m0 = low + (step + 1) * KEYS
            masked = (m0 < full_low) | (m0 + KEYS > full_high)
            later_weights, alpha, m_i, l_i = _softmax(
                s_next, m_i, l_i, masked, m0, query, N, M, scale, window, prefix, labels,
                padding, in_runs, first, CAUSAL,
            )  # fmt: skip
            acc = warpgroup_mma_wait(0, deps=[acc_next])
            mbarrier.arrive(empty.index(stage), count=1)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, wide))[:, None]
            weights = gl.convert_layout(later_weights.to(dtype), operand)
        last = (num_steps - 1) % STAGES
        mbarrier.wait(v_full.index(last), (num_steps - 1) // STAGES % 2)
        v_last = v.index(last).reshape([KEYS, BLOCK_E])
        acc = warpgroup_mma(weights, v_last, acc)

    safe = gl.where(l_i == 0.0, 1.0, l_i)
    if second is None:
        lse += (batch.to(gl.int64) * H + head) * N + query
    else:
        lse += (batch.to(gl.int64) * H + head) * 2 * N + which * N + query
    gl.store(lse, gl.where(l_i == 0.0, float("inf"), m_i + tl.log2(safe)), mask=query < N)
    mean = acc / gl.convert_layout(safe, gl.SliceLayout(1, wide))[:, None]
    rows = n0 + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, wide))
    width = gl.arange(0, BLOCK_E, layout=gl.SliceLayout(0, wide))
    place = ((batch.to(gl.int64) * N + rows[:, None]) * H + head) * E + width[None, :]
    mask = (rows[:, None] < N) & (width[None, :] < E)
    if second is None:
        gl.store(out + place, mean.to(dtype), mask=mask)
    elif which == 1:
        gl.store(second + place, mean.to(dtype), mask=mask)
        gl.thread_barrier()
        mbarrier.arrive(second_ready, count=1)
    else:
        lam += batch.to(gl.int64) * lam_b + rows.to(gl.int64) * lam_n
        lam += head.to(gl.int64) * lam_h
        weight = gl.load(lam, mask=rows < N, other=0.0)
        mbarrier.wait(second_ready, 0)
        mean2 = gl.load(second + place, mask=mask, other=0.0).to(gl.float32)
        gl.store(out + place, (mean - weight[:, None] * mean2).to(dtype), mask=mask)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    q_desc, k_desc, v_desc, lam, out, second, lse, window, prefix, labels, padding, ranges,
    N, M, H, heads_per_group, lam_b, lam_n, lam_h, scale,
    CAUSAL: gl.constexpr, C: gl.constexpr, E: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_E: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    # A program has one tile of queries per warpgroup or, of two maps, one for both.
    QUERIES: gl.constexpr = 2 * BLOCK if second is None else BLOCK
    tile, num_tiles = gl.program_id(0), gl.num_programs(0)
    # The last causal tiles take the longest, so they start first and short ones fill the end.
    if CAUSAL:
        tile = num_tiles - 1 - tile
    n0 = tile * QUERIES
    batch, head = gl.program_id(1) // H, gl.program_id(1) % H
    group = head // heads_per_group
    if prefix is not None:
        prefix += batch
    if labels is not None:
        labels += batch.to(gl.int64) * (N + M)
    if padding is not None:
        padding += batch.to(gl.int64) * M
    if ranges is not None:
        ranges += (batch * num_tiles + tile) * NUM_RANGE
    low, full_low, full_high, high = key_bounds(
        n0, N, M, window, prefix, ranges, CAUSAL, QUERIES, KEYS
    )
    num_steps = tl.cdiv(tl.maximum(high - low, 0), KEYS)
    if CAUSAL and labels is not None and prefix is None:
        in_runs = gl.load(ranges + 4) != 0
    else:
        in_runs: gl.constexpr = False  # type: ignore[no-redef]

    dtype: gl.constexpr = q_desc.dtype
    q = gl.allocate_shared_memory(dtype, [2, 1, BLOCK, 1, 1, BLOCK_D], q_desc.layout)
    k = gl.allocate_shared_memory(dtype, [C * STAGES, 1, KEYS, 1, 1, BLOCK_D], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, 1, KEYS, 1, BLOCK_E], v_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for bar in gl.static_range(2):
        mbarrier.init(bars.index(bar), count=1)
    for bar in gl.static_range(STAGES):
        mbarrier.init(k_full.index(bar), count=1)
        mbarrier.init(v_full.index(bar), count=1)
        mbarrier.init(empty.index(bar), count=2)
    held = bars.index(0)
    mbarrier.expect(held, 2 * q_desc.block_type.nbytes)
    for which in gl.static_range(2):
        if second is None:
            first, component = n0 + which * BLOCK, 0
        else:
            first, component = n0, which
        tma.async_copy_global_to_shared(
            q_desc, [batch, first, head, component, 0], held, q.index(which)
        )

    # fmt: off
    gl.warp_specialize(
        [
            (_attend, (
                q, k, v, held, k_full, v_full, empty, bars.index(1), lam, out, second, lse, low,
                full_low, full_high, num_steps, n0, N, M, H, batch, head, scale, window, prefix,
                labels, padding, in_runs, lam_b, lam_n, lam_h, gl.constexpr(0), CAUSAL, C,
                E, STAGES,
            )),
            (_attend, (
                q, k, v, held, k_full, v_full, empty, bars.index(1), lam, out, second, lse, low,
                full_low, full_high, num_steps, n0, N, M, H, batch, head, scale, window, prefix,
                labels, padding, in_runs, lam_b, lam_n, lam_h, gl.constexpr(1), CAUSAL, C,
                E, STAGES,
            )),
            (_load_keys, (
                k_desc, v_desc, k, v, k_full, v_full, empty, batch, group, low, num_steps, C,
                STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )
    # fmt: on


def keys_and_stages(block_d: int, block_e: int, components: int) -> tuple[int, int]:
    """Keys per step, and the number of such tiles that fit into shared memory in addition to the
    queries, at two bytes per element."""
    # Larger tiles of keys read each query less often; wide values leave no registers for them.
    keys = 2 * BLOCK.value if block_e <= 128 else BLOCK.value
    left = SHARED_BYTES - 2 * 2 * BLOCK.value * block_d
    return keys, min(3, left // (2 * keys * (components * block_d + block_e)))


def forward(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor | None, mask: KernelMask, scale: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute `out` and the second map's output, `[B, N, H, E]`, and the log-sum-exps of all maps,
    `[B, H, 1 or 2, N]`, in units of log2, for inputs that `hopper.serves_forward` accepts. Without
    `lam`, queries `[B, N, H, 1, D]` have one map."""
    (B, N, H, num_maps, D), (_, M, G, C, _), E = q.shape, k.shape, v.shape[-1]
    block, block_d, block_e = BLOCK.value, pad(D), pad(E)
    keys, stages = keys_and_stages(block_d, block_e, C)
    out = q.new_empty(B, N, H, E)
    second = None if lam is None else q.new_empty(B, N, H, E)
    lse = q.new_empty(B, H, num_maps, N, dtype=torch.float32)
    queries = block if num_maps == 2 else 2 * block
    _forward_kernel[(cdiv(N, queries), B * H)](
        gluon_describe(q, [1, block, 1, 1, block_d]), gluon_describe(k, [1, keys, 1, 1, block_d]),
        gluon_describe(v, [1, keys, 1, block_e]), lam, out, second, lse, mask.window, mask.prefix,
        mask.labels, mask.padding, mask.key_ranges(B, N, M, queries), N, M, H, H // G,
        *strides_of(lam), scale * 1.4426950408889634, CAUSAL=mask.causal, C=C, E=E, BLOCK_D=block_d,
        BLOCK_E=block_e, KEYS=keys, STAGES=stages, num_warps=4,
    )  # fmt: skip
    return out, second, lse
