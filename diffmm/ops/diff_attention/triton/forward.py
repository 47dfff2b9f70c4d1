"""The forward kernel: one or two online softmaxes in one loop over the keys.

A program holds a tile of one head's queries. `COMPONENTS` selects what it computes: the `"single"`
map of softmax attention; `"both"` maps and their difference, with one accumulator each; or, if two
accumulators of wide values do not fit into the registers, only the `"second"` map in a first launch
and then the `"first"`, which subtracts the second. The number of operations is the same: the two
normalizers are known only at the end, so each map needs its own product with the values.

Scores are in units of log2, so that every exponential is a plain `exp2`. `m_i`, `l_i` and `alpha`
are the running maximum, the running sum and the rescaling factor of the online softmax.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmm.ops.diff_attention.triton.masking import (
    NUM_RANGE,
    KernelMask,
    first_keys,
    key_bounds,
    visible,
)
from diffmm.ops.diff_attention.triton.tiles import (
    UNSPECIALIZED,
    Tile,
    cdiv,
    describe,
    pad,
    precision,
    strides_of,
)


@triton.jit
def _softmax_step(scores, values, acc, m_i, l_i, scale, seen, PRECISION: tl.constexpr):
    """Add one tile of keys to an online softmax; `seen` is None if the tile needs no mask."""
    if seen is not None:
        scores = tl.where(seen, scores, -float("inf"))
    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
    # A row without any visible key so far keeps a maximum of -inf and weights exp2(-inf) = 0.
    shift = tl.where(m_new == -float("inf"), 0.0, m_new) if seen is not None else m_new
    weights = tl.exp2(scores * scale - shift[:, None])
    alpha = tl.exp2(m_i - shift)
    l_i = l_i * alpha + tl.sum(weights, 1)
    acc = acc * alpha[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, m_new, l_i


@triton.jit
def _finish(acc, m_i, l_i):
    """The weighted mean and the log-sum-exp; zeros and +inf for a row without any visible key."""
    safe = tl.where(l_i == 0.0, 1.0, l_i)
    lse = tl.where(l_i == 0.0, float("inf"), m_i + tl.log2(safe))
    return acc / safe[:, None], lse


@triton.jit
def _step(
    q1, q2, k_desc, v_desc, batch, group, m0, queries, N, M, scale,
    acc1, m_i1, l_i1, acc2, m_i2, l_i2, window, prefix, labels, padding, first,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, COMPONENTS: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    HAS_SECOND: tl.constexpr = COMPONENTS == "both" or COMPONENTS == "second"
    seen = None
    keys = m0 + tl.arange(0, BLOCK_M)
    if MASKED == "runs":
        seen = (keys[None, :] >= first[:, None]) & (keys[None, :] <= queries[:, None])
    elif MASKED == "exactly":
        seen = visible(
            queries[:, None], keys[None, :], N, M, window, prefix, labels, padding, CAUSAL
        )
    if COMPONENTS != "second":
        k1 = k_desc.load([batch, m0, group, 0, 0]).reshape(BLOCK_M, BLOCK_D)
        s1 = tl.dot(q1, k1.T, input_precision=PRECISION)
    if HAS_SECOND:
        if C == 2 or COMPONENTS == "second":
            k2 = k_desc.load([batch, m0, group, C - 1, 0]).reshape(BLOCK_M, BLOCK_D)
        else:
            k2 = k1
        s2 = tl.dot(q2, k2.T, input_precision=PRECISION)
    v = v_desc.load([batch, m0, group, 0]).reshape(BLOCK_M, BLOCK_E)
    if COMPONENTS != "second":
        acc1, m_i1, l_i1 = _softmax_step(s1, v, acc1, m_i1, l_i1, scale, seen, PRECISION)
    if HAS_SECOND:
        acc2, m_i2, l_i2 = _softmax_step(s2, v, acc2, m_i2, l_i2, scale, seen, PRECISION)
    return acc1, m_i1, l_i1, acc2, m_i2, l_i2


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    q, k_desc, v_desc, lam, out, second, lse, window, prefix, labels, padding, ranges,
    q_b, q_n, q_h, q_c, lam_b, lam_n, lam_h, N, M, H, heads_per_group, scale,
    CAUSAL: tl.constexpr, COMPONENTS: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, num_tiles = tl.program_id(0), tl.num_programs(0)
    # The last causal tiles take the longest, so they start first and short ones fill the end.
    ranges_tile = num_tiles - 1 - tile if CAUSAL else tile
    n0 = ranges_tile * BLOCK_N
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    group = head // heads_per_group
    batch64, head64 = batch.to(tl.int64), head.to(tl.int64)  # offsets may exceed 32 bits
    if prefix is not None:
        prefix += batch
    if labels is not None:
        labels += batch64 * (N + M)
    if padding is not None:
        padding += batch64 * M
    if ranges is not None:
        ranges += (batch64 * num_tiles + ranges_tile) * NUM_RANGE

    queries = n0 + tl.arange(0, BLOCK_N)
    inside = queries < N
    dims, widths = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q += batch64 * q_b + head64 * q_h
    q_rows = q + queries[:, None].to(tl.int64) * q_n + dims[None, :]
    q_mask = inside[:, None] & (dims[None, :] < D)
    q1 = tl.load(q_rows, mask=q_mask, other=0.0)
    HAS_SECOND: tl.constexpr = COMPONENTS == "both" or COMPONENTS == "second"
    q2 = tl.load(q_rows + q_c, mask=q_mask, other=0.0) if HAS_SECOND else q1

    acc1 = tl.zeros((BLOCK_N, BLOCK_E), tl.float32) if COMPONENTS != "second" else 0.0
    m_i1 = tl.full((BLOCK_N,), -float("inf"), tl.float32) if COMPONENTS != "second" else 0.0
    l_i1 = tl.zeros((BLOCK_N,), tl.float32) if COMPONENTS != "second" else 0.0
    acc2 = tl.zeros((BLOCK_N, BLOCK_E), tl.float32) if HAS_SECOND else 0.0
    m_i2 = tl.full((BLOCK_N,), -float("inf"), tl.float32) if HAS_SECOND else 0.0
    l_i2 = tl.zeros((BLOCK_N,), tl.float32) if HAS_SECOND else 0.0

    low, full_low, full_high, high = key_bounds(
        n0, N, M, window, prefix, ranges, CAUSAL, BLOCK_N, BLOCK_M
    )
    for m0 in range(full_low, full_high, BLOCK_M):
        acc1, m_i1, l_i1, acc2, m_i2, l_i2 = _step(
            q1, q2, k_desc, v_desc, batch, group, m0, queries, N, M, scale,
            acc1, m_i1, l_i1, acc2, m_i2, l_i2, window, prefix, labels, padding, 0,
            CAUSAL, "not", COMPONENTS, C, BLOCK_M, BLOCK_D, BLOCK_E, PRECISION,
        )  # fmt: skip
    num_left = (full_low - low) // BLOCK_M
    num_masked = num_left + tl.cdiv(tl.maximum(high - full_high, 0), BLOCK_M)
    num_in_runs = 0
    if CAUSAL and labels is not None and prefix is None:
        num_in_runs = tl.where(tl.load(ranges + 4) != 0, num_masked, 0)
        first = first_keys(queries, N, window, labels)
        for step in range(0, num_in_runs):
            left, right = low + step * BLOCK_M, full_high + (step - num_left) * BLOCK_M
            m0 = tl.where(step < num_left, left, right)
            acc1, m_i1, l_i1, acc2, m_i2, l_i2 = _step(
                q1, q2, k_desc, v_desc, batch, group, m0, queries, N, M, scale,
                acc1, m_i1, l_i1, acc2, m_i2, l_i2, window, prefix, labels, padding, first,
                CAUSAL, "runs", COMPONENTS, C, BLOCK_M, BLOCK_D, BLOCK_E, PRECISION,
            )  # fmt: skip
    for step in range(num_in_runs, num_masked):
        left, right = low + step * BLOCK_M, full_high + (step - num_left) * BLOCK_M
        m0 = tl.where(step < num_left, left, right)
        acc1, m_i1, l_i1, acc2, m_i2, l_i2 = _step(
            q1, q2, k_desc, v_desc, batch, group, m0, queries, N, M, scale,
            acc1, m_i1, l_i1, acc2, m_i2, l_i2, window, prefix, labels, padding, 0,
            CAUSAL, "exactly", COMPONENTS, C, BLOCK_M, BLOCK_D, BLOCK_E, PRECISION,
        )  # fmt: skip

    o_rows = ((batch64 * N + queries[:, None]) * H + head) * E + widths[None, :]
    o_mask = inside[:, None] & (widths[None, :] < E)
    NUM_MAPS: tl.constexpr = 1 if COMPONENTS == "single" else 2
    lse += (batch64 * H + head) * NUM_MAPS * N + queries
    if COMPONENTS == "first":
        mean2 = tl.load(second + o_rows, mask=o_mask, other=0.0).to(tl.float32)
    if HAS_SECOND:
        mean2, lse2 = _finish(acc2, m_i2, l_i2)
        tl.store(lse + N, lse2, mask=inside)
        if second is not None:
            tl.store(second + o_rows, mean2.to(second.dtype.element_ty), mask=o_mask)
    if COMPONENTS != "second":
        mean1, lse1 = _finish(acc1, m_i1, l_i1)
        tl.store(lse, lse1, mask=inside)
        if COMPONENTS != "single":
            lam_rows = lam + batch64 * lam_b + queries.to(tl.int64) * lam_n + head64 * lam_h
            weight = tl.load(lam_rows, mask=inside, other=0.0)
            mean1 = mean1 - weight[:, None] * mean2
        tl.store(out + o_rows, mean1.to(out.dtype.element_ty), mask=o_mask)


def forward(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor | None, mask: KernelMask, scale: float,
    *, keep_second: bool, tile: Tile,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Compute `out`, `[B, N, H, E]`; the second map's output, of the same shape, if it is kept or
    needed; and the log-sum-exps of all maps, `[B, H, 1 or 2, N]`, in units of log2. `scale` must be
    positive. Without `lam`, queries `[B, N, H, 1, D]` have one map."""
    (B, N, H, num_maps, D), (_, M, G, C, _), E = q.shape, k.shape, v.shape[-1]
    block_d, block_e = pad(D), pad(E)
    out = q.new_empty(B, N, H, E)
    has_second = num_maps == 2 and (keep_second or tile.split)
    second = q.new_empty(B, N, H, E) if has_second else None
    lse = q.new_empty(B, H, num_maps, N, dtype=torch.float32)
    ranges = mask.key_ranges(B, N, M, tile.block_n)
    has_short_loops = lam is None and (mask.window is not None or mask.labels is not None)
    launches = ("second", "first") if tile.split else ("both",)
    for components in launches if lam is not None else ("single",):
        _forward_kernel[(cdiv(N, tile.block_n), B * H)](
            q, describe(k, [1, tile.block_m, 1, 1, block_d]),
            describe(v, [1, tile.block_m, 1, block_e]), lam, out, second, lse,
            mask.window, mask.prefix, mask.labels, mask.padding, ranges,
            *q.stride()[:4], *strides_of(lam), N, M, H, H // G, scale * 1.4426950408889634,
            CAUSAL=mask.causal, COMPONENTS=components, C=C, D=D, E=E,
            BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, BLOCK_D=block_d, BLOCK_E=block_e,
            PRECISION=precision(q.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
            maxnreg=tile.one_map_registers if has_short_loops else None,
        )  # fmt: skip
    return out, second, lse
