"""The Hopper kernels compiled without a GPU: they fit into registers, and products stay in
flight."""

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the package triton")
gluon = pytest.importorskip("triton.experimental.gluon._runtime")

if not triton.__version__.startswith("3.6."):
    pytest.skip("the kernels are for Triton 3.6", allow_module_level=True)

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


def layout(rank, swizzle=128, bits=16):
    return (
        f"NVMMASharedLayout(swizzle_byte_width={swizzle}, element_bitwidth={bits}, rank={rank}, "
        f"transposed=False, fp4_padded=False, cga_layout=[])"
    )


LOOKS = {"window": "i32", "prefix": "*i32", "labels": "*i32", "ranges": "*i32"}


DOCUMENTS = {"window": None, "prefix": None}
"""Constants of a mask of documents alone, whose tiles may be in runs."""


def compiled(kernel, dtype, D, E, *, keys=64, looked_up=False, num_maps=2, **constants):
    from triton.backends.compiler import GPUTarget

    types = {
        "q_desc": f"tensordesc<{dtype}[1, 64, 1, 1, {D}],{layout(5)}>",
        "g_desc": f"tensordesc<{dtype}[1, 64, 1, {E}],{layout(4)}>",
        "k_desc": f"tensordesc<{dtype}[1, {keys}, 1, 1, {D}],{layout(5)}>",
        "v_desc": f"tensordesc<{dtype}[1, {keys}, 1, {E}],{layout(4)}>",
        "ds_desc": f"tensordesc<{dtype}[64, 64],{layout(2)}>",
        "rows_desc": f"tensordesc<fp32[4, 64],{layout(2, 0, 32)}>",
        "weight_desc": f"tensordesc<fp32[1, 64],{layout(2, 0, 32)}>",
        "scale": "fp32", "lam": "*fp32", "lse": "*fp32",
        **dict.fromkeys(("dk", "dv", "out", "second"), f"*{dtype}"),
    }  # fmt: skip
    constants |= {"D": D, "E": E, "BLOCK_D": D, "BLOCK_E": E, "KEYS": keys}
    if looked_up:
        types |= {name: kind for name, kind in LOOKS.items() if name not in constants}
    else:
        constants |= dict.fromkeys(LOOKS)
    constants |= {"NUM_MAPS": num_maps, "padding": None}  # a part of the labels
    if num_maps == 1:
        constants |= {"lam": None, "second": None}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*")
    }
    constants = {name: value for name, value in constants.items() if name in names}
    source = gluon.GluonASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@pytest.fixture(autouse=True)
def _reported(request, tmp_path):
    """Compiled kernels hold the report of the assembler in place of machine code. They are kept for
    the next tests, as Triton keeps its own, until their code, Triton or the assembler change."""
    cache = getattr(request.config, "cache", None)
    with triton.knobs.cache.scope(), triton.knobs.runtime.scope():
        triton.knobs.cache.dir = str(cache.mkdir("hopper_reports") if cache else tmp_path)
        triton.knobs.runtime.add_stages_inspection_hook = report_instead
        yield


def report_instead(backend, stages, options, language, capability):
    stages["cubin"] = lambda ptx, metadata: report(ptx).encode()


