"""Decoding kernels (split-KV): few queries and many keys, of differential attention (two maps) and
of softmax attention (one map). Keys and values are read once for all maps.

All queries of a group's heads are rows of one tile, so that they share each tile of keys; if the
components share a key, the rows of all components do. The key tiles of all samples and groups form
one sequence, of which each program processes an equal part, so that the work is balanced for every
batch size and context length. If a part ends within a group, the group is split, and a second
kernel combines the results of its splits, weighted by their log-sum-exps.

Launches and allocations do not depend on the number of keys, so a compiled graph launches the
kernels itself and is the same for every length.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from diffmm.ops.diff_attention.triton.forward import _finish, _softmax_step
from diffmm.ops.diff_attention.triton.masking import (
    NUM_RANGE,
    KernelMask,
    key_bounds,
    visible,
)
from diffmm.ops.diff_attention.triton.tiles import (
    GPU,
    UNSPECIALIZED,
    cdiv,
    is_traced,
    pad,
    power_of_2,
    precision,
    strides_of,
)

# Maximum number of rows of one component in a tile: queries times heads per group.
MAX_ROWS = 64

# Number of keys of all samples up to which all of them are read.
FEW_KEYS = 1 << 14


@triton.jit
def _length(M, num_keys):
    """The number of keys: at most `M`, and at least one, so that there is a tile."""
    if num_keys is not None:
        M = tl.maximum(tl.minimum(tl.load(num_keys).to(tl.int32), M), 1)
    return M


@triton.jit
def _schedule(N, M, window, num_groups, num_programs, BLOCK_M: tl.constexpr):
    """The first tile of each group that the window allows, the number of tiles per group from
    there on, and the number of tiles per program."""
    first = 0
    if window is not None:
        first = tl.maximum(M - N - window + 1, 0) // BLOCK_M
    num_tiles = tl.cdiv(M, BLOCK_M) - first
    return first, num_tiles, tl.cdiv(num_groups * num_tiles, num_programs)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "num_groups"])
def _split_kernel(
    q, k, v, part, part_lse, window, prefix, labels, padding, ranges, num_keys,
    q_b, q_n, q_h, q_c, k_b, k_m, k_g, k_c, v_b, v_m, v_g,
    N, SIZE, G, heads_per_group, num_groups, scale,
    CAUSAL: tl.constexpr, NUM_MAPS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Process one program's part of all tiles. Its split of group `g` (counted over all samples)
    is written to slot `program + g`, which is unique: from one split to the next the program, the
    group or both increase."""
    scale = tl.full((), scale, tl.float32)  # a compiled graph passes a double
    M = _length(SIZE, num_keys)
    # Rows are ordered by component, head and query. With one key per component, a tile contains
    # the rows of one component.
    num_rows = heads_per_group * N
    row = tl.arange(0, BLOCK_R)
    if C == 2:
        component1 = tl.zeros_like(row)
        inside = row < num_rows
    else:
        component1 = row // num_rows
        inside = row < NUM_MAPS * num_rows
    query = row % N
    dims, widths, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_M)
    q_places = (row % num_rows // N).to(tl.int64) * q_h + component1.to(tl.int64) * q_c
    q_places = (q_places + query.to(tl.int64) * q_n)[:, None] + dims[None, :]
    apart = columns.to(tl.int64) if FAR else columns
    k_places = apart[:, None] * k_m + dims[None, :]
    v_places = apart[:, None] * v_m + widths[None, :]
    q_mask = inside[:, None] & (dims[None, :] < D)
    part_mask = inside[:, None] & (widths[None, :] < E)

    program, num_programs = tl.program_id(0), tl.num_programs(0)
    first, num_tiles, length = _schedule(N, M, window, num_groups, num_programs, BLOCK_M)
    begin = program * length
    end = tl.minimum(begin + length, num_groups * num_tiles)
    for pair in range(begin // num_tiles, tl.cdiv(end, num_tiles)):
        batch, group = pair // G, pair % G
        batch64, group64 = batch.to(tl.int64), group.to(tl.int64)
        q_rows = q + batch64 * q_b + group64 * heads_per_group * q_h + q_places
        q1 = tl.load(q_rows, mask=q_mask, other=0.0)
        acc1 = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
        m_i1 = tl.full((BLOCK_R,), -float("inf"), tl.float32)
        l_i1 = tl.zeros((BLOCK_R,), tl.float32)
        if C == 2:
            q2 = tl.load(q_rows + q_c, mask=q_mask, other=0.0)
            acc2, m_i2, l_i2 = acc1, m_i1, l_i1

        # Offsets of this sample's masks; absent ones stay None.
        prefix_b, labels_b, padding_b, ranges_b = prefix, labels, padding, ranges
        if prefix is not None:
            prefix_b += batch
        if labels is not None:
            labels_b += batch64 * (N + M)
        if padding is not None:
            padding_b += batch64 * SIZE
        if ranges is not None:
            ranges_b += batch * NUM_RANGE
        low, _, _, high = key_bounds(0, N, M, window, prefix_b, ranges_b, CAUSAL, BLOCK_R, BLOCK_M)
        low = tl.maximum(low, (first + tl.maximum(begin - pair * num_tiles, 0)) * BLOCK_M)
        high = tl.minimum(high, (first + tl.minimum(end - pair * num_tiles, num_tiles)) * BLOCK_M)
        k_rows = k + batch64 * k_b + group64 * k_g
        v_rows = v + batch64 * v_b + group64 * v_g
        for m0 in range(low, high, BLOCK_M):
            keys = m0 + columns
            seen = visible(
                query[:, None], keys[None, :], N, M, window, prefix_b, labels_b, padding_b,
                CAUSAL,
            )  # fmt: skip
            m0_64 = tl.full((), m0, tl.int64)
            k_tile, v_tile = k_rows + m0_64 * k_m + k_places, v_rows + m0_64 * v_m + v_places
            k_mask, v_mask = (keys < M)[:, None], (keys < M)[:, None]
            if D < BLOCK_D:
                k_mask = k_mask & (dims[None, :] < D)
            if E < BLOCK_E:
                v_mask = v_mask & (widths[None, :] < E)
            values = tl.load(v_tile, mask=v_mask, other=0.0)
            k1 = tl.load(k_tile, mask=k_mask, other=0.0)
            s1 = tl.dot(q1, k1.T, input_precision=PRECISION)
            acc1, m_i1, l_i1 = _softmax_step(s1, values, acc1, m_i1, l_i1, scale, seen, PRECISION)
            if C == 2:
                k2 = tl.load(k_tile + k_c, mask=k_mask, other=0.0)
                s2 = tl.dot(q2, k2.T, input_precision=PRECISION)
                acc2, m_i2, l_i2 = _softmax_step(
                    s2, values, acc2, m_i2, l_i2, scale, seen, PRECISION
                )

        place = (program + pair) * NUM_MAPS * num_rows + row
        part_rows = part + place.to(tl.int64)[:, None] * E + widths[None, :]
        _store(part_rows, part_lse + place, acc1, m_i1, l_i1, part_mask, inside)
        if C == 2:
            part_rows, place = part_rows + num_rows * E, place + num_rows
            _store(part_rows, part_lse + place, acc2, m_i2, l_i2, part_mask, inside)


@triton.jit
def _store(part, part_lse, acc, m_i, l_i, part_mask, inside):
    """Store the means of a split's rows and their log-sum-exps, -inf for rows without any visible
    key."""
    mean, lse = _finish(acc, m_i, l_i)
    tl.store(part, mean, mask=part_mask)
    tl.store(part_lse, tl.where(l_i == 0.0, -float("inf"), lse), mask=inside)


@triton.jit
def _add_splits(lse, values, m_i, l_i, acc):
    """Add some splits of one row to its online softmax."""
    m_new = tl.maximum(m_i, tl.max(lse, 0))
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)
    alpha, weight = tl.exp2(m_i - shift), tl.exp2(lse - shift)
    acc = acc * alpha + tl.sum(values * weight[:, None], 0)
    return m_new, l_i * alpha + tl.sum(weight, 0), acc


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "num_groups", "num_programs"])
def _join_kernel(
    part, part_lse, lam, out, window, num_keys, lam_b, lam_n, lam_h, N, SIZE, G, heads_per_group,
    num_groups, num_programs,
    NUM_MAPS: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Combine the splits of all maps into the output of one row, for a block of its values."""
    pair, row, num_rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, group = (pair // G).to(tl.int64), pair % G
    head, query = (group * heads_per_group + row // N).to(tl.int64), (row % N).to(tl.int64)
    M = _length(SIZE, num_keys)
    _, num_tiles, length = _schedule(N, M, window, num_groups, num_programs, BLOCK_M)
    begin = pair * num_tiles // length
    end = ((pair + 1) * num_tiles - 1) // length + 1
    widths = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    acc1 = tl.zeros((BLOCK_E,), tl.float32)
    m_i1, l_i1 = -float("inf"), 0.0
    acc2, m_i2, l_i2 = acc1, m_i1, l_i1
    for start in range(begin, end, BLOCK_S):
        program = start + tl.arange(0, BLOCK_S)
        inside = program < end
        rows = (program + pair) * NUM_MAPS * num_rows + row
        places = part + rows.to(tl.int64)[:, None] * E + widths[None, :]
        mask = inside[:, None] & (widths[None, :] < E)
        lse1 = tl.load(part_lse + rows, mask=inside, other=-float("inf"))
        values1 = tl.load(places, mask=mask, other=0.0)
        m_i1, l_i1, acc1 = _add_splits(lse1, values1, m_i1, l_i1, acc1)
        if NUM_MAPS == 2:
            lse2 = tl.load(part_lse + rows + num_rows, mask=inside, other=-float("inf"))
            values2 = tl.load(places + num_rows * E, mask=mask, other=0.0)
            m_i2, l_i2, acc2 = _add_splits(lse2, values2, m_i2, l_i2, acc2)
    mean = acc1 / tl.where(l_i1 == 0.0, 1.0, l_i1)
    if NUM_MAPS == 2:
        weight = tl.load(lam + batch * lam_b + query * lam_n + head * lam_h)
        mean -= weight * (acc2 / tl.where(l_i2 == 0.0, 1.0, l_i2))
    place = ((batch * N + query) * G * heads_per_group + head) * E
    tl.store(out + place + widths, mean.to(out.dtype.element_ty), mask=widths < E)


@dataclass(frozen=True)
class Cut:
    """Launch settings of the decoding kernel.

    Args:
        block_m: Keys per tile.
        num_warps: Warps per program.
        num_stages: Number of pipeline stages of the loads.
        programs: Programs that a multiprocessor runs at once.
    """

    block_m: int
    num_warps: int
    num_stages: int
    programs: int


def cut_for(item: int, block_r: int, components: int, block_d: int, block_e: int, gpu: GPU) -> Cut:
    """Launch settings for elements of `item` bytes and tiles of `block_r` rows. A tile of keys and
    values has at most 32 KiB, and the next ones are loaded ahead. A Hopper multiprocessor runs two
    programs with few rows; older GPUs have less shared memory."""
    if item == 4:  # No tensor cores: small tiles, or compiling takes minutes.
        return Cut(block_m=32, num_warps=4, num_stages=1, programs=2)
    few_rows, is_hopper = block_r <= 16, gpu.capability[0] == 9
    most = (1 << 14 if few_rows or is_hopper else 1 << 13) // (components * block_d + block_e)
    block_m = min(max(power_of_2(most + 1) // 2, 16), 128)
    if not is_hopper:
        return Cut(block_m, num_warps=8, num_stages=3, programs=1)
    if not few_rows:
        return Cut(block_m, num_warps=8, num_stages=4, programs=1)
    return Cut(block_m, num_warps=4, num_stages=3, programs=2)


def first_from(number: int, sizes: tuple[int, ...]) -> int:
    """The first of `sizes` that is at least `number`. Compared one by one, because in a compiled
    graph the number may be symbolic, and each comparison holds for many numbers."""
    return next(size for size in sizes if number <= size)


def is_far(k: Tensor, v: Tensor, block_m: int) -> bool:
    """Whether offsets within a tile of keys or values exceed 32 bits."""
    return max(k.stride(1), v.stride(1)) * block_m >= 1 << 31


def ranges_of(mask: KernelMask, B: int, N: int, M: int, block_r: int) -> Tensor | None:
    """The ranges of keys that are read; None for all. To read a few padded keys takes less time
    than to find where they begin and end."""
    few = mask.labels is None and B * M <= FEW_KEYS
    return None if few else mask.key_ranges(B, N, M, block_r)


def decodes(N: int, H: int, G: int) -> bool:
    """Whether `N` queries of `H` heads in `G` groups are few enough for one tile."""
    return N * (H // G) <= MAX_ROWS


def decode(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor | None, mask: KernelMask, scale: float,
    *, num_keys: Tensor | None, gpu: GPU,
) -> Tensor:  # fmt: skip
    """Compute the output, `[B, N, H, E]`, for inference. Shapes are those of `diff_attention`;
    without `lam`, queries `[B, N, H, 1, D]` have one map, that of softmax attention. `num_keys` is
    that of `AttentionMask`: the work is divided on the device, and reads only keys that exist."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (B, N, H, num_maps, D), (_, M, G, C, _), E = q.shape, k.shape, v.shape[-1]
    num_rows, block_d, block_e = N * (H // G), pad(D), pad(E)
    rows = num_rows if C == 2 else num_maps * num_rows
    block_r = first_from(rows, (16, 32, 64, 128))
    cut = cut_for(q.element_size(), block_r, C, block_d, block_e, gpu)
    num_programs, num_groups = cut.programs * gpu.num_multiprocessors, B * G
    parts = num_programs + num_groups, num_maps * num_rows
    part = q.new_empty(*parts, E, dtype=torch.float32)
    part_lse = q.new_empty(parts, dtype=torch.float32)
    out = q.new_empty(B, N, H, E)
    split, join = _split_kernel, _join_kernel
    if is_traced(q):
        split, join = wrap_triton(_split_kernel), wrap_triton(_join_kernel)
    split[(num_programs,)](
        q, k, v, part, part_lse, mask.window, mask.prefix, mask.labels, mask.padding,
        ranges_of(mask, B, N, M, block_r), num_keys,
        *q.stride()[:4], *k.stride()[:4], *v.stride()[:3],
        N, M, G, H // G, num_groups, scale * 1.4426950408889634,
        CAUSAL=mask.causal, NUM_MAPS=num_maps, C=C, D=D, E=E, BLOCK_R=block_r, BLOCK_M=cut.block_m,
        BLOCK_D=block_d, BLOCK_E=block_e, PRECISION=precision(q.dtype),
        FAR=is_far(k, v, cut.block_m), num_warps=cut.num_warps, num_stages=cut.num_stages,
    )  # fmt: skip
    # Upper bound of splits per group: two that extend beyond its ends, the others within.
    num_splits = num_programs // num_groups + 2
    block_s = first_from(min(num_splits, 128), (2, 4, 8, 16, 32, 64, 128))
    width = min(block_e, 32)
    join[(num_groups, num_rows, cdiv(E, width))](
        part, part_lse, lam, out, mask.window, num_keys, *strides_of(lam), N, M, G, H // G,
        num_groups, num_programs, NUM_MAPS=num_maps, E=E, BLOCK_M=cut.block_m, BLOCK_S=block_s,
        BLOCK_E=width, num_warps=4,
    )  # fmt: skip
    return out
