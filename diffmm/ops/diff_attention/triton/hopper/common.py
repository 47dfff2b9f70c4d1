"""Code that the Gluon kernels share."""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from diffmm.ops.diff_attention.triton.rows import NUM_ROWS, WEIGHT
from diffmm.ops.diff_attention.triton.tiles import UNSPECIALIZED as UNSPECIALIZED_IN_TRITON
from diffmm.ops.diff_attention.triton.tiles import describe

BLOCK = gl.constexpr(64)
"""Keys and queries per tile of scores: the number of rows of a warpgroup's matrix product."""

UNSPECIALIZED = [name for name in UNSPECIALIZED_IN_TRITON if name != "heads_per_group"]
UNSPECIALIZED += ["first_pair", "first_tile", "num_tiles"]
"""For Gluon kernels, which are specialized for `heads_per_group`: one head per group needs fewer
registers."""

SHARED_BYTES = 227 << 10
"""Maximum shared memory per program."""

SPAN = gl.constexpr(256)
"""Queries per tile of dQ; key kernels write dS, or zeros, for whole tiles."""

# Offset of the long rows of folded causal dS, which makes room for the short rows before them.
FOLD = gl.constexpr(3 * SPAN.value - 2 * BLOCK.value)


def gluon_describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """`describe` for Gluon kernels, which also need the layout in shared memory."""
    plain = describe(tensor, block)
    layout = _layout(tensor.element_size(), len(block))
    return TensorDescriptor(tensor, plain.shape, plain.strides, block, layout)


@cache
def _layout(item: int, rank: int) -> gl.NVMMASharedLayout:
    swizzle, bits = (128, 16) if item == 2 else (0, 32)
    return gl.NVMMASharedLayout(swizzle, bits, rank=rank)


@gluon.jit
def opaque(x):
    """Return `x` as a value unknown to the compiler, which would otherwise keep addresses derived
    from a constant in registers that a loop needs."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def packed(x):
    """Return 16-bit `x` packed as two values per register; the compiler would otherwise keep it in
    32 bits and round at each use."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
    )


@triton.jit
def scratch_place(tile, num_tiles, FOLDED: gl.constexpr):
    """Location of the dS of a tile of keys: the row (in tiles) within its head's scratch memory,
    and the offset of its columns from its queries. Causal dS is a triangle; when folded, the short
    rows of the last keys are stored before the long rows of the first keys."""
    if FOLDED:
        short = tile >= (num_tiles + 1) // 2
        row = tl.where(short, num_tiles - 1 - tile, tile)
        shift = tl.where(short, -(tile * BLOCK // SPAN * SPAN), FOLD)
    else:
        row, shift = tile, 0
    return row, shift


@gluon.jit
def clear_margins(
    ds_desc, ds, head_slot, height, row, shift, low, high, heads_per_group, layout: gl.constexpr,
    NUM_MAPS: gl.constexpr,
):  # fmt: skip
    """Write zeros for the queries outside `[low, high)` whose tile of dQ reads the dS of this tile
    of keys. They are copied from `ds`, a tile of shared memory."""
    first, last = low // SPAN * SPAN, tl.cdiv(high, SPAN) * SPAN
    ds.store(gl.zeros([BLOCK, BLOCK], ds.dtype, layout))
    fence_async_shared()
    gl.thread_barrier()
    for component in range(NUM_MAPS * heads_per_group):
        top = ((NUM_MAPS * head_slot + component) * height + row) * BLOCK
        for n0 in range(first, low, BLOCK):
            tma.async_copy_shared_to_global(ds_desc, [top, n0 + shift], ds)
        for n0 in range(high, last, BLOCK):
            tma.async_copy_shared_to_global(ds_desc, [top, n0 + shift], ds)
    tma.store_wait(0)
    gl.thread_barrier()


@gluon.jit
def part_of_heads(heads_per_group, part, parts):
    """The number of heads that one of the programs of a group processes, and the first of them."""
    heads = tl.cdiv(heads_per_group, parts)
    first = part * heads
    return tl.minimum(heads, heads_per_group - first), first


@gluon.jit
def allocate_ring(
    q_desc, g_desc, rows_desc, weight_desc, STAGES: gl.constexpr, NUM_MAPS: gl.constexpr
):
    """Allocate a ring buffer for `STAGES` tiles of queries, output gradients and rows, and the
    barriers that signal when a tile is full and when both warpgroups have consumed it."""
    BLOCK_D: gl.constexpr = q_desc.block_type.shape[-1]
    BLOCK_E: gl.constexpr = g_desc.block_type.shape[-1]
    dtype: gl.constexpr = q_desc.dtype
    q = gl.allocate_shared_memory(
        dtype, [NUM_MAPS * STAGES, 1, BLOCK, 1, 1, BLOCK_D], q_desc.layout
    )
    g = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK, 1, BLOCK_E], g_desc.layout)
    rows = gl.allocate_shared_memory(gl.float32, [STAGES, 4, BLOCK], rows_desc.layout)
    weights = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    return q, g, rows, weights, full, empty


@gluon.jit
def load_queries(
    q_desc, g_desc, rows_desc, weight_desc, q, g, rows, weights, full, empty, batch, H, first_head,
    heads_per_group, low, high, NUM_MAPS: gl.constexpr,
):  # fmt: skip
    """Keep the ring buffer of queries, output gradients and rows full; run by one warp."""
    STAGES: gl.constexpr = rows.shape[0]
    step = 0
    for head in range(first_head, first_head + heads_per_group):
        row = (batch * H + head) * NUM_ROWS
        for n0 in range(low, high, BLOCK):
            stage = step % STAGES
            # Waiting for the phase before the first returns at once on a new barrier.
            mbarrier.wait(empty.index(stage), (step // STAGES + 1) % 2)
            bar = full.index(stage)
            tiles: gl.constexpr = NUM_MAPS * q_desc.block_type.nbytes + g_desc.block_type.nbytes
            vectors: gl.constexpr = rows_desc.block_type.nbytes + weight_desc.block_type.nbytes
            mbarrier.expect(bar, tiles + vectors)
            for c in gl.static_range(NUM_MAPS):
                tma.async_copy_global_to_shared(
                    q_desc, [batch, n0, head, c, 0], bar, q.index(NUM_MAPS * stage + c)
                )
            tma.async_copy_global_to_shared(g_desc, [batch, n0, head, 0], bar, g.index(stage))
            tma.async_copy_global_to_shared(rows_desc, [row, n0], bar, rows.index(stage))
            tma.async_copy_global_to_shared(
                weight_desc, [row + WEIGHT, n0], bar, weights.index(stage)
            )
            step += 1


@gluon.jit
def write_tile(out, tile, m0, M, rows_apart, WIDTH: gl.constexpr):
    """Write the gradient of a tile of keys that starts at `m0` into rows of `WIDTH` elements, with
    a stride of `rows_apart`."""
    layout: gl.constexpr = tile.type.layout
    row = (m0 + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout)))[:, None]
    column = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, layout))[None, :]
    place = out + row.to(gl.int64) * rows_apart + column
    gl.store(place, tile.to(out.dtype.element_ty), mask=(row < M) & (column < WIDTH))