def report(ptx):
    """The report of the assembler on a kernel."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [PTXAS, "-v", "-arch=sm_90a", path, "-o", path.with_suffix(".cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def key_kernel(dtype, widths, *, causal, looked_up=False, num_maps=2, **grouped):
    from diffmm.ops.diff_attention.triton.hopper.backward import kernels_of_keys, num_stages

    D, E, C = widths
    keys = kernels_of_keys(D, E, C)
    stages = num_stages(keys.KEYS.value, D, E, C, num_maps)
    return compiled(
        keys.key_kernel, dtype, D, E, looked_up=looked_up, num_maps=num_maps, C=C, CAUSAL=causal,
        FOLDED=causal and not looked_up, STAGES=stages, **grouped,
    )  # fmt: skip


def forward_kernel(dtype, widths, *, causal, looked_up=False, num_maps=2, **constants):
    from diffmm.ops.diff_attention.triton.hopper.forward import _forward_kernel, keys_and_stages

    D, E, C = widths
    keys, stages = keys_and_stages(D, E, C)
    return compiled(
        _forward_kernel, dtype, D, E, keys=keys, looked_up=looked_up, num_maps=num_maps, C=C,
        CAUSAL=causal, STAGES=stages, **constants,
    )  # fmt: skip


def check(kernel, most_bytes):
    said = kernel.asm["cubin"].decode()
    assert int(re.search(r"(\d+) bytes spill stores", said)[1]) <= most_bytes, said
    # The assembler waits for each product if it cannot analyze the schedule.
    assert "serialized" not in said, said
    assert kernel.metadata.shared <= 227 * 1024


WIDE, V2, V1 = (128, 256, 2), (128, 128, 1), (64, 128, 2)  # D, E, C
MOST_OF_ONE_MAP = {False: (0, 0), True: (96, 64)}  # of the key kernel and the forward kernel
OTHERS = [(64, 64, 1), (64, 64, 2), (128, 128, 2), (128, 256, 1), (64, 256, 2), (128, 64, 1)]


# Values for masked tiles and addresses of operands may spill, but never accumulators.
@pytest.mark.parametrize(("dtype", "causal"), [("bf16", True), ("fp16", False)])
@pytest.mark.parametrize(("widths", "most"), [(WIDE, 8), (V2, 96), (V1, 64)], ids=str)
def test_in_registers_and_in_flight(widths, most, causal, dtype):
    check(key_kernel(dtype, widths, causal=causal, heads_per_group=1), most)
    if widths[0] == 128:
        check(forward_kernel(dtype, widths, causal=causal), 0)


@pytest.mark.parametrize(("widths", "most"), [(WIDE, 32), (V2, 128), (V1, 96)], ids=str)
def test_grouped_keys(widths, most):
    check(key_kernel("bf16", widths, causal=True), most)


@pytest.mark.parametrize("widths", OTHERS, ids=str)
def test_other_widths(widths):
    check(key_kernel("bf16", widths, causal=True), 96)
    if widths[0] == 128 and widths[1] > 64:
        check(forward_kernel("bf16", widths, causal=True), 0)


@pytest.mark.parametrize(
    ("widths", "most", "forward"), [(WIDE, 128, 8), (V2, 352, 64), (V1, 320, None)], ids=str
)
def test_looked_up_masks(widths, most, forward):
    check(key_kernel("bf16", widths, causal=True, looked_up=True), most)
    if forward is not None:
        for kind in ({}, DOCUMENTS):
            made = forward_kernel("bf16", widths, causal=True, looked_up=True, **kind)
            check(made, forward)


@pytest.mark.parametrize("looked_up", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_one_map(width, looked_up):
    """Of softmax attention."""
    settings = {"causal": True, "looked_up": looked_up, "num_maps": 1}
    most, most_forward = MOST_OF_ONE_MAP[looked_up]
    # Keys of one head for half of the cases, so that each width and kind of mask has both.
    grouped = {"heads_per_group": 1} if looked_up == (width == 64) else {}
    check(key_kernel("bf16", (width, width, 1), **settings, **grouped), most)
    if width == 128:
        for kind in ({}, DOCUMENTS) if looked_up else ({},):
            made = forward_kernel("bf16", (width, width, 1), **settings, **kind)
            check(made, most_forward)


@pytest.mark.parametrize("looks", [("window",), ("labels", "ranges")], ids=str)
def test_three_programs_of_one_narrow_map(looks):
    """The plain forward kernel, with heads of 64."""
    from test_ampere_compiles import compiled

    from diffmm.ops.diff_attention.triton.forward import _forward_kernel
    from diffmm.ops.diff_attention.triton.tiles import tiles_for

    tile = tiles_for(torch.bfloat16, 64, 64, (9, 0)).forward
    constants = {"COMPONENTS": "single", "lam": None, "second": None}
    limit = {"maxnreg": tile.one_map_registers}
    made = compiled(
        _forward_kernel, tile, 64, 64, 1, capability=90, looks=looks, options=limit, **constants
    )
    check(made, 0)
    used = int(re.search(r"Used (\d+) registers", made.asm["cubin"].decode())[1])
    assert 3 * used * 32 * tile.num_warps <= 65536
