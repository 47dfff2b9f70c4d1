"""The backward kernels. With `lse` saved, `P = P1 - lam P2` can be computed directly, so

    dV = Pᵀ dO,   dP = dO Vᵀ,   dlam = -delta2,
    dS1 = P1 * (dP - delta1),   dS2 = -lam P2 * (dP - delta2),   delta_i = rowsum(P_i * dP) = dO·O_i

need one product each where two softmax attentions need two. `delta1 = dO·O + lam delta2`.

A program of the key kernel holds a tile of keys and loops over the queries of every head of its
group; a program of the query kernel holds a tile of queries and loops over the keys. Scores and dP
are therefore computed twice, but nothing is summed across programs, so gradients are bit-identical
in every run. A single kernel that accumulates dQ in memory was slower (docs/lab_notes.md). Hopper
GPUs have separate kernels (see `hopper`).
"""

import triton
import triton.language as tl
from torch import Tensor

from diffmm.ops.diff_attention.triton import hopper
from diffmm.ops.diff_attention.triton.masking import (
    NUM_RANGE,
    KernelMask,
    key_bounds,
    query_bounds,
    visible,
)
from diffmm.ops.diff_attention.triton.rows import (
    DELTA1,
    DELTA2,
    LSE1,
    LSE2,
    NUM_ROWS,
    WEIGHT,
    query_rows,
)
from diffmm.ops.diff_attention.triton.tiles import (
    UNSPECIALIZED,
    Tile,
    Tiles,
    cdiv,
    describable,
    describe,
    pad,
    precision,
)


