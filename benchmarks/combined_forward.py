"""An alternative forward pass, which `python -m benchmarks.attention_tiles` times together with the
kernels that the library uses.

A first loop over the keys computes the normalizers of both maps; a second computes `P1 - lam P2`
and multiplies it by the values once. This needs one accumulator and one value product instead of
two, but computes scores and exponentials twice. It does not produce the second output, which the
backward pass needs for the gradient of lambda.
"""

import triton
import triton.language as tl
from torch import Tensor

from diffmm.ops.diff_attention.triton.masking import key_bounds, visible
from diffmm.ops.diff_attention.triton.tiles import UNSPECIALIZED, Tile, cdiv, describe, pad


@triton.jit
def _scores(
    q1, q2, k_desc, batch, group, m0, queries, N, M, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The scores of both maps for a tile of keys, in units of log2."""
    k1 = k_desc.load([batch, m0, group, 0, 0]).reshape(BLOCK_M, BLOCK_D)
    if C == 2:
        k2 = k_desc.load([batch, m0, group, 1, 0]).reshape(BLOCK_M, BLOCK_D)
    else:
        k2 = k1
    s1, s2 = tl.dot(q1, k1.T) * scale, tl.dot(q2, k2.T) * scale
    if MASKED:
        keys = m0 + tl.arange(0, BLOCK_M)
        seen = visible(queries[:, None], keys[None, :], N, M, None, None, None, None, CAUSAL)
        s1, s2 = tl.where(seen, s1, -float("inf")), tl.where(seen, s2, -float("inf"))
    return s1, s2


@triton.jit
def _normalize(scores, top, total):
    """Update the running maximum and the running sum of each row with a tile of scores."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
    return new_top, total


@triton.jit
def _find_normalizers(
    low, high, q1, q2, k_desc, batch, group, queries, N, M, scale, top1, total1, top2, total2,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The first loop, over a range of keys."""
    for m0 in range(low, high, BLOCK_M):
        s1, s2 = _scores(
            q1, q2, k_desc, batch, group, m0, queries, N, M, scale, CAUSAL, MASKED, C, BLOCK_M,
            BLOCK_D,
        )  # fmt: skip
        top1, total1 = _normalize(s1, top1, total1)
        top2, total2 = _normalize(s2, top2, total2)
    return top1, total1, top2, total2


@triton.jit
def _add_values(
    low, high, q1, q2, k_desc, v_desc, batch, group, queries, N, M, scale, lse1, lse2, weight, acc,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The second loop, over a range of keys."""
    for m0 in range(low, high, BLOCK_M):
        s1, s2 = _scores(
            q1, q2, k_desc, batch, group, m0, queries, N, M, scale, CAUSAL, MASKED, C, BLOCK_M,
            BLOCK_D,
        )  # fmt: skip
        p = tl.exp2(s1 - lse1[:, None]) - weight[:, None] * tl.exp2(s2 - lse2[:, None])
        v = v_desc.load([batch, m0, group, 0]).reshape(BLOCK_M, BLOCK_E)
        acc = tl.dot(p.to(v.dtype), v, acc)
    return acc


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _combined_kernel(
    q, k_desc, v_desc, lam, out, q_b, q_n, q_h, q_c, lam_b, lam_n, lam_h,
    N, M, H, heads_per_group, scale,
    CAUSAL: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    n0 = tile * BLOCK_N
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    group, batch64 = head // heads_per_group, batch.to(tl.int64)
    queries = n0 + tl.arange(0, BLOCK_N)
    inside = queries < N
    dims, widths = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q_rows = q + batch64 * q_b + head * q_h + queries[:, None].to(tl.int64) * q_n + dims[None, :]
    q_mask = inside[:, None] & (dims[None, :] < D)
    q1 = tl.load(q_rows, mask=q_mask, other=0.0)
    q2 = tl.load(q_rows + q_c, mask=q_mask, other=0.0)
    _, _, full, high = key_bounds(n0, N, M, None, None, None, CAUSAL, BLOCK_N, BLOCK_M)

    top1 = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    top2, total1 = top1, tl.zeros((BLOCK_N,), tl.float32)
    total2 = total1
    top1, total1, top2, total2 = _find_normalizers(
        0, full, q1, q2, k_desc, batch, group, queries, N, M, scale, top1, total1, top2, total2,
        CAUSAL, False, C, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    top1, total1, top2, total2 = _find_normalizers(
        full, high, q1, q2, k_desc, batch, group, queries, N, M, scale, top1, total1, top2, total2,
        CAUSAL, True, C, BLOCK_M, BLOCK_D,
    )  # fmt: skip

    # A row without visible keys gets weights of exp2(-inf).
    lse1 = tl.where(total1 == 0.0, float("inf"), top1 + tl.log2(total1))
    lse2 = tl.where(total2 == 0.0, float("inf"), top2 + tl.log2(total2))
    lam_rows = lam + batch64 * lam_b + queries.to(tl.int64) * lam_n + head * lam_h
    weight = tl.load(lam_rows, mask=inside, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    acc = _add_values(
        0, full, q1, q2, k_desc, v_desc, batch, group, queries, N, M, scale, lse1, lse2, weight,
        acc, CAUSAL, False, C, BLOCK_M, BLOCK_D, BLOCK_E,
    )  # fmt: skip
    acc = _add_values(
        full, high, q1, q2, k_desc, v_desc, batch, group, queries, N, M, scale, lse1, lse2, weight,
        acc, CAUSAL, True, C, BLOCK_M, BLOCK_D, BLOCK_E,
    )  # fmt: skip

    o_rows = ((batch64 * N + queries[:, None]) * H + head) * E + widths[None, :]
    o_mask = inside[:, None] & (widths[None, :] < E)
    tl.store(out + o_rows, acc.to(out.dtype.element_ty), mask=o_mask)


def combined_forward(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, *, causal: bool, scale: float, tile: Tile
) -> Tensor:
    """Compute `[B, N, H, E]` outputs for a full or causal mask and contiguous 16-bit inputs."""
    (B, N, H, _, D), (_, M, G, C, _), E = q.shape, k.shape, v.shape[-1]
    block_d, block_e = pad(D), pad(E)
    out = q.new_empty(B, N, H, E)
    _combined_kernel[(cdiv(N, tile.block_n), B * H)](
        q, describe(k, [1, tile.block_m, 1, 1, block_d]),
        describe(v, [1, tile.block_m, 1, block_e]), lam, out, *q.stride()[:4],
        *lam.stride(), N, M, H, H // G, scale * 1.4426950408889634,
        CAUSAL=causal, C=C, D=D, E=E, BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, BLOCK_D=block_d,
        BLOCK_E=block_e, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out
