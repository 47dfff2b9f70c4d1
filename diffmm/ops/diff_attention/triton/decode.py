"""Decoding: few queries against many keys. Keys and values are read once for both components.

All queries of a group's heads are rows of one tile, so that a tile of keys serves them together;
where the components share a key, both components' rows are. The keys are split over programs, and
a second kernel joins what the splits found, weighted by their log-sum-exps.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from diffmm.ops.diff_attention.triton.forward import _finish, _softmax_step
from diffmm.ops.diff_attention.triton.masking import KernelMask, key_bounds, visible
from diffmm.ops.diff_attention.triton.tiles import (
    GPU,
    UNSPECIALIZED,
    cdiv,
    describe,
    pad,
    power_of_2,
    precision,
)

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
    _store(part, part_lse, acc1, top1, total1, part_mask, inside)
    if C == 2:
        part, part_lse = part + num_rows * E, part_lse + num_rows
        _store(part, part_lse, acc2, top2, total2, part_mask, inside)


@triton.jit
def _store(part, part_lse, acc, top, total, part_mask, inside):
    """The means of a split's rows, and their log-sum-exps: -inf where it saw nothing."""
    mean, lse = _finish(acc, top, total)
    tl.store(part, mean, mask=part_mask)
    tl.store(part_lse, tl.where(total == 0.0, -float("inf"), lse), mask=inside)