@triton.jit
def _key_step(
    q_desc, g_desc, k1, k2, v, rows, dk1, dk2, dv, batch, head, n0, keys, N, M, P, scale,
    window, prefix, labels, padding,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, NUM_MAPS: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to the gradients of a tile of keys. Score tiles are `[M, N]`."""
    n = n0 + tl.arange(0, BLOCK_N)
    rows += n
    q1 = q_desc.load([batch, n0, head, 0, 0]).reshape(BLOCK_N, BLOCK_D)
    s1 = tl.dot(k1, q1.T, input_precision=PRECISION)
    p1 = tl.exp2(s1 * scale - tl.load(rows + LSE1 * P)[None, :])
    if NUM_MAPS == 2:
        q2 = q_desc.load([batch, n0, head, 1, 0]).reshape(BLOCK_N, BLOCK_D)
        s2 = tl.dot(k2, q2.T, input_precision=PRECISION)
        p2 = tl.exp2(s2 * scale - tl.load(rows + LSE2 * P)[None, :])
    if MASKED:
        seen = visible(n[None, :], keys[:, None], N, M, window, prefix, labels, padding, CAUSAL)
        p1 = tl.where(seen, p1, 0.0)
        if NUM_MAPS == 2:
            p2 = tl.where(seen, p2, 0.0)
    p = p1
    if NUM_MAPS == 2:
        p2 = p2 * tl.load(rows + WEIGHT * P)[None, :]
        p = p1 + p2
    g = g_desc.load([batch, n0, head, 0]).reshape(BLOCK_N, BLOCK_E)
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
    dp = tl.dot(v, g.T, input_precision=PRECISION)
    ds1 = (p1 * (dp - tl.load(rows + DELTA1 * P)[None, :])).to(g.dtype)
    dk1 = tl.dot(ds1, q1, dk1, input_precision=PRECISION)
    if NUM_MAPS == 2:
        ds2 = (p2 * (dp - tl.load(rows + DELTA2 * P)[None, :])).to(g.dtype)
        if C == 2:
            dk2 = tl.dot(ds2, q2, dk2, input_precision=PRECISION)
        else:
            dk1 = tl.dot(ds2, q2, dk1, input_precision=PRECISION)
    return dk1, dk2, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _key_kernel(
    q_desc, g_desc, k, v, rows, dk, dv, window, prefix, labels, padding, ranges,
    k_b, k_m, k_g, k_c, v_b, v_m, v_g, N, M, P, H, heads_per_group, scale,
    CAUSAL: tl.constexpr, NUM_MAPS: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, num_tiles = tl.program_id(0), tl.num_programs(0)
    m0 = tile * BLOCK_M
    G = H // heads_per_group
    batch, group = tl.program_id(1) // G, tl.program_id(1) % G
    batch64, group64 = batch.to(tl.int64), group.to(tl.int64)
    if prefix is not None:
        prefix += batch
    if labels is not None:
        labels += batch64 * (N + M)
    if padding is not None:
        padding += batch64 * M
    if ranges is not None:
        ranges += (batch64 * num_tiles + tile) * NUM_RANGE

    keys = m0 + tl.arange(0, BLOCK_M)
    dims, widths = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    k_mask = (keys[:, None] < M) & (dims[None, :] < D)
    v_mask = (keys[:, None] < M) & (widths[None, :] < E)
    far_keys = keys[:, None].to(tl.int64)
    k_rows = k + batch64 * k_b + far_keys * k_m + group64 * k_g + dims[None, :]
    k1 = tl.load(k_rows, mask=k_mask, other=0.0)
    k2 = tl.load(k_rows + k_c, mask=k_mask, other=0.0) if C == 2 else k1
    v_rows = v + batch64 * v_b + far_keys * v_m + group64 * v_g + widths[None, :]
    v_tile = tl.load(v_rows, mask=v_mask, other=0.0)

    dk1 = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dk2 = tl.zeros((BLOCK_M, BLOCK_D), tl.float32) if C == 2 else 0.0
    dv_tile = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    low, full_low, full_high, high = query_bounds(
        m0, N, M, window, prefix, ranges, CAUSAL, BLOCK_N, BLOCK_M
    )
    num_left = (full_low - low) // BLOCK_N
    num_right = tl.cdiv(tl.maximum(high - full_high, 0), BLOCK_N)
    for head in range(group * heads_per_group, (group + 1) * heads_per_group):
        head_rows = rows + (batch64 * H + head) * NUM_ROWS * P
        for step in range(0, num_left + num_right):
            left, right = low + step * BLOCK_N, full_high + (step - num_left) * BLOCK_N
            n0 = tl.where(step < num_left, left, right)
            dk1, dk2, dv_tile = _key_step(
                q_desc, g_desc, k1, k2, v_tile, head_rows, dk1, dk2, dv_tile,
                batch, head, n0, keys, N, M, P, scale,
                window, prefix, labels, padding,
                CAUSAL, True, NUM_MAPS, C, BLOCK_N, BLOCK_D, BLOCK_E, PRECISION,
            )  # fmt: skip
        for n0 in range(full_low, full_high, BLOCK_N):
            dk1, dk2, dv_tile = _key_step(
                q_desc, g_desc, k1, k2, v_tile, head_rows, dk1, dk2, dv_tile,
                batch, head, n0, keys, N, M, P, scale,
                window, prefix, labels, padding,
                CAUSAL, False, NUM_MAPS, C, BLOCK_N, BLOCK_D, BLOCK_E, PRECISION,
            )  # fmt: skip

    rate = scale * 0.6931471805599453
    dk_rows = dk + ((batch64 * M + far_keys) * G + group) * C * D + dims[None, :]
    tl.store(dk_rows, (dk1 * rate).to(dk.dtype.element_ty), mask=k_mask)
    if C == 2:
        tl.store(dk_rows + D, (dk2 * rate).to(dk.dtype.element_ty), mask=k_mask)
    dv_rows = dv + ((batch64 * M + far_keys) * G + group) * E + widths[None, :]
    tl.store(dv_rows, dv_tile, mask=v_mask)


@triton.jit
def _query_step(
    q1, q2, g, k_desc, v_desc, lse1, lse2, weight, delta1, delta2, dq1, dq2, batch, group, m0,
    queries, N, M, scale, window, prefix, labels, padding,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, NUM_MAPS: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the gradient of a tile of queries. Score tiles are `[N, M]`."""
    k1 = k_desc.load([batch, m0, group, 0, 0]).reshape(BLOCK_M, BLOCK_D)
    if C == 2:
        k2 = k_desc.load([batch, m0, group, 1, 0]).reshape(BLOCK_M, BLOCK_D)
    else:
        k2 = k1
    v = v_desc.load([batch, m0, group, 0]).reshape(BLOCK_M, BLOCK_E)
    p1 = tl.exp2(tl.dot(q1, k1.T, input_precision=PRECISION) * scale - lse1[:, None])
    if NUM_MAPS == 2:
        p2 = tl.exp2(tl.dot(q2, k2.T, input_precision=PRECISION) * scale - lse2[:, None])
    if MASKED:
        keys = m0 + tl.arange(0, BLOCK_M)
        seen = visible(
            queries[:, None], keys[None, :], N, M, window, prefix, labels, padding, CAUSAL
        )
        p1 = tl.where(seen, p1, 0.0)
        if NUM_MAPS == 2:
            p2 = tl.where(seen, p2, 0.0)
    dp = tl.dot(g, v.T, input_precision=PRECISION)
    ds1 = (p1 * (dp - delta1[:, None])).to(k1.dtype)
    dq1 = tl.dot(ds1, k1, dq1, input_precision=PRECISION)
    if NUM_MAPS == 2:
        ds2 = (p2 * weight[:, None] * (dp - delta2[:, None])).to(k1.dtype)
        dq2 = tl.dot(ds2, k2, dq2, input_precision=PRECISION)
    return dq1, dq2


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _query_kernel(
    q, grad, k_desc, v_desc, rows, dq, window, prefix, labels, padding, ranges,
    q_b, q_n, q_h, q_c, g_b, g_n, g_h, N, M, P, H, heads_per_group, scale,
    CAUSAL: tl.constexpr, NUM_MAPS: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.num_programs(0)
    tile = num_tiles - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    n0 = tile * BLOCK_N
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    group = head // heads_per_group
    batch64, head64 = batch.to(tl.int64), head.to(tl.int64)
    if prefix is not None:
        prefix += batch
    if labels is not None:
        labels += batch64 * (N + M)
    if padding is not None:
        padding += batch64 * M
    if ranges is not None:
        ranges += (batch64 * num_tiles + tile) * NUM_RANGE

    n = n0 + tl.arange(0, BLOCK_N)
    inside = n < N
    dims, widths = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q_mask = inside[:, None] & (dims[None, :] < D)
    q_rows = q + batch64 * q_b + n[:, None].to(tl.int64) * q_n + head64 * q_h + dims[None, :]
    q1 = tl.load(q_rows, mask=q_mask, other=0.0)
    q2 = tl.load(q_rows + q_c, mask=q_mask, other=0.0) if NUM_MAPS == 2 else q1
    g_rows = grad + batch64 * g_b + n[:, None].to(tl.int64) * g_n + head64 * g_h + widths[None, :]
    g = tl.load(g_rows, mask=inside[:, None] & (widths[None, :] < E), other=0.0)
    rows += (batch64 * H + head) * NUM_ROWS * P + n
    lse1, delta1 = tl.load(rows + LSE1 * P), tl.load(rows + DELTA1 * P)
    lse2, delta2, weight = lse1, delta1, lse1
    if NUM_MAPS == 2:
        lse2, delta2 = tl.load(rows + LSE2 * P), tl.load(rows + DELTA2 * P)
        weight = tl.load(rows + WEIGHT * P)

    dq1 = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dq2 = tl.zeros((BLOCK_N, BLOCK_D), tl.float32) if NUM_MAPS == 2 else 0.0
    low, full_low, full_high, high = key_bounds(
        n0, N, M, window, prefix, ranges, CAUSAL, BLOCK_N, BLOCK_M
    )
    for m0 in range(full_low, full_high, BLOCK_M):
        dq1, dq2 = _query_step(
            q1, q2, g, k_desc, v_desc, lse1, lse2, weight, delta1, delta2, dq1, dq2,
            batch, group, m0, n, N, M, scale, window, prefix, labels, padding,
            CAUSAL, False, NUM_MAPS, C, BLOCK_M, BLOCK_D, BLOCK_E, PRECISION,
        )  # fmt: skip
    num_left = (full_low - low) // BLOCK_M
    num_right = tl.cdiv(tl.maximum(high - full_high, 0), BLOCK_M)
    for step in range(0, num_left + num_right):
        left, right = low + step * BLOCK_M, full_high + (step - num_left) * BLOCK_M
        m0 = tl.where(step < num_left, left, right)
        dq1, dq2 = _query_step(
            q1, q2, g, k_desc, v_desc, lse1, lse2, weight, delta1, delta2, dq1, dq2,
            batch, group, m0, n, N, M, scale, window, prefix, labels, padding,
            CAUSAL, True, NUM_MAPS, C, BLOCK_M, BLOCK_D, BLOCK_E, PRECISION,
        )  # fmt: skip

    rate = scale * 0.6931471805599453
    dq_rows = dq + ((batch64 * N + n[:, None]) * H + head) * NUM_MAPS * D + dims[None, :]
    tl.store(dq_rows, (dq1 * rate).to(dq.dtype.element_ty), mask=q_mask)
    if NUM_MAPS == 2:
        tl.store(dq_rows + D, (dq2 * rate).to(dq.dtype.element_ty), mask=q_mask)


def key_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, mask: KernelMask, scale: float,
    *, tile: Tile,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of k and v."""
    (B, N, H, num_maps, D), (_, M, G, C, _), E = q.shape, k.shape, v.shape[-1]
    block_d, block_e = pad(D), pad(E)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    _key_kernel[(cdiv(M, tile.block_m), B * G)](
        describe(q, [1, tile.block_n, 1, 1, block_d]),
        describe(grad, [1, tile.block_n, 1, block_e]), k, v, rows, dk, dv,
        mask.window, mask.prefix, mask.labels, mask.padding,
        mask.query_ranges(B, N, M, tile.block_m),
        *k.stride()[:4], *v.stride()[:3], N, M, rows.shape[-1], H, H // G,
        scale * 1.4426950408889634,
        CAUSAL=mask.causal, NUM_MAPS=num_maps, C=C, D=D, E=E, BLOCK_N=tile.block_n,
        BLOCK_M=tile.block_m, BLOCK_D=block_d, BLOCK_E=block_e, PRECISION=precision(q.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dk, dv


def query_gradient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, mask: KernelMask, scale: float,
    *, tile: Tile,
) -> Tensor:  # fmt: skip
    """Compute the gradient of q."""
    (B, N, H, num_maps, D), (_, M, G, C, _), E = q.shape, k.shape, v.shape[-1]
    block_d, block_e = pad(D), pad(E)
    dq = q.new_empty(q.shape)
    _query_kernel[(cdiv(N, tile.block_n), B * H)](
        q, grad, describe(k, [1, tile.block_m, 1, 1, block_d]),
        describe(v, [1, tile.block_m, 1, block_e]), rows, dq,
        mask.window, mask.prefix, mask.labels, mask.padding,
        mask.key_ranges(B, N, M, tile.block_n),
        *q.stride()[:4], *grad.stride()[:3], N, M, rows.shape[-1], H, H // G,
        scale * 1.4426950408889634,
        CAUSAL=mask.causal, NUM_MAPS=num_maps, C=C, D=D, E=E, BLOCK_N=tile.block_n,
        BLOCK_M=tile.block_m, BLOCK_D=block_d, BLOCK_E=block_e, PRECISION=precision(q.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dq


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lam: Tensor | None, out: Tensor,
    second: Tensor | None, lse: Tensor, mask: KernelMask, scale: float, *, tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Compute the gradients of q, k, v and lam; without `second` and `lam`, of one map."""
    grad = describable(grad)
    rows, lam_grad = query_rows(grad, out, second, lam, lse)
    shared = (grad, q, k, v, rows, mask, scale)
    if hopper.serves_backward(q, v):
        from diffmm.ops.diff_attention.triton.hopper.backward import gradients

        return *gradients(*shared), lam_grad
    dk, dv = key_gradients(*shared, tile=tiles.key_grad)
    dq = query_gradient(*shared, tile=tiles.query_grad)
    return dq, dk, dv, lam_grad
