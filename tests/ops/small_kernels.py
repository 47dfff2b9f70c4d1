"""Small kernels for the tests of the interpreter, with an optional `fault` that it has to
detect."""

import triton
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

BLOCK = gl.constexpr(64)


@triton.jit
def numbers_kernel(x, y, out, num, half):
    """Integers as in C, with 32 bits, and type promotion."""
    place = tl.arange(0, 8)
    whole = tl.load(x + place, mask=place < num, other=-9)
    tl.store(out + place, whole // 4)
    tl.store(out + 8 + place, whole % 4)
    tl.store(out + 16 + place, whole * 2**30)
    tl.store(out + 24 + place, whole.to(tl.int64) * 2**30 // 2**30)
    low = tl.load(y + place)
    tl.store(out + 32 + place, low + 2.0**-9)
    tl.store(out + 40 + place, low + half)
    total = 0
    for step in range(0, num, 2):
        total += step // 2
    tl.store(out + 48 + place, tl.where(place < 3, total, tl.max(whole, 0)))


@gluon.jit
def square_kernel(a_desc, out_desc, out, fault: gl.constexpr, layout: gl.constexpr):
    """`a` times its own double, to registers and back to memory."""
    a = gl.allocate_shared_memory(a_desc.dtype, [BLOCK, BLOCK], a_desc.layout)
    double = gl.allocate_shared_memory(a_desc.dtype, [BLOCK, BLOCK], a_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full = bars.index(0)
    if fault != "not initialized":
        mbarrier.init(full, count=1)
    size: gl.constexpr = a_desc.block_type.nbytes
    if fault == "too few bytes":
        mbarrier.expect(full, size // 2)
    elif fault == "too many bytes":
        mbarrier.expect(full, size * 2)
    else:
        mbarrier.expect(full, size)
    if fault == "nothing brought":
        mbarrier.wait(full, 1)
    else:
        tma.async_copy_global_to_shared(a_desc, [0, 0], full, a)
    if fault == "other phase":
        mbarrier.wait(full, 1)
    elif fault != "copy not waited for" and fault != "nothing brought":
        mbarrier.wait(full, 0)
    double.store((a.load(layout) * 2.0).to(a.dtype))
    if fault != "no fence":
        fence_async_shared()
    nothing = gl.zeros([BLOCK, BLOCK], gl.float32, layout)
    product = warpgroup_mma(double, a, nothing, use_acc=False, is_async=True)
    if fault == "stored meanwhile":
        double.store(a.load(layout))
    if fault == "refilled":
        mbarrier.expect(full, size)
        tma.async_copy_global_to_shared(a_desc, [0, 0], full, a)
        mbarrier.wait(full, 1)
    if fault == "another waited for":
        product = warpgroup_mma_wait(1, deps=[product])
    elif fault != "product not waited for":
        product = warpgroup_mma_wait(0, deps=[product])
    rows = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    gl.store(out + rows[:, None] * BLOCK + columns[None, :], product + 0.0)
    tma.async_copy_shared_to_global(out_desc, [0, 0], double)
    if fault == "stored while copied":
        double.store(a.load(layout))
    if fault != "copy back not waited for":
        tma.store_wait(0)


@gluon.jit
def _bring(a_desc, ring, full, empty, num_steps, fault: gl.constexpr):
    for step in range(num_steps):
        stage = step % 2
        if fault != "no wait for room":
            mbarrier.wait(empty.index(stage), (step // 2 + 1) % 2)
        mbarrier.expect(full.index(stage), a_desc.block_type.nbytes)
        place = [step * BLOCK, 0]
        tma.async_copy_global_to_shared(a_desc, place, full.index(stage), ring.index(stage))
    if fault == "fence by another":
        fence_async_shared()


@gluon.jit
def _add_up(ring, full, empty, out, num_steps, fault: gl.constexpr, layout: gl.constexpr):
    acc = gl.zeros([BLOCK, BLOCK], gl.float32, layout)
    for step in range(num_steps):
        stage = step % 2
        if fault != "no wait for data":
            mbarrier.wait(full.index(stage), step // 2 % 2)
        tile = ring.index(stage)
        if fault == "fence by another":
            tile.store(tile.load(layout))
        token = warpgroup_mma(tile.permute((1, 0)), tile, acc, is_async=True)
        if fault == "room too early":
            mbarrier.arrive(empty.index(stage), count=1)
        acc = warpgroup_mma_wait(0, deps=[token])
        if fault == "room twice":
            mbarrier.arrive(empty.index(stage), count=2)
        elif fault != "room too early" and fault != "no room":
            mbarrier.arrive(empty.index(stage), count=1)
    rows = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    gl.store(out + rows[:, None] * BLOCK + columns[None, :], acc)


@gluon.jit
def gram_kernel(a_desc, out, num_steps, fault: gl.constexpr, layout: gl.constexpr):
    """`aᵀ a` over tiles of rows in a ring buffer."""
    ring = gl.allocate_shared_memory(a_desc.dtype, [2, BLOCK, BLOCK], a_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for bar in gl.static_range(2):
        mbarrier.init(full.index(bar), count=1)
        mbarrier.init(empty.index(bar), count=1)
    gl.warp_specialize(
        [
            (_add_up, (ring, full, empty, out, num_steps, fault, layout)),
            (_bring, (a_desc, ring, full, empty, num_steps, fault)),
        ],
        [1],
        [24],
    )
