"""Decoding: few queries against many keys. Keys and values are read once for both components.

All queries of a group's heads are rows of one tile, so that a tile of keys serves them together;
where the components share a key, both components' rows are. The keys are split over programs, and
a second kernel joins what the splits found, weighted by their log-sum-exps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmm.ops.diff_attention.triton.forward import _finish, _softmax_step
from diffmm.ops.diff_attention.triton.masking import KernelMask, key_bounds, visible
from diffmm.ops.diff_attention.triton.tiles import UNSPECIALIZED, describe, pad, precision

# Rows of one component that the tile holds at most: queries times heads of a group.
MAX_ROWS = 64


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "chunk"])
def _split_kernel(
    q, k_desc, v_desc, part, part_lse, window, prefix, documents, padding, ranges,
    q_b, q_n, q_h, q_c, N, M, G, heads_per_group, chunk, scale,
    CAUSAL: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split, num_splits = tl.program_id(0), tl.num_programs(0)
    batch, group = tl.program_id(1) // G, tl.program_id(1) % G
    batch64 = batch.to(tl.int64)
    if prefix is not None:
        prefix += batch
    if documents is not None:
        documents += batch64 * M
    if padding is not None:
        padding += batch64 * M
    if ranges is not None:
        ranges += batch * 2

    # Row (component, head, query); with a key for each component the tile holds one component.
    num_rows = heads_per_group * N
    row = tl.arange(0, BLOCK_R)
    if C == 2:
        component1 = tl.zeros_like(row)
        inside = row < num_rows
    else:
        component1 = row // num_rows
        inside = row < 2 * num_rows
    head = group * heads_per_group + row % num_rows // N
    query = row % N
    positions = query + M - N
    dims, widths = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    places = head * q_h + component1 * q_c + query * q_n
    q_rows = q + batch64 * q_b + places[:, None] + dims[None, :]
    q_mask = inside[:, None] & (dims[None, :] < D)
    q1 = tl.load(q_rows, mask=q_mask, other=0.0)
    acc1 = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
    top1 = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    total1 = tl.zeros((BLOCK_R,), tl.float32)
    if C == 2:
        q2 = tl.load(q_rows + q_c, mask=q_mask, other=0.0)
        acc2, top2, total2 = acc1, top1, total1

    low, _, _, high = key_bounds(0, N, M, window, prefix, ranges, CAUSAL, BLOCK_N, BLOCK_M)
    low, high = tl.maximum(low, split * chunk), tl.minimum(high, (split + 1) * chunk)
    for m0 in range(low, high, BLOCK_M):
        keys = m0 + tl.arange(0, BLOCK_M)
        seen = visible(
            positions[:, None], keys[None, :], M, window, prefix, documents, padding, CAUSAL
        )
        v = v_desc.load([batch, m0, group, 0]).reshape(BLOCK_M, BLOCK_E)
        k1 = k_desc.load([batch, m0, group, 0, 0]).reshape(BLOCK_M, BLOCK_D)
        s1 = tl.dot(q1, k1.T, input_precision=PRECISION)
        acc1, top1, total1 = _softmax_step(s1, v, acc1, top1, total1, scale, seen, PRECISION)
        if C == 2:
            k2 = k_desc.load([batch, m0, group, 1, 0]).reshape(BLOCK_M, BLOCK_D)
            s2 = tl.dot(q2, k2.T, input_precision=PRECISION)
            acc2, top2, total2 = _softmax_step(s2, v, acc2, top2, total2, scale, seen, PRECISION)

    first = (tl.program_id(1) * num_splits + split) * 2 * num_rows
    part_mask = inside[:, None] & (widths[None, :] < E)
    part += (first + row).to(tl.int64)[:, None] * E + widths[None, :]
    part_lse += first + row
    mean1, lse1 = _finish(acc1, top1, total1)
    tl.store(part, mean1, mask=part_mask)
    tl.store(part_lse, lse1, mask=inside)
    if C == 2:
        mean2, lse2 = _finish(acc2, top2, total2)
        tl.store(part + num_rows * E, mean2, mask=part_mask)
        tl.store(part_lse + num_rows, lse2, mask=inside)


@triton.jit
def _joined(
    part, part_lse, num_splits, num_rows, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The splits of one row into one mean; a split that saw nothing has +inf and no weight."""
    widths = tl.arange(0, BLOCK_E)
    acc = tl.zeros((BLOCK_E,), tl.float32)
    top, total = -float("inf"), 0.0
    for first in range(0, num_splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        row = split * 2 * num_rows
        inside = split < num_splits
        lse = tl.load(part_lse + row, mask=inside, other=float("inf"))
        lse = tl.where(lse == float("inf"), -float("inf"), lse)
        new_top = tl.maximum(top, tl.max(lse, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        shrink, weight = tl.exp2(top - shift), tl.exp2(lse - shift)
        places = part + row.to(tl.int64)[:, None] * E + widths[None, :]
        values = tl.load(places, mask=inside[:, None] & (widths[None, :] < E), other=0.0)
        acc = acc * shrink + tl.sum(values * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        top = new_top
    return acc / tl.where(total == 0.0, 1.0, total)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "num_splits"])
def _join_kernel(
    part, part_lse, lam, out, lam_b, lam_n, lam_h, N, G, heads_per_group, num_splits,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    batch, group = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    head, query = group * heads_per_group + row // N, row % N
    first = tl.program_id(1).to(tl.int64) * num_splits * 2 * num_rows + row
    mean1 = _joined(part + first * E, part_lse + first, num_splits, num_rows, E, BLOCK_E, BLOCK_S)
    first += num_rows
    mean2 = _joined(part + first * E, part_lse + first, num_splits, num_rows, E, BLOCK_E, BLOCK_S)
    weight = tl.load(lam + batch * lam_b + query * lam_n + head * lam_h)
    widths = tl.arange(0, BLOCK_E)
    place = ((batch * N + query) * G * heads_per_group + head) * E
    mean = mean1 - weight * mean2
    tl.store(out + place + widths, mean.to(out.dtype.element_ty), mask=widths < E)


def decodes(N: int, H: int, G: int) -> bool:
    """Whether `N` queries of `H` heads in `G` groups are few enough for one tile."""
    return N * (H // G) <= MAX_ROWS


def decode(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, mask: KernelMask, scale: float,
    *, num_programs: int,
) -> Tensor:  # fmt: skip
    """`[B, N, H, E]`, for inference; the keys are split over about `num_programs` programs."""
    (B, N, H, _, D), (_, M, G, C, _), E = q.shape, k.shape, v.shape[-1]
    num_rows, block_m = N * (H // G), 32 if q.element_size() == 4 else 64
    num_splits = max(1, min(triton.cdiv(M, block_m), triton.cdiv(num_programs, B * G)))
    chunk = triton.cdiv(triton.cdiv(M, num_splits), block_m) * block_m
    num_splits = triton.cdiv(M, chunk)
    part = torch.empty(B, G, num_splits, 2 * num_rows, E, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(B, G, num_splits, 2 * num_rows, dtype=torch.float32, device=q.device)
    out = q.new_empty(B, N, H, E)
    block_d, block_e, block_n = pad(D), pad(E), triton.next_power_of_2(N)
    block_r = pad(num_rows if C == 2 else 2 * num_rows)
    _split_kernel[(num_splits, B * G)](
        q, describe(k, [1, block_m, 1, 1, block_d]), describe(v, [1, block_m, 1, block_e]),
        part, part_lse, mask.window, mask.prefix, mask.documents, mask.padding,
        mask.key_ranges(B, N, M, block_n), *q.stride()[:4], N, M, G, H // G, chunk,
        scale * 1.4426950408889634,
        CAUSAL=mask.causal, C=C, D=D, E=E, BLOCK_R=block_r, BLOCK_M=block_m, BLOCK_D=block_d,
        BLOCK_E=block_e, BLOCK_N=block_n, PRECISION=precision(q.dtype),
        num_warps=4 if block_r < 128 else 8, num_stages=1 if q.element_size() == 4 else 2,
    )  # fmt: skip
    _join_kernel[(num_rows, B * G)](
        part, part_lse, lam, out, *lam.stride(), N, G, H // G, num_splits,
        E=E, BLOCK_E=block_e, BLOCK_S=min(32, triton.next_power_of_2(num_splits)), num_warps=4,
    )  # fmt: skip
    return out
