"""The plain kernels compiled for GPUs that are not present: they fit into the shared memory of the
smallest Ampere and Ada cards, 99 KiB. Their results are tested in the interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the package triton")

SHARED_BYTES = 99 * 1024
LOOKS = {"window": "i32", "prefix": "*i32", "labels": "*i32", "ranges": "*i32"}


def compiled(kernel, tile, D, E, C, *, capability=86, looks=(), options=None, **constants):
    """A kernel for bfloat16 and a causal mask, with the other masks in `looks`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diffmm.ops.diff_attention.triton.tiles import pad

    block_d, block_e, n, m = pad(D), pad(E), tile.block_n, tile.block_m
    types = {
        "q_desc": f"tensordesc<bf16[1, {n}, 1, 1, {block_d}]>",
        "g_desc": f"tensordesc<bf16[1, {n}, 1, {block_e}]>",
        "k_desc": f"tensordesc<bf16[1, {m}, 1, 1, {block_d}]>",
        "v_desc": f"tensordesc<bf16[1, {m}, 1, {block_e}]>",
        "scale": "fp32",
        **dict.fromkeys(("lam", "rows", "lse", "part", "part_lse"), "*fp32"),
        **dict.fromkeys(("q", "k", "v", "grad", "dk", "dv", "dq", "out", "second"), "*bf16"),
    }
    strides = {f"{tensor}_{dim}" for tensor in "qkv" for dim in "bnmhgc"}
    constants |= {"CAUSAL": True, "C": C, "D": D, "E": E, "BLOCK_N": n, "BLOCK_M": m}
    constants |= {"BLOCK_D": block_d, "BLOCK_E": block_e, "PRECISION": "tf32", "FAR": False}
    constants["NUM_MAPS"] = 2
    constants |= dict.fromkeys((*LOOKS, "padding", "num_keys"))
    constants = {name: value for name, value in constants.items() if name not in looks}
    types |= {name: LOOKS[name] for name in looks}
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in strides
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **(options or {})}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("widths", [(64, 128, 2), (128, 256, 2), (128, 128, 1)], ids=str)
def test_small_cards_have_the_memory(widths):
    from diffmm.ops.diff_attention.triton import backward, forward
    from diffmm.ops.diff_attention.triton.tiles import tiles_for

    D, E, _ = widths
    tiles = tiles_for(torch.bfloat16, D, E, (8, 6))
    for components in ("second", "first") if tiles.forward.split else ("both",):
        kernel = forward._forward_kernel
        done = compiled(kernel, tiles.forward, *widths, COMPONENTS=components)
        assert done.metadata.shared <= SHARED_BYTES
    for kernel, tile in (
        (backward._key_kernel, tiles.key_grad),
        (backward._query_kernel, tiles.query_grad),
    ):
        assert compiled(kernel, tile, *widths).metadata.shared <= SHARED_BYTES


WIDTHS = [(64, 128, 2), (128, 256, 2), (128, 128, 1), (128, 256, 1)]  # D, E, C


@pytest.mark.parametrize(
    ("widths", "rows"), [(w, r) for w in WIDTHS for r in (16, 64, 128) if w[2] == 1 or r < 128]
)
def test_small_cards_have_the_memory_to_decode(widths, rows):
    from diffmm.ops.diff_attention.triton.decode import _split_kernel, cut_for
    from diffmm.ops.diff_attention.triton.tiles import GPU, Tile

    D, E, C = widths
    cut = cut_for(2, rows, C, D, E, GPU((8, 6), 84))
    tile = Tile(rows, cut.block_m, cut.num_warps, cut.num_stages)
    done = compiled(_split_kernel, tile, *widths, BLOCK_R=rows)
    assert done.metadata.shared <= SHARED_BYTES


@pytest.mark.parametrize(
    ("capability", "documents", "padded"),
    [(86, "i32", False), (86, "i64", True), (90, "i64", False), (90, "i32", True)],
)
def test_mask_kernels(capability, documents, padded):
    """All pairs of the three parameters."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diffmm.ops.diff_attention.triton import masking

    types = {"documents": f"*{documents}", "labels": "*i32", "ranges": "*i32", "padding": "*i1"}
    sizes = {"BLOCK": masking._BLOCK, "CHUNK": masking._CHUNK, "PART": masking._PART}
    for kernel, constants in (
        (masking._labels_kernel, {} if padded else {"padding": None}),
        (masking._ranges_kernel, {"OF_KEYS": False, "labels" if padded else "padding": None}),
        (masking._ranges_kernel, {"OF_KEYS": True, "labels" if padded else "padding": None}),
    ):
        names = kernel.arg_names
        given = constants | {name: value for name, value in sizes.items() if name in names}
        signature = {n: "constexpr" if n in given else types.get(n, "i32") for n in names}
        source = ASTSource(kernel, signature, given)
        done = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert done.metadata.shared <= SHARED_BYTES


def test_the_kernel_of_the_kth_largest():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diffmm.ops.kth_largest_kernel import NUMBERS_PER_WARP, _kth_kernel

    given = {"SIZE": 32, "GROUPS": 1024, "KEPT": NUMBERS_PER_WARP // 32}
    types = {"x": "*fp32", "maxima": "*fp32", "chosen": "*i32", "out": "*fp32", "V": "i32"}
    types |= {"num_groups": "i32", "k": "i32"}
    signature = types | dict.fromkeys(given, "constexpr")
    source = ASTSource(_kth_kernel, signature, given)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    assert done.metadata.shared <= SHARED_BYTES
    # One warp: no thread waits for those of others in the search.
    assert done.asm["ptx"].count("bar.sync") <= 2