@triton.jit
def _add_splits(lse, values, top, total, acc):
    """Some splits of one row into its running sums."""
    new_top = tl.maximum(top, tl.max(lse, 0))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    shrink, weight = tl.exp2(top - shift), tl.exp2(lse - shift)
    acc = acc * shrink + tl.sum(values * weight[:, None], 0)
    return new_top, total * shrink + tl.sum(weight, 0), acc


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "num_splits"])
def _join_kernel(
    part, part_lse, lam, out, lam_b, lam_n, lam_h, N, G, heads_per_group, num_splits,
    E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Both maps' splits into the output of one row, for a block of its values."""
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    batch, group = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    head, query = group * heads_per_group + row // N, row % N
    first = tl.program_id(1).to(tl.int64) * num_splits * 2 * num_rows + row
    widths = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    acc1 = tl.zeros((BLOCK_E,), tl.float32)
    top1, total1 = -float("inf"), 0.0
    acc2, top2, total2 = acc1, top1, total1
    for start in range(0, num_splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        inside = split < num_splits
        rows = first + split * 2 * num_rows
        places = part + rows[:, None] * E + widths[None, :]
        mask = inside[:, None] & (widths[None, :] < E)
        lse1 = tl.load(part_lse + rows, mask=inside, other=-float("inf"))
        lse2 = tl.load(part_lse + rows + num_rows, mask=inside, other=-float("inf"))
        values1 = tl.load(places, mask=mask, other=0.0)
        values2 = tl.load(places + num_rows * E, mask=mask, other=0.0)
        top1, total1, acc1 = _add_splits(lse1, values1, top1, total1, acc1)
        top2, total2, acc2 = _add_splits(lse2, values2, top2, total2, acc2)
    weight = tl.load(lam + batch * lam_b + query * lam_n + head * lam_h)
    mean1 = acc1 / tl.where(total1 == 0.0, 1.0, total1)
    mean2 = acc2 / tl.where(total2 == 0.0, 1.0, total2)
    place = ((batch * N + query) * G * heads_per_group + head) * E
    mean = mean1 - weight * mean2
    tl.store(out + place + widths, mean.to(out.dtype.element_ty), mask=widths < E)


@dataclass(frozen=True)
class Cut:
    """How decoding cuts the keys.

    Args:
        block_m: keys in a tile.
        num_warps: warps of a program.
        num_stages: depth of the loads' pipeline.
        programs: that a multiprocessor holds at once.
    """

    block_m: int
    num_warps: int
    num_stages: int
    programs: int


def cut_for(item: int, block_r: int, components: int, block_d: int, block_e: int, gpu: GPU) -> Cut:
    """The cut for numbers of `item` bytes and tiles of `block_r` rows: keys and values come 64 KiB
    at a time, or 32 KiB where rows or an older GPU have less room, and one program a multiprocessor
    has the next ones on their way."""
    if item == 4:  # No tensor cores: small tiles, or compiling takes minutes.
        return Cut(block_m=32, num_warps=4, num_stages=1, programs=2)
    crowded = block_r > 16 or gpu.capability[0] != 9
    most = (1 << 14 if crowded else 1 << 15) // (components * block_d + block_e)
    block_m = min(max(power_of_2(most + 1) // 2, 32), 128)
    if crowded:
        return Cut(block_m, num_warps=8, num_stages=4, programs=1)
    return Cut(block_m, num_warps=4, num_stages=3, programs=1)


def num_splits_for(num_groups: int, num_tiles: int, num_places: int) -> int:
    """Into how many splits the tiles of each group go, where `num_places` programs run at once: as
    many as leave the last of them the least time after the first begins."""

    def time(num_splits: int) -> int:
        """In tiles; a program takes two more to begin and to end."""
        return cdiv(num_groups * num_splits, num_places) * (cdiv(num_tiles, num_splits) + 2)

    full = (waves * num_places // num_groups for waves in (1, 2, 3, 4))
    return min((min(max(count, 1), num_tiles) for count in full), key=time)


def decodes(N: int, H: int, G: int) -> bool:
    """Whether `N` queries of `H` heads in `G` groups are few enough for one tile."""
    return N * (H // G) <= MAX_ROWS


def decode(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, mask: KernelMask, scale: float,
    *, gpu: GPU,
) -> Tensor:  # fmt: skip
    """`[B, N, H, E]`, for inference."""
    (B, N, H, _, D), (_, M, G, C, _), E = q.shape, k.shape, v.shape[-1]
    num_rows, block_d, block_e, block_n = N * (H // G), pad(D), pad(E), power_of_2(N)
    block_r = pad(num_rows if C == 2 else 2 * num_rows)
    cut = cut_for(q.element_size(), block_r, C, block_d, block_e, gpu)
    block_m, num_tiles = cut.block_m, cdiv(M, cut.block_m)
    num_splits = num_splits_for(B * G, num_tiles, cut.programs * gpu.num_multiprocessors)
    chunk = cdiv(num_tiles, num_splits) * block_m
    num_splits = cdiv(M, chunk)
    part = lam.new_empty(B, G, num_splits, 2 * num_rows, E)
    part_lse = lam.new_empty(B, G, num_splits, 2 * num_rows)
    out = q.new_empty(B, N, H, E)
    _split_kernel[(num_splits, B * G)](
        q, describe(k, [1, block_m, 1, 1, block_d]), describe(v, [1, block_m, 1, block_e]),
        part, part_lse, mask.window, mask.prefix, mask.documents, mask.padding,
        mask.key_ranges(B, N, M, block_n), *q.stride()[:4], N, M, G, H // G, chunk,
        scale * 1.4426950408889634,
        CAUSAL=mask.causal, C=C, D=D, E=E, BLOCK_R=block_r, BLOCK_M=block_m, BLOCK_D=block_d,
        BLOCK_E=block_e, BLOCK_N=block_n, PRECISION=precision(q.dtype),
        num_warps=cut.num_warps, num_stages=cut.num_stages,
    )  # fmt: skip
    width = min(block_e, 32)
    _join_kernel[(num_rows, B * G, cdiv(E, width))](
        part, part_lse, lam, out, *lam.stride(), N, G, H // G, num_splits,
        E=E, BLOCK_S=min(128, power_of_2(num_splits)), BLOCK_E=width, num_warps=4,
    )  # fmt: skip
    return out
